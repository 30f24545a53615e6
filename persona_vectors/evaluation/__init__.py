"""Judges, and what they measure: answers, sweeps, likelihood contrasts, inventories, benchmarks."""
