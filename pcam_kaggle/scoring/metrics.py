"""ROC AUC from midranks, ranks within groups, cross-entropy, operating points, and calibration."""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Labels = NDArray[np.integer]
CALIBRATION_BINS = 15


def auc(labels: Labels, scores: Floats) -> float:
    """Return the area under the ROC curve of `scores` (n,) on any scale; a tie of a positive and a negative counts 1/2.

    Raises:
        ValueError: A class is absent, one of `labels` (n,) is neither 0 nor 1, a score is NaN, or the shapes differ.
    """
    return float(placements(labels, np.stack([scores]))[0].mean(axis=1)[0])


def cross_entropy(labels: Labels, logits: Floats) -> float:
    """Return the mean binary cross-entropy of `logits` (n,) in nats; `labels` (n,) are 0 and 1."""
    # NumPy's sum, unlike torch's, does not depend on the number of threads.
    return float(np.logaddexp(0, np.where(labels == 1, -logits, logits)).mean())


def placements(labels: Labels, scores: Floats) -> tuple[Floats, Floats]:
    """Return the structural components of the AUC of each row of `scores` (k, n) (DeLong et al. 1988); ties count 1/2.

    They are the fraction of negatives below each positive, (k, positives), and of positives above each negative,
    (k, negatives). Raises ValueError as `auc` does.
    """
    positive = positive_mask(labels, scores)
    m, n = int(positive.sum()), int((~positive).sum())
    of_positives, of_negatives = np.empty((len(scores), m)), np.empty((len(scores), n))
    for row, values in enumerate(scores):
        ranks = rankdata(values, nan_policy="raise")
        of_positives[row] = (ranks[positive] - rankdata(values[positive])) / n
        of_negatives[row] = 1 - (ranks[~positive] - rankdata(values[~positive])) / m
    return of_positives, of_negatives


def positive_mask(labels: Labels, scores: Floats) -> NDArray[np.bool_]:
    """Return which of `labels` (n,) are 1; raises ValueError as `auc` does, except for NaN in `scores` (..., n)."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or scores.shape[-1:] != labels.shape:
        raise ValueError(f"labels of shape {labels.shape} do not fit scores of shape {scores.shape}")
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise ValueError("a label is neither 0 nor 1")
    if positive.all() or not positive.any():
        raise ValueError("an AUC needs labels of both classes")
    return positive


def rank_within(groups: NDArray[np.integer], scores: Floats) -> Floats:
    """Return the midrank of each score within its group, divided by the group's size, in (0, 1]; all arrays are (n,)."""
    ranks = np.empty(len(scores))
    for group in np.unique(groups):
        inside = groups == group
        ranks[inside] = rankdata(scores[inside], nan_policy="raise") / inside.sum()
    return ranks


def operating_points(labels: Labels, probabilities: Floats) -> pd.DataFrame:
    """Return the confusion matrix at four thresholds of `probabilities` (n,): a patch is positive from the threshold upwards.

    The rows are 0.5, the maximum of Youden's index (sensitivity + specificity - 1), and sensitivities of 95 % and 99 %, each at
    the highest of the probabilities that reaches it. The columns are threshold, sensitivity, specificity, PPV (NaN if no patch
    is positive), F1, and the counts TP, FP, TN, FN. Raises ValueError as `auc` does, except for NaN in `probabilities`.
    """
    positive = positive_mask(labels, probabilities)
    parts = np.sort(probabilities[positive]), np.sort(probabilities[~positive])
    m, n = map(len, parts)
    highest_first = np.unique(probabilities)[::-1]
    tp, fp = (len(part) - np.searchsorted(part, highest_first) for part in parts)
    # Integers, so that equal indices are equal.
    reached = [tp * n - fp * m == (tp * n - fp * m).max(), tp / m >= 0.95, tp / m >= 0.99]
    thresholds = np.array([0.5, *(highest_first[where.argmax()] for where in reached)])
    tp, fp = (len(part) - np.searchsorted(part, thresholds) for part in parts)
    ratios = {"sensitivity": tp / m, "specificity": (n - fp) / n, "PPV": tp / np.where(tp + fp, tp + fp, np.nan)}
    counts = {"TP": tp, "FP": fp, "TN": n - fp, "FN": m - tp}
    names = ["0.5", "Youden", "95 % sensitivity", "99 % sensitivity"]
    return pd.DataFrame({"threshold": thresholds, **ratios, "F1": 2 * tp / (tp + fp + m), **counts}, names)


def calibration_bins(labels: Labels, probabilities: Floats) -> pd.DataFrame:
    """Return one row per non-empty bin of equal width of `probabilities` (n,): mean label, mean probability, size."""
    table = pd.DataFrame({"label": labels, "probability": probabilities})
    bins = np.minimum((probabilities * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return table.groupby(bins).agg(label=("label", "mean"), probability=("probability", "mean"), size=("label", "size"))


def calibration_error(labels: Labels, probabilities: Floats) -> float:
    """Return the expected calibration error of `probabilities` (n,) in 15 bins of equal width (Guo et al. 2017, equation 3)."""
    bins = calibration_bins(labels, probabilities)
    return float((bins["size"] * (bins["label"] - bins["probability"]).abs()).sum() / bins["size"].sum())
