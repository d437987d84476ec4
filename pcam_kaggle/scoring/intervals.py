"""Confidence intervals and paired tests of AUCs: DeLong's for independent patches, the cluster bootstrap for others.

A cluster is a slide or a stain group, whose patches are not independent. Whole clusters are drawn with replacement (Field &
Welsh 2007), 2,000 times with a fixed seed, so that all runs are compared on the same draws. An interval is the value plus and
minus the SD over draws times the quantile of Student's t with (clusters - 1) degrees of freedom.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.scoring.metrics import Floats, Labels, auc, placements, positive_mask
from pcam_kaggle.scoring.results import Difference, Estimate, Unit

DRAWS = 2000
# A matrix of clusters x clusters takes 0.2 GB at this size.
MAX_CLUSTERS = 5_000
UNITS: dict[str, Unit] = {"stratified": "patch", "slides": "slide", "stain": "stain group"}
Codes = NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Clusters:
    """What intervals and tests resample: the clusters with these `codes` (n,), or patches where `codes` is None."""

    unit: Unit = "patch"
    codes: Codes | None = None

    @classmethod
    def of(cls, ids: pd.Series, groups: pd.DataFrame | None, unit: Unit) -> Self:
        """Return the clusters of `ids` (n,) in `groups` (id, wsi); a patch that `groups` lacks is a cluster of its own.

        Raises:
            ValueError: `groups` is None although patches of one unit are not independent.
        """
        if groups is None and unit != "patch":
            raise ValueError(f"patches of one {unit} are not independent; pass its groups")
        if groups is None:
            return cls()
        return cls(unit, pd.factorize(ids.map(groups.set_index("id")["wsi"]).fillna(ids))[0])

    def part(self, inside: NDArray[np.bool_]) -> Self:
        """Return the clusters of the patches where `inside` (n,) is true."""
        return type(self)(self.unit, None if self.codes is None else self.codes[inside])


PATCHES = Clusters()


def unit_of(scheme: str) -> Unit:
    """Return the unit of the fold scheme `scheme`, such as `slides_5_42`; raises UserError if it is not one."""
    kind = scheme.partition("_")[0]
    if kind not in UNITS:
        raise UserError(f"{scheme!r} is not a fold scheme; its name must begin with {', '.join(UNITS)}")
    return UNITS[kind]


def interval(labels: Labels, scores: Floats, clusters: Clusters = PATCHES) -> Estimate:
    """Return the AUC of `scores` (n,) with its 95 % interval; `labels` and the codes of `clusters` are (n,).

    The interval over clusters is undefined as in `paired_test`.

    Raises:
        ValueError: As in `auc`.
    """
    if clusters.codes is None:
        return delong_interval(labels, scores)
    codes, count, too_many = _encode(clusters.codes, clusters.unit)
    if too_many:
        value, error, undefined = auc(labels, scores), np.nan, too_many
    else:
        value, error, undefined = _bootstrap(labels, codes, concordant_pairs(labels, codes, scores), clusters.unit)
    return Estimate.from_error(value, error, stats.t(count - 1), clusters.unit, count, undefined)


def paired_test(labels: Labels, baseline: Floats, clusters: Clusters = PATCHES) -> Callable[[Floats], Difference]:
    """Return the function that tests AUC(scores) - AUC(baseline), both (n,) on the same patches.

    Interval and p over clusters are undefined for more than 5,000 of them, where fewer than two have positives, or negatives
    (that class would be the same in every draw), and where the draws do not vary but the difference is not zero.
    """
    if clusters.codes is None:
        return lambda scores: delong_difference(labels, scores, baseline)
    unit = clusters.unit
    codes, count, too_many = _encode(clusters.codes, unit)
    pairs = None if too_many else concordant_pairs(labels, codes, baseline)

    def difference(scores: Floats) -> Difference:
        if pairs is None:
            value, error, undefined = auc(labels, scores) - auc(labels, baseline), np.nan, too_many
        else:
            value, error, undefined = _bootstrap(labels, codes, concordant_pairs(labels, codes, scores) - pairs, unit)
        return Difference.from_error(value, error, stats.t(count - 1), unit, count, undefined)

    return difference


def delong(labels: Labels, scores: Floats) -> tuple[Floats, Floats]:
    """Return the AUCs (k,) of `scores` (k, n) and their covariance (k, k) (DeLong et al. 1988).

    Computed from midranks in O(n log n) (Sun & Xu 2014, algorithm 2). The covariance is NaN where a class has a single member.

    Raises:
        ValueError: As in `auc`.
    """
    of_positives, of_negatives = placements(labels, scores)
    covariance = _covariance(of_positives) / of_positives.shape[1] + _covariance(of_negatives) / of_negatives.shape[1]
    return of_positives.mean(axis=1), covariance


def delong_interval(labels: Labels, scores: Floats) -> Estimate:
    """Return the AUC of `scores` (n,) with DeLong's interval, clipped to [0, 1].

    The interval is undefined where a class has a single member, as in R's pROC, and where the estimated variance is zero
    (perfect separation, or all scores tied), where pROC warns that an interval of zero width is misleading.

    Raises:
        ValueError: As in `auc`.
    """
    areas, covariance = delong(labels, np.stack([scores]))
    error = float(np.sqrt(covariance[0, 0]))
    return Estimate.from_error(float(areas[0]), error, stats.norm(), "patch", len(labels), _single_member(labels))


def delong_difference(labels: Labels, first: Floats, second: Floats) -> Difference:
    """Return AUC(first) - AUC(second) on the same patches, (n,) each, with DeLong's paired interval and p.

    Interval and p are undefined where a class has a single member, and where the estimated variance is zero but the
    difference is not.

    Raises:
        ValueError: As in `auc`.
    """
    of_positives, of_negatives = placements(labels, np.stack([first, second]))
    areas = of_positives.mean(axis=1)
    # The variance of the paired differences; var + var - 2 cov would lose a small one to rounding.
    variance = sum(_covariance(part[:1] - part[1:])[0, 0] / part.shape[1] for part in (of_positives, of_negatives))
    value, error = float(areas[0] - areas[1]), float(np.sqrt(variance))
    return Difference.from_error(value, error, stats.norm(), "patch", len(labels), _single_member(labels))


def concordant_pairs(labels: Labels, clusters: Codes, scores: Floats) -> Floats:
    """Count the pairs of a positive of cluster i and a negative of cluster j that `scores` order correctly; ties count 1/2.

    The AUC of any multiset of clusters is a quadratic form of this matrix (clusters, clusters), so that a draw needs no
    sorting. `labels` (n,) are 0 or 1, `clusters` (n,) codes from 0, `scores` (n,).

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


def _single_member(labels: Labels) -> str:
    """Return the reason why DeLong's variance is undefined for `labels`, or ""."""
    positives = int(np.sum(labels))
    for kind, count in (("positive", positives), ("negative", len(labels) - positives)):
        if count == 1:
            return f"a single {kind} patch"
    return ""


def _covariance(components: Floats) -> Floats:
    if components.shape[1] < 2:
        return np.full((len(components), len(components)), np.nan)
    return np.atleast_2d(np.cov(components))


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
