"""Training data judged before training: projection differences, reports, splits, comparisons."""
