"""ROC AUC, its variance, and the difference of two: DeLong's, by midranks."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DRAWS = 2000
Floats = NDArray[np.float64]


class Difference(NamedTuple):
    """A paired difference, the ends of its confidence interval, its standard error, and p for no difference."""

    value: float
    low: float
    high: float
    error: float
    p: float


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


def auc_difference(labels: NDArray[np.integer], first: Floats, second: Floats, level: float = 0.95) -> Difference:
    """Return AUC(first) - AUC(second), both (n,) on the same patches, with DeLong's paired interval at `level` and p."""
    areas, covariance = delong(labels, np.stack([first, second]))
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    return _difference(float(areas[0] - areas[1]), float(np.sqrt(max(0.0, variance))), stats.norm(), level)


def slide_difference(
    labels: NDArray[np.integer], slides: NDArray[np.integer], first: Floats, second: Floats, level: float = 0.95
) -> Difference:
    """Return the difference of two AUCs as `auc_difference`, for patches (n,) of one slide that are not independent.

    `first` and `second` are the `slide_pairs` of the two scores. Slides, not patches, are drawn with replacement, 2,000 times
    with a fixed seed: a paired cluster bootstrap (Field & Welsh 2007). The interval is the difference plus and minus the
    draws' SD times the quantile of Student's t with one degree of freedom less than slides. `slides` are codes from 0.
    """
    positives = np.bincount(slides[labels == 1], minlength=len(first)).astype(np.float64)
    negatives = np.bincount(slides[labels != 1], minlength=len(first)).astype(np.float64)
    even = np.full(len(first), 1 / len(first))
    draws = np.random.default_rng(0).multinomial(len(first), even, DRAWS).astype(np.float64)
    total = (draws @ positives) * (draws @ negatives)
    draws, total = draws[total > 0], total[total > 0]
    drawn = ((draws @ (first - second)) * draws).sum(axis=1) / total
    difference = float((first - second).sum() / (positives.sum() * negatives.sum()))
    return _difference(difference, float(drawn.std(ddof=1)), stats.t(len(first) - 1), level)


def slide_pairs(labels: NDArray[np.integer], slides: NDArray[np.integer], scores: Floats) -> Floats:
    """Return how many pairs of a positive of slide i and a negative of slide j are in order, ties half: (slides, slides).

    The AUC of any multiset of slides is a quadratic form of this, so that a draw of the bootstrap costs no sorting.
    """
    positive = labels == 1
    n_slides = int(slides.max()) + 1
    order = np.argsort(scores[~positive])
    ranked, of_negatives = scores[~positive][order], slides[~positive][order]
    below = np.searchsorted(ranked, scores[positive], "left")
    up_to = np.searchsorted(ranked, scores[positive], "right")
    of_positives = slides[positive]
    by_slide = np.argsort(of_positives, kind="stable")
    bounds = np.searchsorted(of_positives[by_slide], np.arange(n_slides + 1))
    pairs = np.zeros((n_slides, n_slides))
    for slide in range(n_slides):
        own = by_slide[bounds[slide] : bounds[slide + 1]]
        reach = np.bincount(np.concatenate([below[own], up_to[own]]), minlength=len(ranked) + 1)
        # Of a slide's positives, those above the k-th negative are those that do not end at or before it.
        above = len(own) - reach[:-1].cumsum() / 2
        pairs[slide] = np.bincount(of_negatives, weights=above, minlength=n_slides)
    return pairs


def rank_within(groups: NDArray[np.integer], scores: Floats) -> Floats:
    """Return each score's midrank among its group's, divided by the group's size: in (0, 1]."""
    ranks = np.empty(len(scores))
    for group in np.unique(groups):
        inside = groups == group
        ranks[inside] = midranks(scores[inside]) / inside.sum()
    return ranks


def holm(p: Floats) -> Floats:
    """Return the p values (k,), corrected for their number (Holm 1979): the chance of any false one stays below the level."""
    order = np.argsort(p)
    stepped = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    corrected = np.empty(len(p))
    corrected[order] = stepped
    return corrected


def _difference(value: float, error: float, distribution: Any, level: float) -> Difference:
    half = float(distribution.ppf((1 + level) / 2)) * error
    p = float(2 * distribution.sf(abs(value) / error)) if error else float(value == 0)
    return Difference(value, value - half, value + half, error, p)


def _covariance(components: Floats) -> Floats:
    if components.shape[1] < 2:
        return np.full((len(components), len(components)), np.nan)
    return np.atleast_2d(np.cov(components))


def _quantile(level: float) -> float:
    return float(stats.norm.ppf((1 + level) / 2))
