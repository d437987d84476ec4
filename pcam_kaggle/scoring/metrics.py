"""ROC AUC from midranks, and the types of an estimate and of a paired difference with their confidence intervals."""

from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

# Below any standard error that is not zero (one pair of 10^12 in another order gives 1e-12), above its rounding error.
ROUNDING = 1e-14
Floats = NDArray[np.float64]
Labels = NDArray[np.integer]
Unit = Literal["patch", "slide", "stain group"]


class Difference(NamedTuple):
    """A paired difference of two AUCs with its confidence interval, standard error and two-sided p-value.

    `unit` is the independent unit of observation and `units` the number of them. Where the variance cannot be estimated,
    `low`, `high`, `error` and `p` are NaN and `undefined` gives the reason.
    """

    value: float
    low: float
    high: float
    error: float
    p: float
    unit: Unit
    units: int
    undefined: str = ""

    @classmethod
    def from_error(
        cls, value: float, error: float, distribution: Any, level: float, unit: Unit, units: int, undefined: str
    ) -> Self:
        """Return the difference `value` with the interval at `level` and p of a standardized `distribution` (SciPy, frozen)."""
        if error < ROUNDING and abs(value) < ROUNDING:
            return cls(value, value, value, 0.0, 1.0, unit, units)
        error, undefined = _checked_error(error, undefined)
        half = float(distribution.ppf((1 + level) / 2)) * error
        p = float(2 * distribution.sf(abs(value) / error))
        return cls(value, value - half, value + half, error, p, unit, units, undefined)


class Estimate(NamedTuple):
    """An AUC with its confidence interval; `unit`, `units` and `undefined` as in `Difference`."""

    value: float
    low: float
    high: float
    unit: Unit
    units: int
    undefined: str = ""

    @classmethod
    def from_error(
        cls, value: float, error: float, distribution: Any, level: float, unit: Unit, units: int, undefined: str
    ) -> Self:
        """Return the AUC `value` with its interval at `level`, clipped to [0, 1]; arguments as in `Difference.from_error`."""
        error, undefined = _checked_error(error, undefined)
        half = float(distribution.ppf((1 + level) / 2)) * error
        low, high = np.clip([value - half, value + half], 0, 1).tolist()
        return cls(value, low, high, unit, units, undefined)


def json_fields(result: Difference | Estimate) -> dict[str, Any]:
    """Return the fields of `result` by name, with None for NaN, which JSON lacks."""
    return {key: None if isinstance(value, float) and np.isnan(value) else value for key, value in result._asdict().items()}


def interval_text(low: float | None, high: float | None, undefined: str, form: str = ".4f") -> str:
    """Return an interval as text, its ends formatted with `form`; "n/a" and the reason where it is `undefined`."""
    return f"[n/a ({undefined})]" if undefined else f"[{low:{form}}, {high:{form}}]"


def auc(labels: Labels, scores: Floats) -> float:
    """Return the area under the ROC curve; a tie between a positive and a negative counts 1/2.

    Args:
        labels: (n,), 0 or 1.
        scores: (n,), any scale.

    Raises:
        ValueError: A class is absent, a label is neither 0 nor 1, a score is NaN, or the shapes differ.
    """
    of_positives, _ = placements(labels, np.stack([scores]))
    return float(of_positives.mean(axis=1)[0])


def placements(labels: Labels, scores: Floats) -> tuple[Floats, Floats]:
    """Return the structural components of the AUC (DeLong et al. 1988); ties count 1/2.

    Args:
        labels: (n,), 0 or 1.
        scores: (k, n), one row per model.

    Returns:
        The fraction of negatives below each positive, (k, positives), and of positives above each negative, (k, negatives).

    Raises:
        ValueError: As in `auc`.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores of shape {scores.shape} are not rows of patches")
    positive = positive_mask(labels, scores)
    m, n = int(positive.sum()), int((~positive).sum())
    of_positives = np.empty((len(scores), m))
    of_negatives = np.empty((len(scores), n))
    for row, values in enumerate(scores):
        ranks = midranks(values)
        of_positives[row] = (ranks[positive] - midranks(values[positive])) / n
        of_negatives[row] = 1 - (ranks[~positive] - midranks(values[~positive])) / m
    return of_positives, of_negatives


def positive_mask(labels: Labels, scores: Floats) -> NDArray[np.bool_]:
    """Return which of `labels` (n,) are 1, after validating them and the shape of `scores` (..., n).

    Raises:
        ValueError: As in `auc`, except for NaN.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or scores.shape[-1:] != labels.shape:
        raise ValueError(f"labels of shape {labels.shape} do not fit scores of shape {scores.shape}")
    positive = labels == 1
    if not (positive | (labels == 0)).all():
        raise ValueError("a label is neither 0 nor 1")
    if positive.all() or not positive.any():
        raise ValueError("an AUC needs labels of both classes")
    return positive


def midranks(values: Floats) -> Floats:
    """Return the 1-based ranks of `values` (n,); ties get their mean rank.

    Raises:
        ValueError: A value is NaN.
    """
    if np.isnan(values).any():
        raise ValueError("a score is NaN and cannot be ranked")
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def rank_within(groups: NDArray[np.integer], scores: Floats) -> Floats:
    """Return the midrank of each score within its group, divided by the group's size, in (0, 1]; all arrays are (n,)."""
    ranks = np.empty(len(scores))
    for group in np.unique(groups):
        inside = groups == group
        ranks[inside] = midranks(scores[inside]) / inside.sum()
    return ranks


def holm(p: Floats) -> Floats:
    """Return the p-values (k,) with Holm's correction for multiple tests (Holm 1979), which controls the family-wise error.

    NaN stands for an undefined test: it stays NaN and does not count as a test.
    """
    corrected = np.full(len(p), np.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def _checked_error(error: float, undefined: str) -> tuple[float, str]:
    """Return a standard error, NaN where it is undefined, and the reason: an estimate of zero does not mean certainty."""
    if error < ROUNDING:
        undefined = "an estimated variance of zero"
    return np.nan if undefined else error, undefined
