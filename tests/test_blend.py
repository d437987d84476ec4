"""Blending joins by id, averages probabilities or ranks, and uses weights only with a significant gain."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_runs import FOLD, FOLDS, IDS, LABELS, SLIDE, N, noisy, predictions, write_run

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import Method, RunPredictions, blend, climb, cross_climb
from pcam_kaggle.scoring.intervals import PATCHES, Clusters, interval, paired_difference
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.scoring.tables import score_lines


@pytest.mark.parametrize("method", ["mean", "rank", "climb"])
def test_a_blend_does_not_depend_on_the_order_of_rows(method: Method, tmp_path: Path) -> None:
    outputs = []
    for number, order in enumerate((pd.DataFrame.copy, lambda table: table.sample(frac=1, random_state=3))):
        members = [write_run(tmp_path / str(number), made, order) for made in (noisy("a", 1, 1), noisy("b", 2, 2))]
        run = Run(tmp_path / str(number) / "ab")
        run.write_blend(blend([member.predictions() for member in members], method))
        outputs.append([(run.folder / name).read_bytes() for name in ("oof.csv", "test.csv", "metrics.json")])
    assert outputs[0] == outputs[1]


def test_the_mean_and_its_metrics() -> None:
    members = [noisy("a", 1, 1), replace(noisy("b", 2, 2), scheme="given_0a1b2c3d")]
    made = blend(members, "mean")
    values = np.mean([each.oof["probability"] for each in members], axis=0)
    tests = np.mean([test["probability"] for each in members for test in each.tests], axis=0)
    pd.testing.assert_frame_equal(made.oof, members[0].oof.assign(probability=values))
    pd.testing.assert_frame_equal(made.test, members[0].tests[0].assign(probability=tests))
    areas = [auc(LABELS[fold == FOLD], values[fold == FOLD]) for fold in range(FOLDS)]
    assert made.metrics.ranked.low < made.metrics.ranked.value < made.metrics.ranked.high
    assert made.metrics.model_dump(exclude={"ranked", "oof_sha256", "test_sha256"}) == {
        "members": {"a": 0.5, "b": 0.5},
        "method": "mean",
        "asked": "mean",
        "gain_of_weights": None,
        "scheme": "stratified_3_42",
        "folds_sha256": members[0].folds_sha256,
        "missing_folds": [],
        "folds": [0, 1, 2],
        "patches": [240, 240, 240],
        "fold_auc": pytest.approx(areas),
        "mean": pytest.approx(np.mean(areas)),
        "sd": pytest.approx(np.std(areas, ddof=1)),
        "pooled": interval(LABELS, values).model_dump(),
    }


def test_one_fold_has_no_deviation_and_no_weights() -> None:
    alone = noisy("a", 1, 1)
    inside = alone.oof[alone.oof["fold"] == 1].reset_index(drop=True)
    one = replace(alone, oof=inside, tests=alone.tests[1:2], missing=[0, 2])
    metrics = blend([one], "mean").metrics
    assert (metrics.sd, metrics.missing_folds, metrics.folds) == (None, [0, 2], [1])
    assert [line for line in score_lines(metrics) if "missing" in line] == ["missing: folds 0, 2"]
    assert not any("SD over folds" in line for line in score_lines(metrics))
    with pytest.raises(UserError, match="there is one; use mean"):
        blend([one], "climb")


def test_rank_blending_ignores_the_scale_of_a_fold() -> None:
    alone = noisy("a", 1, 1)
    scale = np.array([1.0, 0.1, 0.01])
    tests = [table.assign(probability=table["probability"] * scale[fold]) for fold, table in enumerate(alone.tests)]
    scaled = replace(alone, oof=alone.oof.assign(probability=alone.oof["probability"] * scale[FOLD]), tests=tests)
    first, second = (blend([made], "rank") for made in (alone, scaled))
    pd.testing.assert_frame_equal(first.oof, second.oof, check_exact=True)
    pd.testing.assert_frame_equal(first.test, second.test, check_exact=True)
    plain = blend([scaled], "mean").metrics
    assert plain.pooled.value < plain.ranked.value == pytest.approx(first.metrics.pooled.value)


def test_weights_are_used_only_with_a_significant_gain() -> None:
    good = blend([noisy("good", 0.4, 1), *(noisy(f"bad{n}", 8, n) for n in (2, 3, 4))], "climb").metrics
    assert good.method == "climb"
    assert good.members["good"] > 0.9
    assert good.gain_of_weights.low > 0
    alike = [noisy(f"m{n}", 1, n) for n in range(4)]
    made = blend(alike, "climb")
    assert (made.metrics.method, made.metrics.asked) == ("mean", "climb")
    assert set(made.metrics.members.values()) == {0.25}
    np.testing.assert_allclose(made.oof["probability"], np.mean([each.oof["probability"] for each in alike], axis=0))


MEAN = "(unit: slide): not known to be more than noise, so the mean is used"


@pytest.mark.parametrize(
    ("clusters", "method", "line"),
    [
        (PATCHES, "climb", "(unit: patch): weights are used"),
        (Clusters("slide", SLIDE), "mean", MEAN),
        (Clusters("slide", np.where(LABELS == 1, 0, SLIDE)), "mean", f"[n/a (a single slide with positive patches)] {MEAN}"),
    ],
)
def test_the_gain_of_weights_is_tested_over_the_clusters(clusters: Clusters, method: str, line: str) -> None:
    """The weights gain on a third of the slides: significant over patches but not over slides."""
    rng = np.random.default_rng(5)
    good = np.where(SLIDE < 6, 3.0 * LABELS, 0.0) + rng.normal(size=N)
    members = [predictions(f"m{n}", logits, "slides_3_42") for n, logits in enumerate([good, *rng.normal(size=(2, N))])]
    metrics = blend(members, "climb", clusters).metrics
    assert metrics.method == method
    _, gain = cross_climb(LABELS, FOLD, np.stack([each.oof["probability"] for each in members]))
    assert metrics.gain_of_weights.value == pytest.approx(gain.value, abs=1e-12)
    assert score_lines(metrics)[-1].endswith(line)


def test_weights_of_a_fold_do_not_depend_on_its_labels() -> None:
    values = np.stack([noisy(f"m{n}", 1 + n, n).oof["probability"] for n in range(4)])
    inside = FOLD == 1
    # Equal to the labels in one fold and random elsewhere: weights that leak labels of that fold would select it.
    leaky = np.where(inside, LABELS, np.random.default_rng(9).random(N))
    values = np.vstack([values, leaky])
    blended, _ = cross_climb(LABELS, FOLD, values)
    others, _ = cross_climb(np.where(inside, 1 - LABELS, LABELS), FOLD, values)
    np.testing.assert_array_equal(blended[inside], others[inside])
    assert climb(LABELS, values).sum() == pytest.approx(1)


def test_weights_of_a_fold_come_from_all_other_folds() -> None:
    values = np.stack([noisy(f"m{n}", 1 + n / 2, n).oof["probability"] for n in range(3)])
    blended, gain = cross_climb(LABELS, FOLD, values)
    for fold in range(FOLDS):
        inside = fold == FOLD
        np.testing.assert_array_equal(blended[inside], climb(LABELS[~inside], values[:, ~inside]) @ values[:, inside])
    assert gain == paired_difference(LABELS, blended, values.mean(axis=0))


def test_climb_starts_with_the_best_and_adds_what_helps_more_than_once() -> None:
    labels = np.array([0, 0, 1, 1])
    best, helps, hurts = np.array([1, 3, 2, 4.0]), np.array([2, 0, 1.5, 1]), np.array([4, 3, 2, 1.0])
    assert climb(labels, np.stack([hurts, best, helps])).tolist() == [0, 0.5, 0.5]
    assert climb(labels, np.stack([hurts, np.array([1, 2, 3, 4.0])])).tolist() == [0, 1]
    values = np.stack([noisy(f"m{n}", 1 + n / 2, n).oof["probability"] for n in range(3)])
    weights = climb(LABELS, values)
    assert len({*weights.tolist(), 0.0}) > 2
    assert auc(LABELS, weights @ values) > max(auc(LABELS, column) for column in values)


FIRST, SECOND = noisy("a", 1, 1), noisy("b", 1, 2)
OTHER = "b and a: trained on other folds or patches"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (FIRST, "a, a: a run is named twice"),
        (replace(SECOND, folds_sha256="other"), OTHER),
        *((replace(SECOND, oof=SECOND.oof.assign(**other)), OTHER) for other in ({"label": 1 - LABELS}, {"fold": 2 - FOLD})),
        (replace(SECOND, oof=SECOND.oof.assign(id=IDS[::-1])), OTHER),
        (replace(SECOND, tests=[table.iloc[1:].reset_index(drop=True) for table in SECOND.tests]), "test ids"),
    ],
)
def test_members_must_share_folds_patches_and_test_ids(other: RunPredictions, message: str) -> None:
    with pytest.raises(UserError, match=message):
        blend([FIRST, other], "mean")
