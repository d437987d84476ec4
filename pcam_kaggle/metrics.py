"""ROC AUC, its variance, and the difference of two: DeLong's, by midranks."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with the ends of its confidence interval."""

    value: float
    low: float
    high: float


def midranks(values: Floats) -> Floats:
    """Return the 1-based ranks of `values`, shape (n,), ties sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def auc(labels: NDArray[np.integer], scores: Floats) -> float:
    """Return the area under the ROC curve of `scores` (n,) for `labels` (n,) of 0 and 1, a tie counting half.

    Raises ValueError where either class is absent.
    """
    areas, _ = delong(labels, scores[None])
    return float(areas[0])


def delong(labels: NDArray[np.integer], scores: Floats) -> tuple[Floats, Floats]:
    """Return the AUC of each row of `scores` (k, n), shape (k,), and their covariance, shape (k, k).

    DeLong et al. 1988, computed from midranks in O(n log n) (Sun & Xu 2014, algorithm 2). The covariance of a class with a
    single member is NaN. Raises ValueError where either class is absent.
    """
    positive = labels == 1
    m, n = int(positive.sum()), int((~positive).sum())
    if not m or not n:
        raise ValueError("an AUC needs labels of both kinds")
    of_positives = np.empty((len(scores), m))
    of_negatives = np.empty((len(scores), n))
    for row, values in enumerate(scores):
        ranks = midranks(values)
        of_positives[row] = (ranks[positive] - midranks(values[positive])) / n
        of_negatives[row] = 1 - (ranks[~positive] - midranks(values[~positive])) / m
    areas = of_positives.mean(axis=1)
    return areas, _covariance(of_positives) / m + _covariance(of_negatives) / n


def auc_interval(labels: NDArray[np.integer], scores: Floats, level: float = 0.95) -> Estimate:
    """Return the AUC of `scores` (n,) with DeLong's interval at `level`, cut to [0, 1]."""
    areas, covariance = delong(labels, scores[None])
    half = _quantile(level) * float(np.sqrt(covariance[0, 0]))
    area = float(areas[0])
    return Estimate(area, max(0.0, area - half), min(1.0, area + half))


def auc_difference(labels: NDArray[np.integer], first: Floats, second: Floats, level: float = 0.95) -> Estimate:
    """Return AUC(first) - AUC(second), both (n,) on the same patches, with DeLong's paired interval at `level`."""
    areas, covariance = delong(labels, np.stack([first, second]))
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    half = _quantile(level) * float(np.sqrt(max(0.0, variance)))
    difference = float(areas[0] - areas[1])
    return Estimate(difference, difference - half, difference + half)


def rank_within(groups: NDArray[np.integer], scores: Floats) -> Floats:
    """Return each score's midrank among its group's, divided by the group's size: in (0, 1]."""
    ranks = np.empty(len(scores))
    for group in np.unique(groups):
        inside = groups == group
        ranks[inside] = midranks(scores[inside]) / inside.sum()
    return ranks


def _covariance(components: Floats) -> Floats:
    if components.shape[1] < 2:
        return np.full((len(components), len(components)), np.nan)
    return np.atleast_2d(np.cov(components))


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
