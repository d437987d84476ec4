"""Cluster bootstrap of an AUC and of a paired difference, for patches of one slide, which are not independent.

A cluster is a slide or a stain group. Whole clusters are drawn with replacement (Field & Welsh 2007), 2,000 times with a fixed
seed, so that all runs are compared on the same draws. An interval is the value plus and minus the SD over draws times the
quantile of Student's t with (clusters - 1) degrees of freedom.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pcam_kaggle.scoring.metrics import Difference, Estimate, Floats, Labels, Unit, auc, positive_mask

DRAWS = 2000
# A matrix of clusters x clusters takes 0.2 GB at this size.
MAX_CLUSTERS = 5_000
Codes = NDArray[np.integer]


def bootstrap_interval(labels: Labels, clusters: Codes, scores: Floats, level: float = 0.95, unit: Unit = "slide") -> Estimate:
    """Return an AUC with its bootstrap interval at `level`, clipped to [0, 1].

    The interval is undefined as in `bootstrap_difference`, and for more than 5,000 clusters.

    Args:
        labels: (n,), 0 or 1.
        clusters: (n,), any integer codes.
        scores: (n,).
        level: Coverage, in (0, 1).
        unit: What a cluster is called.

    Raises:
        ValueError: As in `auc`.
    """
    codes, count, too_many = _encode(clusters, unit)
    if too_many:
        return Estimate.from_error(auc(labels, scores), np.nan, stats.norm(), level, unit, count, too_many)
    value, error, undefined = _bootstrap(labels, codes, concordant_pairs(labels, codes, scores), unit)
    return Estimate.from_error(value, error, stats.t(count - 1), level, unit, count, undefined)


def bootstrap_difference(
    labels: Labels, clusters: Codes, first: Floats, second: Floats, level: float = 0.95, unit: Unit = "slide"
) -> Difference:
    """Return AUC(first) - AUC(second) with its paired bootstrap interval at `level` and p.

    Interval and p are undefined where fewer than two clusters have positives, or negatives: that class would be the same in
    every draw and its variance would be missing. They are also undefined where the draws do not vary but the difference is
    not zero.

    Args:
        labels: (n,), 0 or 1.
        clusters: (n,), codes from 0.
        first: `concordant_pairs` of the first scores, (clusters, clusters).
        second: The same of the second scores.
        level: Coverage, in (0, 1).
        unit: What a cluster is called.
    """
    value, error, undefined = _bootstrap(labels, clusters, first - second, unit)
    return Difference.from_error(value, error, stats.t(len(first) - 1), level, unit, len(first), undefined)


def bootstrap_test(labels: Labels, clusters: Codes, baseline: Floats, unit: Unit) -> Callable[[Floats], Difference]:
    """Return the function that computes `bootstrap_difference` of scores and `baseline`, both (n,).

    `clusters` (n,) are any integer codes; with more than 5,000 distinct ones, interval and p are undefined.
    """
    codes, count, too_many = _encode(clusters, unit)
    if too_many:
        area = auc(labels, baseline)
        return lambda scores: Difference.from_error(
            auc(labels, scores) - area, np.nan, stats.norm(), 0.95, unit, count, too_many
        )
    pairs = concordant_pairs(labels, codes, baseline)
    return lambda scores: bootstrap_difference(labels, codes, concordant_pairs(labels, codes, scores), pairs, unit=unit)


def concordant_pairs(labels: Labels, clusters: Codes, scores: Floats) -> Floats:
    """Count the pairs of a positive of cluster i and a negative of cluster j that `scores` order correctly; ties count 1/2.

    The AUC of any multiset of clusters is a quadratic form of this matrix, so that a draw needs no sorting.

    Args:
        labels: (n,), 0 or 1.
        clusters: (n,), codes from 0.
        scores: (n,).

    Returns:
        Counts, (clusters, clusters).

    Raises:
        ValueError: As in `auc`.
    """
    positive = positive_mask(labels, scores)
    if np.isnan(scores).any():
        raise ValueError("a score is NaN and cannot be ranked")
    count = int(clusters.max()) + 1
    order = np.argsort(scores[~positive])
    ranked, of_negatives = scores[~positive][order], clusters[~positive][order]
    below = np.searchsorted(ranked, scores[positive], "left")
    up_to = np.searchsorted(ranked, scores[positive], "right")
    of_positives = clusters[positive]
    by_cluster = np.argsort(of_positives, kind="stable")
    bounds = np.searchsorted(of_positives[by_cluster], np.arange(count + 1))
    pairs = np.zeros((count, count))
    for cluster in range(count):
        own = by_cluster[bounds[cluster] : bounds[cluster + 1]]
        reach = np.bincount(np.concatenate([below[own], up_to[own]]), minlength=len(ranked) + 1)
        # A positive is above the k-th negative unless its insertion point is at or before k.
        above = len(own) - reach[:-1].cumsum() / 2
        pairs[cluster] = np.bincount(of_negatives, weights=above, minlength=count)
    return pairs


def _encode(clusters: Codes, unit: Unit) -> tuple[Codes, int, str]:
    """Return `clusters` (n,) as codes from 0, their number, and the reason why they are too many, or ""."""
    found, codes = np.unique(clusters, return_inverse=True)
    too_many = len(found) > MAX_CLUSTERS
    return codes, len(found), f"{len(found):,} {unit}s, more than the {MAX_CLUSTERS:,} that can be drawn" if too_many else ""


def _bootstrap(labels: Labels, clusters: Codes, pairs: Floats, unit: Unit) -> tuple[float, float, str]:
    """Return the sum of `pairs` (clusters, clusters) as a fraction of all pairs, its SD over draws, or the reason for none."""
    counts = {
        kind: np.bincount(clusters[labels == label], minlength=len(pairs)).astype(np.float64)
        for kind, label in (("positive", 1), ("negative", 0))
    }
    positives, negatives = counts.values()
    value = float(pairs.sum() / (positives.sum() * negatives.sum()))
    for kind, per_cluster in counts.items():
        if np.count_nonzero(per_cluster) < 2:
            return value, np.nan, f"a single {unit} with {kind} patches"
    draws = _draws(len(pairs)).astype(np.float64)
    total = (draws @ positives) * (draws @ negatives)
    # With at least two clusters of each class, most draws have both classes.
    draws, total = draws[total > 0], total[total > 0]
    drawn = ((draws @ pairs) * draws).sum(axis=1) / total
    return value, float(drawn.std(ddof=1)), ""


@lru_cache(maxsize=8)
def _draws(clusters: int) -> NDArray[np.uint16]:
    """Return how often each cluster is drawn, (draws, clusters)."""
    even = np.full(clusters, 1 / clusters)
    return np.random.default_rng(0).multinomial(clusters, even, DRAWS).astype(np.uint16)
