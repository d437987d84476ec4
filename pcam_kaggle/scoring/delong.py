"""DeLong's variance of an AUC, its confidence interval and the paired test of two AUCs, for independent patches."""

import numpy as np
from scipy import stats

from pcam_kaggle.scoring.metrics import Difference, Estimate, Floats, Labels, placements


def delong(labels: Labels, scores: Floats) -> tuple[Floats, Floats]:
    """Return the AUC of each model and their covariance (DeLong et al. 1988).

    Computed from midranks in O(n log n) (Sun & Xu 2014, algorithm 2).

    Args:
        labels: (n,), 0 or 1.
        scores: (k, n), one row per model.

    Returns:
        The AUCs, (k,), and their covariance, (k, k), NaN where a class has a single member.

    Raises:
        ValueError: As in `auc`.
    """
    of_positives, of_negatives = placements(labels, scores)
    covariance = _covariance(of_positives) / of_positives.shape[1] + _covariance(of_negatives) / of_negatives.shape[1]
    return of_positives.mean(axis=1), covariance


def delong_interval(labels: Labels, scores: Floats, level: float = 0.95) -> Estimate:
    """Return the AUC of `scores` (n,) with DeLong's interval at `level`, clipped to [0, 1].

    The interval is undefined where a class has a single member, as in R's pROC, and where the estimated variance is zero
    (perfect separation, or all scores tied), where pROC warns that an interval of zero width is misleading.

    Raises:
        ValueError: As in `auc`.
    """
    areas, covariance = delong(labels, np.stack([scores]))
    error = float(np.sqrt(covariance[0, 0]))
    return Estimate.from_error(float(areas[0]), error, stats.norm(), level, "patch", len(labels), _single_member(labels))


def delong_difference(labels: Labels, first: Floats, second: Floats, level: float = 0.95) -> Difference:
    """Return AUC(first) - AUC(second) on the same patches, (n,) each, with DeLong's paired interval at `level` and p.

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
    return Difference.from_error(value, error, stats.norm(), level, "patch", len(labels), _single_member(labels))


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
