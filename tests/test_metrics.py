"""AUC, intervals and paired tests, compared with scikit-learn, R's pROC and resampling by brute force."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from pcam_kaggle.scoring.bootstrap import bootstrap_difference, bootstrap_interval, concordant_pairs
from pcam_kaggle.scoring.delong import delong, delong_difference, delong_interval
from pcam_kaggle.scoring.resampling import paired_test
from scipy import stats
from sklearn.metrics import roc_auc_score

from pcam_kaggle.scoring.metrics import Difference, Estimate, auc, holm, interval_text, json_fields, midranks, rank_within

# From pROC 1.18 in R: roc(direction = "<"), var, cov, ci.auc and roc.test(method = "delong", paired = TRUE).
LABELS = np.array([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0])
A = np.array([1, 5, 2, 4, 3, 3, 2, 6, 1, 2, 4, 3, 5, 4, 2, 6, 5, 1, 3, 2], float)
B = np.array([2, 4, 1, 5, 5, 4, 1, 3, 3, 3, 2, 2, 6, 2, 1, 4, 3, 3, 5, 4], float)


def test_delong_matches_proc() -> None:
    areas, covariance = delong(LABELS, np.stack([A, B]))
    np.testing.assert_allclose(areas, [0.838383838384, 0.843434343434], atol=1e-12)
    expected = [[0.00774155698398122, 0.00069954596469748], [0.00069954596469748, 0.00739847974696459]]
    np.testing.assert_allclose(covariance, expected, rtol=1e-12)


def test_delong_intervals_match_proc() -> None:
    interval = delong_interval(LABELS, A)
    assert interval.low == pytest.approx(0.665934215705, abs=1e-12)
    assert interval.high == 1
    difference = delong_difference(LABELS, A, B)
    assert difference.low == pytest.approx(-0.234800964489847, abs=1e-12)
    assert difference.high == pytest.approx(0.224699954388837, abs=1e-12)


def test_delong_intervals_at_other_levels() -> None:
    half = delong_interval(LABELS, A, level=0.5)
    error = 0.00774155698398122**0.5
    assert half.value - half.low == pytest.approx(stats.norm.ppf(0.75) * error, abs=1e-12)
    assert half.high - half.value == pytest.approx(stats.norm.ppf(0.75) * error, abs=1e-12)
    difference = delong_difference(LABELS, B, A, level=0.5)
    error = (0.00774155698398122 + 0.00739847974696459 - 2 * 0.00069954596469748) ** 0.5
    assert difference.error == pytest.approx(error, abs=1e-12)
    assert difference.value == pytest.approx(0.843434343434 - 0.838383838384, abs=1e-10)
    assert difference.high - difference.value == pytest.approx(stats.norm.ppf(0.75) * error, abs=1e-12)
    assert difference.p == pytest.approx(2 * stats.norm.sf(difference.value / error), abs=1e-12)
    assert delong_difference(LABELS, A, A)[:5] == (0, 0, 0, 0, 1)


def test_a_class_with_one_member_has_no_variance() -> None:
    areas, covariance = delong(np.array([1, 0, 0]), np.array([[2.0, 1, 3]]))
    assert areas.tolist() == [0.5]
    assert np.isnan(covariance).all()


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_matches_scikit_learn_with_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    labels = rng.integers(0, 2, 500)
    scores = (rng.integers(0, levels, 500) + labels * levels // 3).astype(float)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


def test_auc_needs_both_classes() -> None:
    with pytest.raises(ValueError, match="both classes"):
        auc(np.ones(4, int), np.arange(4.0))


def test_midranks_share_ties() -> None:
    assert midranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]


def test_ranks_within_folds_ignore_their_scales() -> None:
    rng = np.random.default_rng(1)
    folds, scores = rng.integers(0, 3, 300), rng.random(300)
    scaled = np.choose(folds, [scores, scores**3 / 10, 5 + 2 * scores])
    np.testing.assert_array_equal(rank_within(folds, scaled), rank_within(folds, scores))
    assert 0 < rank_within(folds, scores).min() <= rank_within(folds, scores).max() <= 1


WITH_NAN = np.where(np.arange(20) == 3, np.nan, A)
ZEROS = np.zeros(20, int)


@pytest.mark.parametrize(
    "use",
    [
        midranks,
        lambda scores: rank_within(ZEROS, scores),
        lambda scores: auc(LABELS, scores),
        lambda scores: delong(LABELS, np.stack([A, scores])),
        lambda scores: delong_interval(LABELS, scores),
        lambda scores: delong_difference(LABELS, A, scores),
        lambda scores: concordant_pairs(LABELS, np.arange(20) % 3, scores),
        lambda scores: bootstrap_interval(LABELS, np.arange(20) % 3, scores),
    ],
)
def test_a_nan_score_is_an_error(use: Callable[[np.ndarray], object]) -> None:
    use(A)
    with pytest.raises(ValueError, match="NaN"):
        use(WITH_NAN)


@pytest.mark.parametrize("labels", [np.where(LABELS == 1, 2, LABELS), np.where(A == 6, -1, LABELS), LABELS / 2])
def test_labels_other_than_0_and_1_are_an_error(labels: np.ndarray) -> None:
    for use in (auc, delong_interval, lambda *given: concordant_pairs(given[0], ZEROS, given[1])):
        with pytest.raises(ValueError, match="neither 0 nor 1"):
            use(labels, A)


@pytest.mark.parametrize(("labels", "scores"), [(LABELS, A[1:]), (LABELS, A[None]), (LABELS[None], A), (LABELS[:1], A)])
def test_mismatched_shapes_are_an_error(labels: np.ndarray, scores: np.ndarray) -> None:
    for use in (auc, delong_interval, lambda *given: delong_difference(*given, given[1])):
        with pytest.raises(ValueError, match=r"shape|both classes"):
            use(labels, scores)
    with pytest.raises(ValueError, match="shape"):
        delong(LABELS, A)
    with pytest.raises(ValueError):
        delong_difference(LABELS, A, B[1:])


def is_undefined(made: Difference | Estimate, reason: str) -> bool:
    """Return whether `made` has a value but neither interval nor p because of `reason`, also as JSON and as text."""
    fields = json.loads(json.dumps(json_fields(made), allow_nan=False))
    unknown = [key for key in ("low", "high", "error", "p") if key in fields]
    text = interval_text(made.low, made.high, made.undefined)
    same = interval_text(fields["low"], fields["high"], fields["undefined"])
    return (
        all(np.isnan(getattr(made, key)) and fields[key] is None for key in unknown)
        and np.isfinite(made.value)
        and made.undefined == reason
        and text == same == f"[n/a ({reason})]"
    )


@pytest.mark.parametrize(("kind", "label"), [("positive", 1), ("negative", 0)])
def test_a_class_with_one_patch_has_no_interval(kind: str, label: int) -> None:
    labels = np.where(np.arange(20) == 7, label, 1 - label)
    assert is_undefined(delong_interval(labels, A), f"a single {kind} patch")
    assert is_undefined(delong_difference(labels, A, B), f"a single {kind} patch")
    assert paired_test(labels, B, None)(A)[:1] == (auc(labels, A) - auc(labels, B),)


def test_an_estimated_variance_of_zero_is_undefined() -> None:
    labels = np.array([0, 0, 1, 1])
    up, level = np.array([1.0, 2, 3, 4]), np.ones(4)
    zero = "an estimated variance of zero"
    for scores in (up, -up, level):
        assert is_undefined(delong_interval(labels, scores), zero)
    for scores in (-up, level):
        assert is_undefined(delong_difference(labels, up, scores), zero)
    # Equal rankings: a difference of exactly zero, with p = 1.
    assert delong_difference(labels, up, 2 * up)[:5] == (0, 0, 0, 0, 1)


def test_rounding_errors_are_not_taken_for_variance() -> None:
    # All slides are equal, so that draws differ by rounding only.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = np.tile([0, 1, 0, 1, 1, 0, 0], 7)
        slides = np.repeat(np.arange(7), 7)
        first, second = (np.tile(rng.integers(0, 5, 7), 7).astype(float) for _ in range(2))
        made = paired_test(labels, second, slides)(first)
        assert made[:5] == (0, 0, 0, 0, 1) if auc(labels, first) == auc(labels, second) else made.undefined


@pytest.mark.parametrize(
    ("slides", "reason"),
    [
        (ZEROS, "a single slide with positive patches"),
        (np.where(LABELS == 1, 0, 1 + np.arange(20) % 4), "a single slide with positive patches"),
        (np.where(LABELS == 0, 3, np.arange(20) % 3), "a single slide with negative patches"),
        (LABELS, "a single slide with positive patches"),
    ],
)
def test_a_class_on_one_slide_has_no_interval(slides: np.ndarray, reason: str) -> None:
    assert is_undefined(bootstrap_interval(LABELS, slides, A), reason)
    made = paired_test(LABELS, B, slides)(A)
    assert is_undefined(made, reason)
    assert made.value == pytest.approx(auc(LABELS, A) - auc(LABELS, B), abs=1e-12)
    assert made.unit == "slide"
    assert made.units == len(np.unique(slides))


def test_too_many_slides_have_no_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_kaggle.scoring.bootstrap.MAX_CLUSTERS", 9)
    slides = np.arange(20) % 10
    assert is_undefined(bootstrap_interval(LABELS, slides, A), "10 slides, more than the 9 that can be drawn")
    assert is_undefined(paired_test(LABELS, B, slides)(A), "10 slides, more than the 9 that can be drawn")
    assert not bootstrap_interval(LABELS, np.arange(20) % 9, A).undefined


def test_the_bootstrap_interval_matches_drawing_slides() -> None:
    rng = np.random.default_rng(3)
    slides = np.repeat(np.arange(40), 20)
    labels = (rng.random(800) < rng.beta(1, 1.5, 40)[slides]).astype(int)
    scores = labels + rng.normal(size=800) + rng.normal(size=40)[slides]
    made = bootstrap_interval(labels, 7 * slides + 5, scores, level=0.5)
    assert made.value == pytest.approx(auc(labels, scores), abs=1e-12)
    assert (made.unit, made.units, made.undefined) == ("slide", 40, "")
    draws = [np.concatenate([np.flatnonzero(slides == slide) for slide in rng.integers(0, 40, 40)]) for _ in range(400)]
    spread = np.std([auc(labels[drawn], scores[drawn]) for drawn in draws], ddof=1)
    assert made.high - made.value == pytest.approx(stats.t(39).ppf(0.75) * spread, rel=0.15)
    assert made.value - made.low == pytest.approx(made.high - made.value)
    pairs = concordant_pairs(labels, slides, scores)
    error = bootstrap_difference(labels, slides, pairs, np.zeros_like(pairs)).error
    assert made.high - made.value == pytest.approx(stats.t(39).ppf(0.75) * error, rel=1e-12)
    assert bootstrap_interval(labels, slides, 4 * labels + scores, level=0.9999).high == 1


def test_the_paired_test_accepts_any_codes() -> None:
    slides = np.arange(20) % 5
    pairs = [concordant_pairs(LABELS, slides, scores) for scores in (A, B)]
    assert paired_test(LABELS, B, 10 * slides + 3)(A) == bootstrap_difference(LABELS, slides, *pairs)
    assert paired_test(LABELS, B, slides, "stain group")(A).unit == "stain group"
    assert paired_test(LABELS, B, None)(A) == delong_difference(LABELS, A, B)


def test_holm_ignores_undefined_p_values() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, np.nan, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, np.nan, 0.06, 0.06, np.nan, 0.02])
    assert np.isnan(holm(np.array([np.nan]))).all()
    assert holm(np.array([])).shape == (0,)
