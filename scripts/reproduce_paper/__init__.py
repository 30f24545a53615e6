"""The paper's fine-tuning results on any model: sets, runs, what they came to, tables and figures."""
