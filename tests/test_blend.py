"""Blending joins by id, and averages probabilities or ranks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from made_runs import FOLD, FOLDS, IDS, LABELS, noisy, write_run

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import Method, RunPredictions, blend, score
from pcam_kaggle.scoring.intervals import interval
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.scoring.tables import score_lines


@pytest.mark.parametrize("method", ["mean", "rank"])
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


def test_one_fold_has_no_deviation() -> None:
    alone = noisy("a", 1, 1)
    two = score(alone.oof[alone.oof["fold"] < 2])
    assert two.sd == pytest.approx(abs(two.fold_auc[0] - two.fold_auc[1]) / 2**0.5)
    inside = alone.oof[alone.oof["fold"] == 1].reset_index(drop=True)
    one = replace(alone, oof=inside, tests=alone.tests[1:2], missing=[0, 2])
    metrics = blend([one], "mean").metrics
    assert (metrics.sd, metrics.missing_folds, metrics.folds) == (None, [0, 2], [1])
    assert [line for line in score_lines(metrics) if "missing" in line] == ["missing: folds 0, 2"]
    assert not any("SD over folds" in line for line in score_lines(metrics))


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
