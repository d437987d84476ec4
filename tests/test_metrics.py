"""AUC, intervals and paired tests, compared with scikit-learn, R's pROC and resampling by brute force."""

from collections.abc import Callable

import numpy as np
import pytest
from made_runs import paired_difference
from scipy import stats
from sklearn.metrics import confusion_matrix, f1_score, log_loss, precision_score, recall_score, roc_auc_score

from pcam_kaggle.scoring.intervals import (
    Clusters,
    JointAucs,
    concordant_pairs,
    interval,
    joint_aucs,
    not_worse,
    pairs_to_test,
    simultaneous_differences,
)
from pcam_kaggle.scoring.metrics import auc, calibration_error, cross_entropy, operating_points, rank_within
from pcam_kaggle.scoring.results import Difference, Estimate
from pcam_kaggle.scoring.tables import operating_table

# From pROC 1.18 in R: roc(direction = "<"), var, cov, ci.auc and roc.test(method = "delong", paired = TRUE).
LABELS = np.array([0, 1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1, 0])
A = np.array([1, 5, 2, 4, 3, 3, 2, 6, 1, 2, 4, 3, 5, 4, 2, 6, 5, 1, 3, 2], float)
B = np.array([2, 4, 1, 5, 5, 4, 1, 3, 3, 3, 2, 2, 6, 2, 1, 4, 3, 3, 5, 4], float)
ZEROS = np.zeros(20, int)


def by_slide(slides: np.ndarray) -> Clusters:
    return Clusters("slide", slides)


def test_delong_matches_proc() -> None:
    variances, covariance = (0.00774155698398122, 0.00739847974696459), 0.00069954596469748
    for scores, area, variance in zip((A, B), (0.838383838384, 0.843434343434), variances, strict=True):
        made = interval(LABELS, scores)
        assert made.value == pytest.approx(area, abs=1e-12)
        assert made.low == pytest.approx(area - stats.norm.ppf(0.975) * variance**0.5, abs=1e-12)
        assert made.high == 1
    assert interval(LABELS, -A).low == 0
    difference = paired_difference(LABELS, A, B)
    assert difference.low == pytest.approx(-0.234800964489847, abs=1e-12)
    assert difference.high == pytest.approx(0.224699954388837, abs=1e-12)
    assert difference.error == pytest.approx((sum(variances) - 2 * covariance) ** 0.5, abs=1e-12)
    assert difference.p == pytest.approx(2 * stats.norm.cdf(difference.value / difference.error), abs=1e-12)
    # A single one needs no correction, and its p is not drawn.
    assert difference.corrected_p == difference.p


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_auc_matches_scikit_learn_with_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    labels = rng.integers(0, 2, 500)
    scores = (rng.integers(0, levels, 500) + labels * levels // 3).astype(float)
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 2, 16])
@pytest.mark.parametrize("signal", [-0.3, 0.0, 0.6])
def test_operating_points_match_scikit_learn_with_ties(decimals: int, signal: float) -> None:
    rng = np.random.default_rng(decimals)
    labels = np.repeat([0, 1], [130, 100])
    probabilities = (rng.normal(0.4, 0.2, 230) + signal * labels).clip(0, 1).round(decimals)
    points = operating_points(labels, probabilities)
    printed = operating_table({"run": (labels, probabilities)})["threshold"].astype(float)
    for (_, point), applied in zip(points.iterrows(), printed, strict=True):
        assigned = probabilities >= applied
        assert point[["TN", "FP", "FN", "TP"]].tolist() == confusion_matrix(labels, assigned).ravel().tolist()
        assert point["sensitivity"] == pytest.approx(recall_score(labels, assigned))
        assert point["specificity"] == pytest.approx(recall_score(labels, assigned, pos_label=0))
        assert point["F1"] == pytest.approx(f1_score(labels, assigned))
        assert point["PPV"] == pytest.approx(precision_score(labels, assigned, zero_division=np.nan), nan_ok=True)
    thresholds = np.unique(probabilities)
    sensitivity, specificity = (
        np.array([recall_score(labels, probabilities >= each, pos_label=label) for each in thresholds]) for label in (1, 0)
    )
    assert points.loc["0.5", "threshold"] == 0.5
    youden = points.loc["Youden", ["sensitivity", "specificity"]].sum()
    assert youden == pytest.approx((sensitivity + specificity).max())
    for percent in (95, 99):
        # 95 and 99 of 100 positives are enough.
        assert points.loc[f"{percent} % sensitivity", "threshold"] == thresholds[sensitivity >= percent / 100].max()


def test_half_of_the_patches_above_a_threshold_are_positive() -> None:
    points = operating_points(np.array([1, 0, 0, 1]), np.array([0.9, 0.8, 0.1, 0.2]))
    assert points.loc["0.5", ["PPV", "sensitivity", "specificity"]].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("value", [0.3, 0.7])
def test_operating_points_of_equal_probabilities_are_not_printed_as_nan(value: float) -> None:
    labels = np.array([0, 1, 1, 0, 1])
    table = operating_table({"run": (labels, np.full(5, value))}).set_index("operating point").drop(columns="run")
    everything = ["1.0000", "0.0000", "0.6000", "0.7500", "3", "2", "0", "0"]
    nothing = ["0.0000", "1.0000", "n/a", "0.0000", "0", "0", "2", "3"]
    assert table.loc["0.5"].tolist() == ["0.5", *(everything if value > 0.5 else nothing)]
    assert (table.iloc[1:] == [str(value), *everything]).all(axis=None)


def test_cross_entropy_matches_scikit_learn_and_does_not_overflow() -> None:
    assert cross_entropy(LABELS, A - 3) == pytest.approx(log_loss(LABELS, 1 / (1 + np.exp(3 - A))), abs=1e-12)
    assert cross_entropy(np.array([0, 1], np.uint8), np.array([800.0, -800.0])) == 800


def test_ranks_within_folds_ignore_their_scales() -> None:
    rng = np.random.default_rng(1)
    folds, scores = rng.integers(0, 3, 300), rng.random(300)
    scaled = np.choose(folds, [scores, scores**3 / 10, 5 + 2 * scores])
    np.testing.assert_array_equal(rank_within(folds, scaled), rank_within(folds, scores))
    assert 0 < rank_within(folds, scores).min() <= rank_within(folds, scores).max() <= 1
    assert rank_within(ZEROS[:4], np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [0.875, 0.25, 0.875, 0.5]
    with pytest.raises(ValueError, match="nan"):
        rank_within(ZEROS, np.where(np.arange(20) == 3, np.nan, A))


USES: dict[str, Callable[[np.ndarray, np.ndarray], object]] = {
    "auc": auc,
    "interval": interval,
    "paired_difference": lambda labels, scores: paired_difference(labels, scores, A),
    "concordant_pairs": lambda labels, scores: concordant_pairs(labels, np.arange(20) % 3, scores),
    "interval over slides": lambda labels, scores: interval(labels, scores, by_slide(np.arange(20) % 3)),
}


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        (LABELS, np.where(np.arange(20) == 3, np.nan, A), "(?i)nan"),
        (np.where(LABELS == 1, 2, LABELS), A, "neither 0 nor 1"),
        (np.where(A == 6, -1, LABELS), A, "neither 0 nor 1"),
        (LABELS / 2, A, "neither 0 nor 1"),
        (np.ones(20, int), A, "both classes"),
        (LABELS, A[1:], "shape"),
        (LABELS[None], A, "shape"),
        (LABELS[:1], A, "shape"),
    ],
)
@pytest.mark.parametrize("use", USES)
def test_invalid_labels_and_scores_are_an_error(use: str, labels: np.ndarray, scores: np.ndarray, message: str) -> None:
    USES[use](LABELS, A)
    with pytest.raises(ValueError, match=message):
        USES[use](labels, scores)


def is_zero(made: Difference) -> bool:
    return (made.value, made.low, made.high, made.error, made.p) == (0, 0, 0, 0, 1)


def is_undefined(made: Estimate, reason: str) -> bool:
    """Return whether `made` has a value but neither interval nor p because of `reason`, also as text and as JSON."""
    numbers = [getattr(made, key) for key in ("low", "high", "error", "p") if hasattr(made, key)]
    return (
        numbers == [None] * len(numbers)
        and np.isfinite(made.value)
        and made.undefined == reason
        and made.text(".2f") == f"{made.value:.2f} [n/a ({reason})]"
        and type(made).model_validate_json(made.model_dump_json()) == made
    )


def test_a_class_with_one_member_has_no_variance() -> None:
    for kind, label in (("positive", 1), ("negative", 0)):
        labels = np.where(np.arange(20) == 7, label, 1 - label)
        difference = paired_difference(labels, A, B)
        assert is_undefined(interval(labels, A), f"a single {kind} patch")
        assert is_undefined(difference, f"a single {kind} patch")
        assert difference.value == auc(labels, A) - auc(labels, B)


def test_an_estimated_variance_of_zero_is_undefined() -> None:
    labels = np.array([0, 0, 1, 1])
    up, level = np.array([1.0, 2, 3, 4]), np.ones(4)
    for scores in (up, -up, level):
        assert is_undefined(interval(labels, scores), "an estimated variance of zero")
    for scores in (-up, level):
        assert is_undefined(paired_difference(labels, up, scores), "an estimated variance of zero")
    # Equal rankings.
    assert is_zero(paired_difference(labels, up, 2 * up))
    assert is_zero(paired_difference(LABELS, A, A))


def test_rounding_errors_are_not_taken_for_variance() -> None:
    # All slides are equal, so that draws differ by rounding only.
    for seed in range(20):
        rng = np.random.default_rng(seed)
        labels = np.tile([0, 1, 0, 1, 1, 0, 0], 7)
        slides = np.repeat(np.arange(7), 7)
        first, second = (np.tile(rng.integers(0, 5, 7), 7).astype(float) for _ in range(2))
        made = paired_difference(labels, first, second, by_slide(slides))
        assert is_zero(made) if auc(labels, first) == auc(labels, second) else made.undefined


@pytest.mark.parametrize(
    ("slides", "reason"),
    [
        (ZEROS, "a single slide with positive patches"),
        (np.where(LABELS == 1, 0, 1 + np.arange(20) % 4), "a single slide with positive patches"),
        (np.where(LABELS == 0, 3, np.arange(20) % 3), "a single slide with negative patches"),
        (LABELS, "a single slide with positive patches"),
        (np.arange(20) % 10, "10 slides, more than the 9 that can be drawn"),
    ],
)
def test_slides_that_cannot_be_drawn_have_no_interval(slides: np.ndarray, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_kaggle.scoring.intervals.MAX_CLUSTERS", 9)
    assert is_undefined(interval(LABELS, A, by_slide(slides)), reason)
    made = paired_difference(LABELS, A, B, by_slide(slides))
    assert is_undefined(made, reason)
    assert made.value == pytest.approx(auc(LABELS, A) - auc(LABELS, B), abs=1e-12)
    assert (made.unit, made.units) == ("slide", len(np.unique(slides)))
    assert not interval(LABELS, A, by_slide(np.arange(20) % 9)).undefined


def test_the_bootstrap_matches_drawing_slides() -> None:
    rng = np.random.default_rng(3)
    slides = np.repeat(np.arange(60), 30)
    labels = (rng.random(1800) < rng.beta(1, 1.5, 60)[slides]).astype(int)
    first, second = (labels + rng.normal(size=1800) + rng.normal(size=60)[slides] for _ in range(2))

    over_patches, over_slides = (paired_difference(labels, first, second, each) for each in (Clusters(), by_slide(slides)))
    assert over_slides.value == pytest.approx(over_patches.value, abs=1e-12)
    assert over_slides.error > 1.5 * over_patches.error
    assert paired_difference(labels, first, second, by_slide(np.arange(1800))).error == pytest.approx(
        over_patches.error, rel=0.1
    )
    assert over_slides.high - over_slides.value == pytest.approx(stats.t(59).ppf(0.975) * over_slides.error)
    assert over_slides.p == pytest.approx(2 * stats.t(59).sf(abs(over_slides.value) / over_slides.error))
    # Drawn slide by slide, the slow way.
    draws = np.random.default_rng(1).integers(0, 60, (400, 60))
    patches = [np.concatenate([np.arange(30) + 30 * slide for slide in draw]) for draw in draws]
    areas = np.array([[auc(labels[some], scores[some]) for some in patches] for scores in (first, second)])
    assert over_slides.error == pytest.approx(np.std(areas[0] - areas[1], ddof=1), rel=0.15)
    made = interval(labels, first, by_slide(7 * slides + 5))
    assert made.value == pytest.approx(auc(labels, first), abs=1e-12)
    assert (made.unit, made.units, made.undefined) == ("slide", 60, "")
    assert made.high - made.value == pytest.approx(stats.t(59).ppf(0.975) * np.std(areas[0], ddof=1), rel=0.15)
    assert made.value - made.low == pytest.approx(made.high - made.value)


def test_a_draw_of_whole_slides_needs_no_sorting() -> None:
    rng = np.random.default_rng(4)
    slides, labels = np.arange(40) // 4, rng.integers(0, 2, 40)
    scores = rng.integers(0, 6, 40).astype(float)
    copied = np.concatenate([np.flatnonzero(slides == slide) for slide in (1, 1, 3, 7)])
    expected = auc(labels[copied], scores[copied])
    pairs = concordant_pairs(labels, slides, scores)
    counts = np.bincount([1, 1, 3, 7], minlength=10).astype(float)
    positives, negatives = (counts @ np.bincount(slides[labels == k], minlength=10) for k in (1, 0))
    assert counts @ pairs @ counts / (positives * negatives) == pytest.approx(expected, abs=1e-12)


def test_a_paired_difference_accepts_any_codes() -> None:
    slides = np.arange(20) % 5
    made = paired_difference(LABELS, A, B, by_slide(10 * slides + 3))
    assert made == paired_difference(LABELS, A, B, by_slide(slides))
    assert paired_difference(LABELS, A, B, Clusters("stain group", slides)) == made.model_copy(update={"unit": "stain group"})


@pytest.mark.parametrize("df", [np.inf, 12])
def test_simultaneous_intervals_of_independent_runs_are_those_of_tukey_and_dunnett(df: float) -> None:
    areas = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    joint = JointAucs(areas, 0.1 * np.eye(5), df, "slide", 13, "")
    # From published tables of Dunnett's two-sided test, for four runs and a baseline.
    expected = {"all pairs": stats.studentized_range.ppf(0.95, 5, df) / 2**0.5, "baseline": {np.inf: 2.44, 12: 2.81}[df]}
    for family, critical in expected.items():
        pairs = pairs_to_test(5, family)
        assert len(pairs) == {"all pairs": 10, "baseline": 4}[family]
        for (run, other), made in zip(pairs, simultaneous_differences(joint, pairs), strict=True):
            assert made.value == pytest.approx(areas[run] - areas[other])
            assert made.error == pytest.approx(0.1 * 2**0.5)
            assert made.high - made.value == pytest.approx(critical * made.error, rel=0.01)
            assert made.p <= made.corrected_p <= min(1, len(pairs) * made.p)
    made = simultaneous_differences(joint, pairs_to_test(5, "all pairs"))[1]
    assert made.corrected_p == pytest.approx(stats.studentized_range.sf(2.0, 5, df), abs=0.005)


def test_a_pair_is_tested_with_the_covariance_of_its_runs() -> None:
    joint = joint_aucs(LABELS, np.stack([A, B, A + B, 2 * A]))
    for pair, made in zip(pairs := pairs_to_test(4, "all pairs"), simultaneous_differences(joint, pairs), strict=True):
        scores = [(A, B, A + B, A)[index] for index in pair]
        alone = paired_difference(LABELS, *scores)
        assert (made.value, made.p, made.error) == pytest.approx((alone.value, alone.p, alone.error), abs=1e-12)
        assert is_zero(made) == (pair == (3, 0))


def test_a_run_is_not_the_best_if_any_other_is_significantly_better() -> None:
    # The first has the highest AUC and a large error, so that only the second is known to be better than the third.
    joint = JointAucs(np.array([0.91, 0.9, 0.8]), np.diag([0.2, 0.01, 0.01]), np.inf, "patch", 100, "")
    pairs = pairs_to_test(3, "all pairs")
    differences = simultaneous_differences(joint, pairs)
    assert [made.is_significant for made in differences] == [False, False, True]
    assert not_worse(3, pairs, differences) == [0, 1]
    # The order of a pair does not matter.
    turned = simultaneous_differences(joint, swapped := [(other, run) for run, other in pairs])
    assert not_worse(3, swapped, turned) == [0, 1]


def test_calibration_error_is_the_distance_from_the_diagonal() -> None:
    probabilities = np.repeat([0.2, 0.8, 0.95, 1.0], [100, 100, 40, 40])
    # A probability of 1 is in the last bin, with 0.95: their labels are right together, not alone.
    positive = [np.arange(n) < count for n, count in ((100, 20), (100, 80), (40, 40), (40, 38))]
    labels = np.concatenate(positive).astype(int)
    assert calibration_error(labels, probabilities) == pytest.approx(0)
    assert calibration_error(1 - labels, probabilities) == pytest.approx((200 * 0.6 + 80 * 0.95) / 280)
