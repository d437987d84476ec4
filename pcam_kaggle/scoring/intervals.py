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
        """Return the clusters of `ids` (n,) in `groups` (id, wsi), None for patches; an id that it lacks is a cluster."""
        if groups is None:
            if unit != "patch":
                raise ValueError(f"patches of one {unit} are not independent; pass its groups")
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
    """Return the AUC of `scores` (n,) with its 95 % interval, clipped to [0, 1].

    DeLong's interval is undefined where a class has a single member, as in R's pROC, and where the estimated variance is zero
    (perfect separation, or all scores tied), where pROC warns that an interval of zero width is misleading. That over clusters
    is undefined for more than 5,000 of them, and where fewer than two have positives, or negatives: that class would be the
    same in every draw. Raises ValueError as `auc` does.
    """
    if clusters.codes is None:
        of_positives, of_negatives = placements(labels, np.stack([scores]))
        error, undefined = _delong_error(of_positives, of_negatives)
        return Estimate.from_error(float(of_positives.mean(axis=1)[0]), error, stats.norm(), "patch", len(labels), undefined)
    codes, count, too_many = _encode(clusters.codes, clusters.unit)
    if too_many:
        value, error, undefined = auc(labels, scores), np.nan, too_many
    else:
        value, error, undefined = _bootstrap(labels, codes, concordant_pairs(labels, codes, scores), clusters.unit)
    return Estimate.from_error(value, error, stats.t(count - 1), clusters.unit, count, undefined)


def paired_test(labels: Labels, baseline: Floats, clusters: Clusters = PATCHES) -> Callable[[Floats], Difference]:
    """Return the function that computes AUC(scores) - AUC(baseline), both (n,) on the same patches, with interval and p.

    These are undefined as in `interval`, unless both the difference and its estimated variance are zero. Raises ValueError as
    `auc` does.
    """
    if clusters.codes is None:
        return lambda scores: _delong_difference(labels, scores, baseline)
    codes, count, too_many = _encode(clusters.codes, clusters.unit)
    pairs = None if too_many else concordant_pairs(labels, codes, baseline)

    def difference(scores: Floats) -> Difference:
        if pairs is None:
            value, error, undefined = auc(labels, scores) - auc(labels, baseline), np.nan, too_many
        else:
            change = concordant_pairs(labels, codes, scores) - pairs
            value, error, undefined = _bootstrap(labels, codes, change, clusters.unit)
        return Difference.from_error(value, error, stats.t(count - 1), clusters.unit, count, undefined)

    return difference


def _delong_difference(labels: Labels, first: Floats, second: Floats) -> Difference:
    of_positives, of_negatives = placements(labels, np.stack([first, second]))
    areas = of_positives.mean(axis=1)
    # The variance of the paired differences; var + var - 2 cov would lose a small one to rounding.
    error, undefined = _delong_error(of_positives[:1] - of_positives[1:], of_negatives[:1] - of_negatives[1:])
    return Difference.from_error(float(areas[0] - areas[1]), error, stats.norm(), "patch", len(labels), undefined)


def _delong_error(of_positives: Floats, of_negatives: Floats) -> tuple[float, str]:
    """Return the standard error of an AUC or a difference (DeLong et al. 1988), NaN and the reason for a class of one patch.

    It is computed from `placements`, (1, positives) and (1, negatives), by midranks (Sun & Xu 2014, algorithm 2).
    """
    variance = 0.0
    for kind, components in (("positive", of_positives), ("negative", of_negatives)):
        if components.shape[1] == 1:
            return np.nan, f"a single {kind} patch"
        variance += float(np.cov(components)) / components.shape[1]
    return float(np.sqrt(variance)), ""


def concordant_pairs(labels: Labels, clusters: Codes, scores: Floats) -> Floats:
    """Count the pairs of a positive of cluster i and a negative of cluster j that `scores` order correctly; ties count 1/2.

    The AUC of any multiset of clusters is a quadratic form of this matrix (clusters, clusters), so that a draw needs no
    sorting. `labels` (n,) are 0 or 1, `clusters` (n,) codes from 0, `scores` (n,). Raises ValueError as `auc` does.
    """
    positive = positive_mask(labels, scores)
    if np.isnan(scores).any():
        raise ValueError("a score is NaN and cannot be ranked")
    count = int(clusters.max()) + 1
    order = np.argsort(scores[~positive])
    ranked, of_negatives = scores[~positive][order], clusters[~positive][order]
    below, up_to = (np.searchsorted(ranked, scores[positive], side) for side in ("left", "right"))
    of_positives = clusters[positive]
    pairs = np.zeros((count, count))
    for cluster in range(count):
        own = of_positives == cluster
        reach = np.bincount(np.concatenate([below[own], up_to[own]]), minlength=len(ranked) + 1)
        # A positive is above the k-th negative unless its insertion point is at or before k.
        above = own.sum() - reach[:-1].cumsum() / 2
        pairs[cluster] = np.bincount(of_negatives, weights=above, minlength=count)
    return pairs


def _encode(codes: Codes, unit: Unit) -> tuple[Codes, int, str]:
    """Return `codes` (n,) as numbers from 0, how many there are, and the reason why they are too many, or ""."""
    found, numbers = np.unique(codes, return_inverse=True)
    reason = f"{len(found):,} {unit}s, more than the {MAX_CLUSTERS:,} that can be drawn"
    return numbers, len(found), reason if len(found) > MAX_CLUSTERS else ""


def _bootstrap(labels: Labels, clusters: Codes, pairs: Floats, unit: Unit) -> tuple[float, float, str]:
    """Return the sum of `pairs` (clusters, clusters) as a fraction of all pairs, its SD over draws, or the reason for none."""
    negatives, positives = (np.bincount(clusters[labels == k], minlength=len(pairs)).astype(np.float64) for k in (0, 1))
    value = float(pairs.sum() / (positives.sum() * negatives.sum()))
    for kind, per_cluster in (("positive", positives), ("negative", negatives)):
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
