"""Evaluation on held-out slides: leaks are refused, scores are those of the predictions, and results are reused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Others, Outcome, first_tif
from PIL import Image
from sklearn.metrics import roc_auc_score

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.files import file_sha256
from pcam_kaggle.core.paths import Data
from pcam_kaggle.runs.run import Run

PREDICTIONS = Path("evaluations/others/predictions")
Command = Callable[..., Outcome]


@pytest.fixture
def evaluate(finished_run: Path, others: Others, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return `pcam evaluate` in the workspace of a finished run, on `others` unless its arguments name other patches."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        status = main(["evaluate", "--work", str(finished_run), *others.options, *arguments])
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture
def labelled(data: Data, tmp_path: Path) -> list[str]:
    """Return the options that name the test patches with made-up labels."""
    ids = pd.read_csv(data.sample, dtype={"id": str})["id"]
    pd.DataFrame({"id": ids, "label": np.arange(len(ids)) % 2}).to_csv(tmp_path / "labels.csv", index=False)
    return ["--patches", str(data.patches("test")), "--labels", str(tmp_path / "labels.csv"), "--name", "others"]


def result(evaluate: Command, *arguments: str) -> dict:
    outcome = evaluate(*arguments, "--format", "json")
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


def refused(outcome: Outcome) -> str:
    """Return the line in which a command named the mistake, perhaps after warnings."""
    assert outcome.status == 2
    line = outcome.err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def stored(work: Path, name: str = "bottleneck") -> pd.DataFrame:
    return pd.read_csv(work / PREDICTIONS / f"{name}.csv", dtype={"id": str})


def test_scores_are_those_of_the_stored_predictions(evaluate: Command, others: Others, finished_run: Path) -> None:
    found = result(evaluate, "bottleneck")
    assert found == json.loads((finished_run / "evaluations/others/result.json").read_text())
    (run,), table = found["runs"], stored(finished_run)
    assert table["id"].tolist() == sorted(others.table["id"])
    labels = table["id"].map(others.table.set_index("id")["label"])
    folds = [f"fold_{number}" for number in range(3)]
    assert run["mean"]["value"] == pytest.approx(roc_auc_score(labels, table[folds].mean(axis=1)))
    each = [roc_auc_score(labels, table[fold]) for fold in folds]
    assert [*run["fold_auc"].values()] == pytest.approx(each)
    assert run["single"] == pytest.approx(np.mean(each))
    fold_auc = Run(finished_run / "runs/bottleneck").blend_metrics().fold_auc
    assert run["drop"] == pytest.approx(np.mean(fold_auc) - np.mean(each))
    for form in ("text", "md", "csv"):
        assert "bottleneck" in evaluate("bottleneck", "--format", form).out


def test_a_patch_predicted_in_training_gets_the_same_here(evaluate: Command, finished_run: Path, labelled: list[str]) -> None:
    result(evaluate, "bottleneck", *labelled)
    table = stored(finished_run).set_index("id")
    for number in range(3):
        predicted = Run(finished_run / "runs/bottleneck").fold(number).predictions()[1].set_index("id")
        np.testing.assert_allclose(table[f"fold_{number}"], predicted["probability"].reindex(table.index), atol=1e-6)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_trained_patch_is_refused(evaluate: Command, others: Others, data: Data, finished_run: Path, renamed: bool) -> None:
    leaked = pd.read_csv(data.labels, dtype={"id": str}).iloc[0]
    name = "other_name" if renamed else leaked["id"]
    shutil.copy(data.patches("train") / f"{leaked['id']}.tif", others.patches / f"{name}.tif")
    others.table.loc[len(others.table)] = [name, leaked["label"]]
    others.save()
    message = refused(evaluate("bottleneck", *(["--ids", "names"] if renamed else [])))
    assert f"was trained on 1 of these 13 patches ({name})" in message
    assert not (finished_run / PREDICTIONS).exists()


def test_patches_that_a_teacher_labelled_are_refused(evaluate: Command, pcam: Command, labelled: list[str]) -> None:
    assert pcam("train", "--set", "teacher=bottleneck", "--name", "student", "--folds", "1").status == 0
    assert "student: was trained on 7 of these 7 patches" in refused(evaluate("student", *labelled))


def test_a_run_whose_train_patches_are_not_known(evaluate: Command, finished_run: Path) -> None:
    folds, config = finished_run / "folds/stratified_3_42.csv", finished_run / "runs/bottleneck/config.json"
    before, table = file_sha256(folds), pd.read_csv(folds)
    table.assign(id=[f"patch_{n}" for n in range(len(table))]).to_csv(folds, index=False)
    assert "its train patches are not known" in refused(evaluate("bottleneck"))
    config.write_text(config.read_text().replace(before, file_sha256(folds)))
    assert "train patches under other names are not recognised" in evaluate("bottleneck").err


def test_predictions_are_reused_until_checkpoint_or_config_change(evaluate: Command, finished_run: Path, pcam: Command) -> None:
    file = finished_run / PREDICTIONS / "bottleneck.csv"
    first, written = evaluate("bottleneck"), file.stat().st_mtime_ns
    again = evaluate("bottleneck")
    assert (again.out, file.stat().st_mtime_ns) == (first.out, written)
    run = Run(finished_run / "runs/bottleneck")
    shutil.copy(run.fold(0).best_checkpoint, run.fold(1).best_checkpoint)
    assert "trained again since it was predicted" in refused(evaluate("bottleneck"))
    assert pcam("predict").status == evaluate("bottleneck").status == 0
    table = stored(finished_run)
    assert table["fold_0"].equals(table["fold_1"])
    run.config_file.write_text(run.config_file.read_text().replace('"tta": 4', '"tta": 1'))
    assert evaluate("bottleneck").status == 0
    assert not stored(finished_run).equals(table)


def test_results_of_other_patches_are_not_replaced(evaluate: Command, others: Others) -> None:
    assert evaluate("bottleneck").status == 0
    others.table["label"] = 1 - others.table["label"]
    others.save()
    assert "choose another name with --name" in refused(evaluate("bottleneck"))
    assert evaluate("bottleneck", "--name", "swapped").status == 0


def test_wrong_options_are_one_line(evaluate: Command, pcam: Command, finished_run: Path, tmp_path: Path) -> None:
    assert pcam("train", "--folds", "1", "--set", "seed=7", "--name", "part").status == 0
    slides, named = tmp_path / "slides.csv", Others(tmp_path / "named", [f"patient_{number}" for number in range(12)])
    slides.write_text("id,wsi\nother,s0\n")
    for arguments, printed in (
        (["part", "--folds", "0"], "fold 0 is not trained"),
        (["bottleneck", "--folds", "7"], "bottleneck has folds 0 to 2"),
        (["bottleneck", "part"], "other folds are trained in each run (bottleneck 0,1,2, part 1)"),
        (["bottleneck", "unheard"], "no such run"),
        (["bottleneck", "--baseline", "part"], "--baseline part: not among bottleneck"),
        (["bottleneck", "--name", "../up"], "'../up' is not a plain file name"),
        (["bottleneck", "--slides", str(slides)], "has none of the 12 patches"),
        (["bottleneck", *named.options], "--ids names"),
    ):
        assert printed in refused(evaluate(*arguments))
    (finished_run / "runs/part/fold_1/predictions.json").unlink()
    found = result(evaluate, "bottleneck", "part", "--folds", "1")
    assert [[*run["fold_auc"]] for run in found["runs"]] == [["1"], ["1"]]
    # A run without out-of-fold predictions has no drop.
    assert (found["runs"][1]["oof_auc"], found["runs"][1]["drop"]) == ({}, None)


def test_few_patches_are_too_few_for_batch_norm_statistics(evaluate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "takes batch norm statistics from these 12 patches" in evaluate("bottleneck").err
    monkeypatch.setattr("pcam_kaggle.training.held_out.FEW_PATCHES", 12)
    assert not evaluate("bottleneck").err


def test_a_blend_is_the_weighted_mean_of_its_members(evaluate: Command, finished_run: Path, pcam: Command) -> None:
    assert pcam("pipeline", "--set", "seed=7", "--name", "seven").status == 0
    members = ["bottleneck", "seven"]
    for name, method in (("both", "mean"), ("ranks", "rank")):
        assert pcam("blend", *members, "--name", name, "--method", method).status == 0
    found = result(evaluate, "both", "ranks", *members, "--baseline", "seven")
    both, ranks, bottleneck, seven = found["runs"]
    tables = [stored(finished_run, name).filter(like="fold_") for name in members]
    labels = stored(finished_run, "seven")["label"]
    mean = (tables[0] + tables[1]) / 2
    assert both["mean"]["value"] == pytest.approx(roc_auc_score(labels, mean.mean(axis=1)))
    assert both["fold_auc"]["1"] == pytest.approx(roc_auc_score(labels, mean["fold_1"]))
    summed = tables[0]["fold_2"].rank() + tables[1]["fold_2"].rank()
    assert ranks["fold_auc"]["2"] == pytest.approx(roc_auc_score(labels, summed))
    assert ranks["calibration_error"] is None
    assert 0 <= both["calibration_error"] <= 1
    assert (found["baseline"], seven["difference"]) == ("seven", None)
    for run in (both, ranks, bottleneck):
        assert run["difference"]["value"] == pytest.approx(run["mean"]["value"] - seven["mean"]["value"])
    oof = [Run(finished_run / "runs" / name).fold(1).predictions()[0].sort_values("id") for name in members]
    blended = (oof[0]["probability"].to_numpy() + oof[1]["probability"].to_numpy()) / 2
    assert both["oof_auc"]["1"] == pytest.approx(roc_auc_score(oof[0]["label"], blended))


def test_slides_are_the_unit_where_a_map_is_given(evaluate: Command, others: Others, tmp_path: Path) -> None:
    slides = tmp_path / "slides.csv"
    table = others.table.assign(wsi=[f"slide{n // 4}" for n in range(12)])[["id", "wsi"]]
    for lacking, units in ((0, 3), (1, 4)):
        table[lacking:].to_csv(slides, index=False)
        outcome = evaluate("bottleneck", "--slides", str(slides), "--format", "json")
        found = json.loads(outcome.out)
        assert (found["unit"], found["runs"][0]["mean"]["units"]) == ("slide", units)
        assert ("lacks 1 of 12 patches" in outcome.err) == bool(lacking)


def predict(work: Path, run: str, patches: Path) -> pd.DataFrame:
    line = ["evaluate", run, "--work", str(work), "--patches", str(patches), "--out", str(work / "out.csv")]
    assert main(line) == 0
    return pd.read_csv(work / "out.csv", dtype={"id": str}).set_index("id")


def write_patches(folder: Path, suffix: str, count: int) -> Path:
    folder.mkdir()
    for n in range(count):
        Image.fromarray(np.random.default_rng(n).integers(0, 200, (96, 96, 3), np.uint8)).save(folder / f"{n:03d}{suffix}")
    return folder


def test_any_patches_are_predicted_as_with_labels(evaluate: Command, finished_run: Path, tmp_path: Path) -> None:
    pngs, tifs = (write_patches(tmp_path / suffix, suffix, 300) for suffix in (".PNG", ".tif"))
    table, labels = predict(finished_run, "bottleneck", pngs), tmp_path / "labels.csv"
    assert [*table.index, *table] == [*(f"{n:03d}" for n in range(300)), "probability", "fold_0", "fold_1", "fold_2"]
    pd.testing.assert_frame_equal(predict(finished_run, "bottleneck", tifs), table)
    np.testing.assert_allclose(table["probability"], table.filter(like="fold_").mean(axis=1))
    pd.DataFrame({"id": table.index, "label": np.arange(300) % 2}).to_csv(labels, index=False)
    result(evaluate, "bottleneck", "--patches", str(tifs), "--labels", str(labels), "--ids", "names", "--name", "others")
    pd.testing.assert_frame_equal(stored(finished_run).set_index("id").filter(like="fold_"), table.filter(like="fold_"))


def test_few_and_train_patches_are_warned_of(data: Data, finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few, config = write_patches(finished_run / "few", ".jpg", 254), finished_run / "runs/bottleneck/config.json"
    Image.open(first_tif(data)).save(few / "mine.png")
    table = predict(finished_run, "bottleneck", few)
    norm, trained = "predicts with norm=train, since there are fewer than 256", "was trained on 1 of these 255 patches (mine)"
    assert [*map(capsys.readouterr().err.count, (norm, trained, "\n"))] == [1, 1, 2]
    config.write_text(config.read_text().replace('"norm": "test"', '"norm": "train"'))
    pd.testing.assert_frame_equal(predict(finished_run, "bottleneck", few), table)
    assert norm not in capsys.readouterr().err


def test_a_blend_predicts_the_mean_of_its_members(others: Others, finished_run: Path, pcam: Command) -> None:
    second = Run(shutil.copytree(finished_run / "runs/bottleneck", finished_run / "runs/second"))
    for method in ("mean", "rank"):
        assert pcam("blend", "bottleneck", "second", "--name", method, "--method", method).status == 0
    shutil.copy(second.fold(1).best_checkpoint, second.fold(0).best_checkpoint)
    one, other, mean, rank = (predict(finished_run, n, others.patches) for n in ("bottleneck", "second", "mean", "rank"))
    assert not one["fold_0"].equals(other["fold_0"])
    pd.testing.assert_frame_equal(mean, (one + other) / 2)
    assert rank.columns[0] == "mean_rank"


def test_what_cannot_be_predicted_is_one_line(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for add, options, message in (
        (lambda folder: (folder / "000.png").touch(), [], "/000.tif: a second file of its id; remove it or 000.png"),
        (lambda folder: Image.new("RGB", (95, 96)).save(folder / "small.png"), [], "/small.png: is 95x96 px RGB, not 96x96"),
        (lambda folder: (folder / "cut.jpeg").touch(), [], "/cut.jpeg: can't be decoded"),
        (lambda folder: (folder / "000.tif").unlink(), [], "holds no TIF"),
        (Path.exists, ["second"], "give either"),
        (Path.exists, ["--labels", "labels.csv"], "give either --labels"),
        (Path.exists, ["--out", "/"], "--out /: is a folder"),
        (Path.exists, ["--out", "/dev/null/out.csv"], "--out /dev/null/out.csv: is a folder, or can't be written"),
    ):
        root, out = write_patches(finished_run / message[-9:], ".tif", 1), finished_run / "out.csv"
        add(root)
        line = ["evaluate", "--out", str(out), "bottleneck", *options, "--work", str(finished_run), "--patches", str(root)]
        assert main(line) == 2
        assert message in capsys.readouterr().err
        assert not out.exists()
