"""Projections: read while a model answers, from finished text, calibrated, shown."""
