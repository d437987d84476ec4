"""Confidence intervals and simultaneous paired tests of AUCs: DeLong's for independent patches, or the cluster bootstrap.

A cluster is a slide or a stain group, whose patches are not independent. Whole clusters are drawn with replacement (Field &
Welsh 2007), 2,000 times with a fixed seed, so that all runs are compared on the same draws. An interval is the value plus and
minus its standard error times the quantile of Student's t with (clusters - 1) degrees of freedom, of the normal distribution
for patches. Differences that are tested together have intervals that hold simultaneously: the quantile is that of their largest
|t| (Hothorn, Bretz & Westfall 2008), whose distribution is drawn from the covariance matrix of all AUCs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.scoring.metrics import Floats, Labels, auc, placements, positive_mask
from pcam_kaggle.scoring.results import LEVEL, ROUNDING, Difference, Estimate, Family, Unit

DRAWS, DRAWS_OF_LARGEST = 2000, 100_000
# A matrix of clusters x clusters takes 0.2 GB at this size.
MAX_CLUSTERS = 5_000
UNITS: dict[str, Unit] = {"stratified": "patch", "slides": "slide", "stain": "stain group"}
UNITS |= {"given": "patch", "grouped": "slide"}
Codes = NDArray[np.integer]
# Indices of two runs, the first of which is compared with the second.
Pair = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Clusters:
    """What intervals and tests resample: the clusters with these `codes` (n,), or patches where `codes` is None."""

    unit: Unit = "patch"
    codes: Codes | None = None

    @classmethod
    def of(cls, ids: pd.Series, groups: pd.DataFrame | None, unit: Unit) -> Self:
        """Return the clusters of `ids` (n,) in `groups` (id, wsi), None for patches; an id that it lacks is a cluster."""
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


@dataclass(frozen=True, slots=True)
class JointAucs:
    """The `areas` (k,) of k runs on the same patches, with the covariance DDᵀ of their estimates, D being `deviations` (k, r).

    An AUC divided by its standard error has `df` degrees of freedom, infinitely many for patches; it is of `units` units.
    Where `undefined` gives the reason, there is no covariance.
    """

    areas: Floats
    deviations: Floats
    df: float
    unit: Unit
    units: int
    undefined: str


def joint_aucs(labels: Labels, scores: Floats, clusters: Clusters = PATCHES) -> JointAucs:
    """Return the AUCs of `scores` (k, n) with their covariance; raises ValueError as `auc` does.

    DeLong's is undefined where a class has a single member, as in R's pROC. That over clusters is undefined for more than 5,000
    of them, and where fewer than two have positives, or negatives: that class would be the same in every draw.
    """
    return _delong(labels, scores) if clusters.codes is None else _bootstrap(labels, scores, clusters.codes, clusters.unit)


def interval(labels: Labels, scores: Floats, clusters: Clusters = PATCHES) -> Estimate:
    """Return the AUC of `scores` (n,) with its 95 % interval, clipped to [0, 1].

    It is undefined as in `joint_aucs`, and where the estimated variance is zero (perfect separation, or all scores tied), where
    pROC warns that an interval of zero width is misleading. Raises ValueError as `auc` does.
    """
    joint = joint_aucs(labels, np.stack([scores]), clusters)
    critical = float(stats.t(joint.df).ppf((1 + LEVEL) / 2))
    error = np.nan if joint.undefined else float(np.linalg.norm(joint.deviations[0]))
    return Estimate.from_error(float(joint.areas[0]), error, critical, joint.unit, joint.units, joint.undefined)


def family_of(baseline: str | None) -> Family:
    """Return which differences are tested together where the baseline was named, or else chosen by its AUC."""
    return "baseline" if baseline else "all pairs"


def compare_aucs(joint: JointAucs, family: Family) -> tuple[list[Difference], list[int]]:
    """Return the differences of all other runs to the first one, and which runs may be the best, none beside a baseline.

    The differences of `family` are tested together.
    """
    count = len(joint.areas)
    pairs = pairs_to_test(count, family)
    differences = simultaneous_differences(joint, pairs)
    return differences[: count - 1], not_worse(count, pairs, differences) if family == "all pairs" else []


def pairs_to_test(count: int, family: Family) -> list[Pair]:
    """Return the pairs among `count` runs that are tested together: all with the first one, followed by any others.

    A first run that was named beforehand makes the family `baseline` (Dunnett 1955). One that was chosen by its AUC may be any
    run, so that `all pairs` are tested.
    """
    pairs = [(later, earlier) for earlier, later in itertools.combinations(range(count), 2)]
    return pairs if family == "all pairs" else pairs[: count - 1]


def not_worse(count: int, pairs: Sequence[Pair], differences: Sequence[Difference]) -> list[int]:
    """Return which of `count` runs may be the best: those not significantly worse than another one in any of `pairs`.

    The best run is among them with a confidence of at least 95 % (Hsu 1981). Since `differences` are those of all pairs, a run
    that is as good as all others is left out in at most 5 % of cases, too.
    """
    worse = {pair[made.value > 0] for pair, made in zip(pairs, differences, strict=True) if made.is_significant}
    return [run for run in range(count) if run not in worse]


def simultaneous_differences(joint: JointAucs, pairs: Sequence[Pair]) -> list[Difference]:
    """Return the difference of the AUCs of each of `pairs`, with intervals and corrected p-values that hold for all at once."""
    # The norms of paired differences; var + var - 2 cov would lose a small variance to rounding.
    norms = [float(np.linalg.norm(joint.deviations[run] - joint.deviations[other])) for run, other in pairs]
    errors = [np.nan] * len(pairs) if joint.undefined else norms
    tested = [(pair, error) for pair, error in zip(pairs, errors, strict=True) if error >= ROUNDING]
    marginal, count, largest = stats.t(joint.df), max(1, len(tested)), _largest_statistics(joint, tested)
    # Between that of a single test and Bonferroni's, which are equal for one.
    bounds = marginal.ppf([(1 + LEVEL) / 2, 1 - (1 - LEVEL) / (2 * count)])
    critical = float(np.clip(np.quantile(largest, LEVEL), *bounds))
    found = []
    for (run, other), error in zip(pairs, errors, strict=True):
        value = float(joint.areas[run] - joint.areas[other])
        made = Difference.from_error(value, error, critical, joint.unit, joint.units, joint.undefined)
        if error >= ROUNDING:
            p = float(2 * marginal.sf(abs(value) / error))
            as_large = (1 + np.count_nonzero(largest >= abs(value) / error)) / (1 + len(largest))
            corrected = float(np.clip(as_large, p, min(1.0, count * p)))
            made = made.model_copy(update={"error": error, "p": p, "corrected_p": corrected})
        found.append(made)
    return found


def _largest_statistics(joint: JointAucs, tested: Sequence[tuple[Pair, float]]) -> Floats:
    """Return draws of the largest |t| of pairs with their standard errors, where all runs are equal; zeros for no pair."""
    rng, largest = np.random.default_rng(0), np.zeros(DRAWS_OF_LARGEST)
    if tested:
        values, vectors = np.linalg.eigh(joint.deviations @ joint.deviations.T)
        normal = (vectors * np.sqrt(values.clip(min=0))) @ rng.standard_normal((len(values), DRAWS_OF_LARGEST))
        if np.isfinite(joint.df):
            normal /= np.sqrt(rng.chisquare(joint.df, DRAWS_OF_LARGEST) / joint.df)
        for (run, other), error in tested:
            np.maximum(largest, np.abs(normal[run] - normal[other]) / error, out=largest)
    return largest


def _delong(labels: Labels, scores: Floats) -> JointAucs:
    """Return the AUCs with DeLong's covariance (DeLong et al. 1988), by midranks (Sun & Xu 2014, algorithm 2)."""
    of_positives, of_negatives = placements(labels, scores)
    parts, undefined = [], ""
    for kind, components in (("positive", of_positives), ("negative", of_negatives)):
        count = components.shape[1]
        undefined = undefined or (f"a single {kind} patch" if count == 1 else "")
        parts.append((components - components.mean(axis=1, keepdims=True)) / np.sqrt(count * max(1, count - 1)))
    return JointAucs(of_positives.mean(axis=1), np.concatenate(parts, axis=1), np.inf, "patch", len(labels), undefined)


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


def _bootstrap(labels: Labels, scores: Floats, codes: Codes, unit: Unit) -> JointAucs:
    """Return the AUCs with their covariance over draws of the clusters with these `codes` (n,)."""
    areas = np.array([auc(labels, row) for row in scores])
    found, clusters = np.unique(codes, return_inverse=True)
    count = len(found)
    undefined = f"{count:,} {unit}s, more than the {MAX_CLUSTERS:,} that can be drawn" if count > MAX_CLUSTERS else ""
    negatives, positives = (np.bincount(clusters[labels == k], minlength=count).astype(np.float64) for k in (0, 1))
    for kind, per_cluster in (("positive", positives), ("negative", negatives)):
        if np.count_nonzero(per_cluster) < 2:
            undefined = undefined or f"a single {unit} with {kind} patches"
    if undefined:
        return JointAucs(areas, np.empty((len(scores), 0)), count - 1, unit, count, undefined)
    draws = _draws(count).astype(np.float64)
    total = (draws @ positives) * (draws @ negatives)
    # With at least two clusters of each class, most draws have both classes.
    draws, total = draws[total > 0], total[total > 0]
    drawn = np.stack([((draws @ concordant_pairs(labels, clusters, row)) * draws).sum(axis=1) / total for row in scores])
    deviations = (drawn - drawn.mean(axis=1, keepdims=True)) / np.sqrt(len(total) - 1)
    return JointAucs(areas, deviations, count - 1, unit, count, "")


@lru_cache(maxsize=8)
def _draws(clusters: int) -> NDArray[np.uint16]:
    """Return how often each cluster is drawn, (draws, clusters)."""
    even = np.full(clusters, 1 / clusters)
    return np.random.default_rng(0).multinomial(clusters, even, DRAWS).astype(np.uint16)
