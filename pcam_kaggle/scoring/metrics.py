"""ROC AUC with its variance and paired differences: DeLong's over patches, and a bootstrap over slides."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DRAWS = 2000
# The bootstrap holds a square of the slides: 0.2 GB.
MOST_SLIDES = 5_000
# Below any standard error that is not zero (one pair of 10^12 in another order makes 1e-12), above the rounding of one that is.
ROUNDING = 1e-14
Floats = NDArray[np.float64]
Codes = NDArray[np.integer]
Unit = Literal["patch", "slide", "stain group"]


class Difference(NamedTuple):
    """A paired difference of two AUCs, the ends of its confidence interval, its standard error, and p for no difference.

    `unit` is what counts as an independent observation, `units` their number. Where the variance can't be estimated, ends,
    error and p are NaN, and `undefined` says why.
    """

    value: float
    low: float
    high: float
    error: float
    p: float
    unit: Unit
    units: int
    undefined: str = ""


class Estimate(NamedTuple):
    """An AUC with the ends of its confidence interval; `unit`, `units` and `undefined` as in `Difference`."""

    value: float
    low: float
    high: float
    unit: Unit
    units: int
    undefined: str = ""


def json_fields(made: Difference | Estimate) -> dict[str, Any]:
    """Return the fields of `made` by name as JSON holds them: what is undefined is None."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in made._asdict().items()}


def interval_text(low: float | None, high: float | None, undefined: str, form: str = ".4f") -> str:
    """Return an interval as text, its ends formatted by `form`; where it is `undefined`, "n/a" with that reason."""
    return f"[n/a ({undefined})]" if undefined else f"[{low:{form}}, {high:{form}}]"


def midranks(values: Floats) -> Floats:
    """Return the 1-based ranks of `values`, shape (n,), ties sharing their mean rank; raises ValueError on NaN."""
    if np.isnan(values).any():
        raise ValueError("a score is NaN, which has no rank")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def auc(labels: NDArray[np.integer], scores: Floats) -> float:
    """Return the area under the ROC curve of `scores` (n,) for `labels` (n,) of 0 and 1, a tie counting half.

    Raises ValueError where either class is absent, a label is neither 0 nor 1, a score is NaN, or the shapes differ.
    """
    of_positives, _ = _placements(labels, np.stack([scores]))
    return float(of_positives.mean(axis=1)[0])


def delong(labels: NDArray[np.integer], scores: Floats) -> tuple[Floats, Floats]:
    """Return the AUC of each row of `scores` (k, n), shape (k,), and their covariance, shape (k, k).

    DeLong et al. 1988, computed from midranks in O(n log n) (Sun & Xu 2014, algorithm 2). The covariance of a class with a
    single member is NaN. Raises ValueError as `auc`.
    """
    of_positives, of_negatives = _placements(labels, scores)
    covariance = _covariance(of_positives) / of_positives.shape[1] + _covariance(of_negatives) / of_negatives.shape[1]
    return of_positives.mean(axis=1), covariance


def auc_interval(labels: NDArray[np.integer], scores: Floats, level: float = 0.95) -> Estimate:
    """Return the AUC of `scores` (n,) with DeLong's interval at `level`, cut to [0, 1]; raises ValueError as `auc`.

    The interval is undefined where a class has a single member, as in R's pROC, and where the estimated variance is zero
    (all positives score alike against all negatives), where pROC warns that an interval of no width is misleading.
    """
    areas, covariance = delong(labels, np.stack([scores]))
    return _estimate(
        float(areas[0]), float(np.sqrt(covariance[0, 0])), stats.norm(), level, "patch", len(labels), _lone(labels)
    )


def auc_difference(labels: NDArray[np.integer], first: Floats, second: Floats, level: float = 0.95) -> Difference:
    """Return AUC(first) - AUC(second), both (n,) on the same patches, with DeLong's paired interval at `level` and p.

    Interval and p are undefined where a class has a single member, and where the estimated variance is zero and the
    difference is not. Raises ValueError as `auc`.
    """
    of_positives, of_negatives = _placements(labels, np.stack([first, second]))
    areas = of_positives.mean(axis=1)
    # The variance of a difference, taken from the differences: subtracting covariances would round a small one away.
    variance = sum(_covariance(part[:1] - part[1:])[0, 0] / part.shape[1] for part in (of_positives, of_negatives))
    error = float(np.sqrt(variance))
    return _difference(float(areas[0] - areas[1]), error, stats.norm(), level, "patch", len(labels), _lone(labels))


def slide_interval(
    labels: NDArray[np.integer], slides: Codes, scores: Floats, level: float = 0.95, unit: Unit = "slide"
) -> Estimate:
    """Return the AUC of `scores` (n,) with its interval at `level`, cut to [0, 1], by the bootstrap of `slide_difference`.

    `slides` (n,) are any codes. The interval is undefined as that of `slide_difference`, and over more than 5,000 slides.
    """
    codes, count, many = _coded(slides, unit)
    if many:
        return _estimate(auc(labels, scores), np.nan, stats.norm(), level, unit, count, many)
    value, error, undefined = _bootstrap(labels, codes, slide_pairs(labels, codes, scores), unit)
    return _estimate(value, error, stats.t(count - 1), level, unit, count, undefined)


def slide_difference(
    labels: NDArray[np.integer], slides: Codes, first: Floats, second: Floats, level: float = 0.95, unit: Unit = "slide"
) -> Difference:
    """Return the difference of two AUCs as `auc_difference`, for patches (n,) of one slide that are not independent.

    `first` and `second` are the `slide_pairs` of the two scores. Slides, not patches, are drawn with replacement, 2,000 times
    with a fixed seed: a paired cluster bootstrap (Field & Welsh 2007). The interval is the difference plus and minus the
    draws' SD times the quantile of Student's t with one degree of freedom less than slides. `slides` are codes from 0.

    Interval and p are undefined where fewer than two slides hold positives, or negatives: the bootstrap would then hold that
    class fixed and leave its variance out. So they are where the draws do not vary and the difference is not zero.
    """
    value, error, undefined = _bootstrap(labels, slides, first - second, unit)
    return _difference(value, error, stats.t(len(first) - 1), level, unit, len(first), undefined)


def paired_test(
    labels: NDArray[np.integer], baseline: Floats, slides: Codes | None, unit: Unit = "slide"
) -> Callable[[Floats], Difference]:
    """Return the function that tests AUC(scores) - AUC(baseline), both (n,) on the same patches.

    By `auc_difference` where `slides` is None, else by `slide_difference`, where `slides` (n,) are any codes; over more than
    5,000 of them interval and p are undefined.
    """
    if slides is None:
        return lambda scores: auc_difference(labels, scores, baseline)
    codes, count, many = _coded(slides, unit)
    if many:
        area = auc(labels, baseline)
        return lambda scores: _difference(auc(labels, scores) - area, np.nan, stats.norm(), 0.95, unit, count, many)
    pairs = slide_pairs(labels, codes, baseline)
    return lambda scores: slide_difference(labels, codes, slide_pairs(labels, codes, scores), pairs, unit=unit)


def slide_pairs(labels: NDArray[np.integer], slides: Codes, scores: Floats) -> Floats:
    """Return how many pairs of a positive of slide i and a negative of slide j are in order, ties half: (slides, slides).

    The AUC of any multiset of slides is a quadratic form of this, so that a draw of the bootstrap costs no sorting. Raises
    ValueError as `auc`.
    """
    positive = _positive(labels, scores)
    if np.isnan(scores).any():
        raise ValueError("a score is NaN, which has no rank")
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
    """Return the p values (k,), corrected for their number (Holm 1979): the chance of any false one stays below the level.

    An undefined one, NaN, is no test: it stays NaN, and the others are corrected for their own number.
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def _positive(labels: NDArray[np.integer], scores: Floats) -> NDArray[np.bool_]:
    """Return which `labels` (n,) are 1; raises ValueError where they or the shape of `scores` (..., n) are not as in `auc`."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or scores.shape[-1:] != labels.shape:
        raise ValueError(f"labels of shape {labels.shape} do not fit scores of shape {scores.shape}")
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise ValueError("a label is neither 0 nor 1")
    if positive.all() or not positive.any():
        raise ValueError("an AUC needs labels of both kinds")
    return positive


def _placements(labels: NDArray[np.integer], scores: Floats) -> tuple[Floats, Floats]:
    """Return per row of `scores` (k, n) the share of negatives below each positive and of positives above each negative.

    Shapes (k, positives) and (k, negatives); ties count half. These are the structural components of DeLong et al. 1988.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {scores.shape} are not rows of patches")
    positive = _positive(labels, scores)
    m, n = int(positive.sum()), int((~positive).sum())
    of_positives = np.empty((len(scores), m))
    of_negatives = np.empty((len(scores), n))
    for row, values in enumerate(scores):
        ranks = midranks(values)
        of_positives[row] = (ranks[positive] - midranks(values[positive])) / n
        of_negatives[row] = 1 - (ranks[~positive] - midranks(values[~positive])) / m
    return of_positives, of_negatives


def _lone(labels: NDArray[np.integer]) -> str:
    """Return why DeLong's variance is undefined for `labels`, "" where it is not."""
    positives = int(np.sum(labels))
    few = [word for word, count in (("positive", positives), ("negative", len(labels) - positives)) if count == 1]
    return f"a single {few[0]} patch" if few else ""


def _coded(slides: Codes, unit: Unit) -> tuple[Codes, int, str]:
    """Return `slides` (n,) as codes from 0, the number of slides, and why they are too many, "" where they are not."""
    found, codes = np.unique(slides, return_inverse=True)
    many = f"{len(found):,} {unit}s, more than the {MOST_SLIDES:,} that can be drawn" if len(found) > MOST_SLIDES else ""
    return codes, len(found), many


def _bootstrap(labels: NDArray[np.integer], slides: Codes, pairs: Floats, unit: Unit) -> tuple[float, float, str]:
    """Return the sum of `pairs` (slides, slides) as a share of all pairs, its SD over draws of slides, and why it has none."""
    held = {
        kind: np.bincount(slides[labels == label], minlength=len(pairs)).astype(np.float64)
        for kind, label in (("positive", 1), ("negative", 0))
    }
    positives, negatives = held.values()
    value = float(pairs.sum() / (positives.sum() * negatives.sum()))
    for kind, counts in held.items():
        if np.count_nonzero(counts) < 2:
            return value, np.nan, f"a single {unit} with {kind} patches"
    draws = _draws(len(pairs)).astype(np.float64)
    total = (draws @ positives) * (draws @ negatives)
    # With two slides or more of each class, most draws hold both.
    draws, total = draws[total > 0], total[total > 0]
    drawn = ((draws @ pairs) * draws).sum(axis=1) / total
    return value, float(drawn.std(ddof=1)), ""


@lru_cache(maxsize=8)
def _draws(slides: int) -> NDArray[np.uint16]:
    """Return how often each of `slides` is drawn, (draws, slides): the same for all runs that are compared."""
    even = np.full(slides, 1 / slides)
    return np.random.default_rng(0).multinomial(slides, even, DRAWS).astype(np.uint16)


def _difference(
    value: float, error: float, distribution: Any, level: float, unit: Unit, units: int, undefined: str
) -> Difference:
    if error < ROUNDING and abs(value) < ROUNDING:
        return Difference(value, value, value, 0.0, 1.0, unit, units)
    error, undefined = _known(error, undefined)
    half = float(distribution.ppf((1 + level) / 2)) * error
    p = float(2 * distribution.sf(abs(value) / error))
    return Difference(value, value - half, value + half, error, p, unit, units, undefined)


def _estimate(value: float, error: float, distribution: Any, level: float, unit: Unit, units: int, undefined: str) -> Estimate:
    error, undefined = _known(error, undefined)
    half = float(distribution.ppf((1 + level) / 2)) * error
    low, high = np.clip([value - half, value + half], 0, 1).tolist()
    return Estimate(value, low, high, unit, units, undefined)


def _known(error: float, undefined: str) -> tuple[float, str]:
    """Return a standard error, NaN where it is undefined, with the reason: an estimate of zero is no certainty."""
    if error < ROUNDING:
        undefined = "an estimated variance of zero"
    return np.nan if undefined else error, undefined


def _covariance(components: Floats) -> Floats:
    if components.shape[1] < 2:
        return np.full((len(components), len(components)), np.nan)
    return np.atleast_2d(np.cov(components))
