"""A submission has the format that Kaggle requires; its scores are listed beside those of the models that made it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Others
from made_runs import TESTS, noisy, write_blended_run
from sklearn.metrics import roc_auc_score

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import file_sha256, read_json, write_csv, write_json
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import (
    SubmissionRecord,
    print_scores,
    read_submissions,
    score_table,
    submission_table,
    write_submission,
)
from pcam_kaggle.scoring.blend import blend
from pcam_kaggle.scoring.held_out import Ensemble, ensemble_mean


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_blended_run(tmp_path, noisy("a", 1, 1))


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """Return a sample submission with shuffled ids."""
    ids = np.random.default_rng(5).permutation([f"t{n:02d}" for n in range(TESTS)])
    pd.DataFrame({"id": ids, "label": 0}).to_csv(tmp_path / "sample_submission.csv", index=False)
    return tmp_path / "sample_submission.csv"


def test_a_submission_has_the_samples_ids_in_its_order(run: Run, sample: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "a.csv"
    table, new = write_submission(run, sample, target)
    written, metrics = pd.read_csv(target), run.blend_metrics()
    assert new
    pd.testing.assert_frame_equal(written, table)
    assert written.columns.tolist() == ["id", "label"]
    assert written["id"].tolist() == pd.read_csv(sample)["id"].tolist()
    np.testing.assert_array_equal(written["label"], run.test().set_index("id")["probability"][written["id"]])
    made = SubmissionRecord.read(target.with_suffix(".json"))
    assert made.packages["torch"]
    assert (made.sha256, made.run, made.members, made.method) == (file_sha256(target), "a", {"a": 1.0}, "mean")
    assert (made.oof_auc, made.oof_auc_ranked, made.fold_auc) == (metrics.pooled, metrics.ranked, metrics.fold_auc)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_single_patch_may_have_any_value(value: float, tmp_path: Path) -> None:
    test = pd.DataFrame({"id": ["t00"], "probability": [value]})
    assert submission_table(test, test["id"], tmp_path, tmp_path)["label"].tolist() == [value]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda table: table[2:], r"2 are only in one of the two \(t00, t01\)"),
        (lambda table: pd.concat([table, table[:1].assign(id="more")]), r"1 are only in one of the two \(more\)"),
        (lambda table: table.assign(probability=table["probability"] + 0.5), "outside of"),
        (lambda table: table.assign(probability=table["probability"] - 0.5), "outside of"),
        (lambda table: table.assign(probability=0.5), "all predictions are 0.5"),
        (lambda table: table.assign(probability=np.nan), "could not convert"),
    ],
)
def test_an_invalid_submission_is_not_written(
    spoil: Callable[[pd.DataFrame], pd.DataFrame], message: str, run: Run, sample: Path, tmp_path: Path
) -> None:
    write_csv(run.folder / "test.csv", spoil(pd.read_csv(run.folder / "test.csv")))
    changed = {"test_sha256": file_sha256(run.folder / "test.csv")}
    run.blend_metrics().model_copy(update=changed).write(run.folder / "metrics.json")
    with pytest.raises(UserError, match=message):
        write_submission(run, sample, tmp_path / "out" / "a.csv")
    assert not (tmp_path / "out").exists()


def test_a_submission_is_never_overwritten(run: Run, sample: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.csv"
    write_submission(run, sample, target)
    assert write_submission(run, sample, target)[1] is False
    target.with_suffix(".json").unlink()
    assert write_submission(run, sample, target)[1] is True
    assert target.with_suffix(".json").exists()
    run.write_blend(blend([noisy("a", 1, 2)], "rank"))
    with pytest.raises(UserError, match="another submission"):
        write_submission(run, sample, target)


def scores(workspace: Workspace) -> pd.DataFrame:
    return score_table(workspace, read_submissions(workspace.submissions))


def warnings(log: pytest.LogCaptureFixture) -> list[str]:
    return [entry.message for entry in log.records if entry.levelname == "WARNING"]


@pytest.fixture
def workspace(finished_run: Path, others: Others) -> Workspace:
    """Return the workspace of a finished run that was evaluated on held-out slides."""
    assert main(["evaluate", "bottleneck", "--work", str(finished_run), *others.options]) == 0
    return Workspace(finished_run, finished_run / "store")


def test_the_auc_on_held_out_slides_is_of_present_models(workspace: Workspace, package_log: pytest.LogCaptureFixture) -> None:
    evaluated = read_json(workspace.evaluations / "others" / "result.json")["runs"][0]
    (workspace.evaluations / "of_other_runs").mkdir()
    row = scores(workspace).iloc[0].to_dict()
    pooled = Run(workspace.run("bottleneck")).blend_metrics().pooled.text()
    expected = {"submission": "bottleneck", "OOF AUC": pooled, "others": f"{evaluated['mean']['value']:.4f} (3 models)"}
    assert row == expected | {"of_other_runs": "", "public": "", "private": ""}
    record = workspace.evaluations / "others" / "predictions" / "bottleneck.json"
    before = record.read_text()
    record.write_text("{}")
    shutil.copy(workspace.submissions / "bottleneck.json", workspace.submissions / "again.json")
    package_log.clear()
    assert scores(workspace)["others"].tolist() == ["", ""]
    assert warnings(package_log) == [f"left out: {record}: sources: Field required; delete it and run the command again"]
    record.write_text(before)
    checkpoint = Run(workspace.run("bottleneck")).fold(1).best_checkpoint
    torch.save(torch.load(checkpoint, weights_only=True) | {"more": 1}, checkpoint)
    assert scores(workspace)["others"].tolist() == ["", ""]


def test_the_auc_on_held_out_slides_is_of_the_set_that_was_scored_last(workspace: Workspace) -> None:
    result = workspace.evaluations / "others" / "result.json"
    assert scores(workspace)["others"].tolist() != [""]
    write_json(result, read_json(result) | {"patches_sha256": "of corrected labels"})
    assert scores(workspace)["others"].tolist() == [""]


@pytest.mark.parametrize(("ranked", "weight"), [(False, 0.5), (True, 0.5), (False, 0.9)])
def test_the_auc_of_a_blend_is_that_of_its_members(ranked: bool, weight: float) -> None:
    rng = np.random.default_rng(3)
    ensemble = Ensemble("both", {"a": weight, "b": 1 - weight}, ranked)
    shared = {"id": [f"{n:02}" for n in range(50)], "label": rng.integers(0, 2, 50)}
    a, b = (pd.DataFrame({**shared, "fold_0": rng.random(50), "fold_1": rng.random(50)}) for _ in range(2))
    labels, mean, models = ensemble_mean(ensemble, {"a": a, "b": b})
    columns = [table[["fold_0", "fold_1"]].rank() if ranked else table[["fold_0", "fold_1"]] for table in (a, b)]
    score = (weight * columns[0] + (1 - weight) * columns[1]).sum(axis=1)
    # Equal sums of ranks may differ in their last digit.
    assert roc_auc_score(labels, mean) == pytest.approx(roc_auc_score(shared["label"], score), abs=0.002 if ranked else 1e-9)
    assert models == 2
    # Members join by id.
    assert ensemble_mean(ensemble, {"a": a, "b": b.sample(frac=1, random_state=0)})[1] == pytest.approx(mean)
    # Members of other folds, or one that was not evaluated, make the blend's AUC unknown.
    assert ensemble_mean(ensemble, {"a": a, "b": b.drop(columns="fold_1")})[2] == 0
    assert ensemble_mean(ensemble, {"a": a})[2] == 0


def test_the_best_private_score_comes_first_and_a_damaged_record_is_left_out(
    workspace: Workspace, capsys: pytest.CaptureFixture[str], package_log: pytest.LogCaptureFixture
) -> None:
    made = read_json(workspace.submissions / "bottleneck.json")
    for name, private in (("second", 0.9), ("first", 0.95), ("third", None)):
        write_json(workspace.submissions / f"{name}.json", made | {"private_score": private})
    write_json(workspace.submissions / "damaged.json", made | {"members": []})
    package_log.clear()
    table = scores(workspace)
    assert table["submission"].tolist()[:2] == ["first", "second"]
    assert table["private"].tolist() == ["0.9500", "0.9000", "", ""]
    [warning] = warnings(package_log)
    assert "submissions/damaged.json: members: Input should be an object" in warning
    capsys.readouterr()
    print_scores(workspace)
    assert capsys.readouterr().out.count("(3 models)") == 4
    print_scores(Workspace(workspace.root / "none", workspace.store))
    assert capsys.readouterr().out == "no submissions yet\n"
