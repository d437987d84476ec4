"""Calibration: how far predicted probabilities are from observed frequencies."""

import numpy as np
import pandas as pd

from pcam_kaggle.scoring.metrics import Floats, Labels

BINS = 15


def calibration_bins(labels: Labels, probabilities: Floats) -> pd.DataFrame:
    """Return one row per non-empty bin of equal width of `probabilities` (n,): mean label, mean probability, size."""
    table = pd.DataFrame({"label": labels, "probability": probabilities})
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return table.groupby(bins).agg(label=("label", "mean"), probability=("probability", "mean"), size=("label", "size"))


def calibration_error(labels: Labels, probabilities: Floats) -> float:
    """Return the expected calibration error of `probabilities` (n,) in 15 bins of equal width (Guo et al. 2017, equation 3)."""
    bins = calibration_bins(labels, probabilities)
    return float((bins["size"] * (bins["label"] - bins["probability"]).abs()).sum() / bins["size"].sum())
