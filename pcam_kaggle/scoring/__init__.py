"""Numbers, without torch: AUC with its variance, blends of predictions, and comparisons of runs."""
