"""Benchmarks of persona_vectors: one file a command, `measuring` and other people's code in `peers`."""
