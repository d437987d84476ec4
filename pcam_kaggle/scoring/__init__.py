"""Numbers: AUC with its variance, blends of predictions, and comparisons of runs.

Nothing here needs torch.
"""
