"""AUC and its interval against scikit-learn and R's pROC."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from pcam_kaggle.metrics import auc, auc_difference, auc_interval, delong, midranks, rank_within

# From pROC 1.18 in R: roc(direction = "<"), var, cov, ci.auc and roc.test(method = "delong", paired = TRUE).
LABELS = np.array([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0])
A = np.array([1, 5, 2, 4, 3, 3, 2, 6, 1, 2, 4, 3, 5, 4, 2, 6, 5, 1, 3, 2], float)
B = np.array([2, 4, 1, 5, 5, 4, 1, 3, 3, 3, 2, 2, 6, 2, 1, 4, 3, 3, 5, 4], float)


def test_delong_is_procs() -> None:
    areas, covariance = delong(LABELS, np.stack([A, B]))
    np.testing.assert_allclose(areas, [0.838383838384, 0.843434343434], atol=1e-12)
    expected = [[0.00774155698398122, 0.00069954596469748], [0.00069954596469748, 0.00739847974696459]]
    np.testing.assert_allclose(covariance, expected, rtol=1e-12)


def test_intervals_are_procs() -> None:
    interval = auc_interval(LABELS, A)
    assert interval.low == pytest.approx(0.665934215705, abs=1e-12)
    assert interval.high == 1
    difference = auc_difference(LABELS, A, B)
    assert difference.low == pytest.approx(-0.234800964489847, abs=1e-12)
    assert difference.high == pytest.approx(0.224699954388837, abs=1e-12)


def test_intervals_have_their_level() -> None:
    half = auc_interval(LABELS, A, level=0.5)
    error = 0.00774155698398122**0.5
    assert half.value - half.low == pytest.approx(stats.norm.ppf(0.75) * error, abs=1e-12)
    assert half.high - half.value == pytest.approx(stats.norm.ppf(0.75) * error, abs=1e-12)
    difference = auc_difference(LABELS, B, A, level=0.5)
    error = (0.00774155698398122 + 0.00739847974696459 - 2 * 0.00069954596469748) ** 0.5
    assert difference.error == pytest.approx(error, abs=1e-12)
    assert difference.value == pytest.approx(0.843434343434 - 0.838383838384, abs=1e-10)
    assert difference.high - difference.value == pytest.approx(stats.norm.ppf(0.75) * error, abs=1e-12)
    assert difference.p == pytest.approx(2 * stats.norm.sf(difference.value / error), abs=1e-12)
    assert auc_difference(LABELS, A, A) == (0, 0, 0, 0, 1)


def test_a_class_of_one_has_no_variance() -> None:
    areas, covariance = delong(np.array([1, 0, 0]), np.array([[2.0, 1, 3]]))
    assert areas.tolist() == [0.5]
    assert np.isnan(covariance).all()


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_is_scikit_learns_with_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    labels = rng.integers(0, 2, 500)
    scores = (rng.integers(0, levels, 500) + labels * levels // 3).astype(float)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_needs_both_labels() -> None:
    with pytest.raises(ValueError, match="both kinds"):
        auc(np.ones(4, int), np.arange(4.0))


def test_midranks_share_ties() -> None:
    assert midranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_ranking_within_folds_undoes_their_scales() -> None:
    rng = np.random.default_rng(1)
    folds, scores = rng.integers(0, 3, 300), rng.random(300)
    scaled = np.choose(folds, [scores, scores**3 / 10, 5 + 2 * scores])
    np.testing.assert_array_equal(rank_within(folds, scaled), rank_within(folds, scores))
    assert 0 < rank_within(folds, scores).min() <= rank_within(folds, scores).max() <= 1
