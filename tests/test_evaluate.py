"""Evaluation on other labelled patches: leaks are refused, scores are those of the predictions, and results are reused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import Others, Outcome
from numpy.typing import NDArray
from pcam_kaggle.training.perturb import PERTURBATIONS, Perturbed
from sklearn.metrics import roc_auc_score

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.files import file_sha256
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.stain import Image
from pcam_kaggle.runs.run import Run


@pytest.fixture
def evaluate(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return `pcam evaluate` in the workspace of a finished run."""

    def call(*arguments: str) -> Outcome:
        capsys.readouterr()
        status = main(["evaluate", "--work", str(finished_run), *arguments])
        return Outcome(status, *capsys.readouterr())

    return call


def result(outcome: Outcome) -> dict:
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


def test_scores_are_those_of_the_stored_predictions(
    evaluate: Callable[..., Outcome], others: Others, finished_run: Path
) -> None:
    found = result(evaluate("bottleneck", *others.options, "--format", "json"))
    table = pd.read_csv(finished_run / "evaluations/others/unchanged/bottleneck.csv", dtype={"id": str})
    assert table["id"].tolist() == sorted(others.table["id"])
    labels = table["id"].map(others.table.set_index("id")["label"])
    folds = [f"fold_{number}" for number in range(3)]
    assert found["runs"][0]["mean"]["value"] == pytest.approx(roc_auc_score(labels, table[folds].mean(axis=1)))
    each = [roc_auc_score(labels, table[fold]) for fold in folds]
    assert [*found["runs"][0]["fold_auc"].values()] == pytest.approx(each)
    oof = Run(finished_run / "runs/bottleneck").oof()
    fold_auc = [roc_auc_score(part["label"], part["probability"]) for _, part in oof.groupby("fold")]
    assert found["runs"][0]["fall"] == pytest.approx(np.mean(fold_auc) - np.mean(each))


def test_a_patch_predicted_in_training_gets_the_same_probability_here(
    evaluate: Callable[..., Outcome], finished_run: Path, data: Data, tmp_path: Path
) -> None:
    """The test set is no train patch, so it may be evaluated: each fold's prediction must be that of `predict`."""
    labels = tmp_path / "test" / "labels.csv"
    labels.parent.mkdir()
    ids = pd.read_csv(data.sample, dtype={"id": str})["id"]
    pd.DataFrame({"id": ids, "label": np.arange(len(ids)) % 2}).to_csv(labels, index=False)
    result(evaluate("bottleneck", "--patches", str(data.patches("test")), "--labels", str(labels), "--format", "json"))
    table = pd.read_csv(finished_run / "evaluations/test/unchanged/bottleneck.csv", dtype={"id": str}).set_index("id")
    for number in range(3):
        predicted = pd.read_csv(finished_run / f"runs/bottleneck/fold_{number}/test.csv", dtype={"id": str}).set_index("id")
        np.testing.assert_allclose(table[f"fold_{number}"], predicted["probability"].reindex(table.index), atol=1e-6)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_patch_that_was_trained_on_is_refused(
    evaluate: Callable[..., Outcome], others: Others, data: Data, finished_run: Path, renamed: bool
) -> None:
    leaked = pd.read_csv(data.labels, dtype={"id": str}).iloc[0]
    name = "other_name" if renamed else leaked["id"]
    shutil.copy(data.patches("train") / f"{leaked['id']}.tif", others.patches / f"{name}.tif")
    others.table.loc[len(others.table)] = [name, leaked["label"]]
    others.save()
    outcome = evaluate("bottleneck", *others.options, *(["--ids", "names"] if renamed else []))
    assert outcome.status == 2
    assert f"was trained on 1 of these 13 patches ({name})" in outcome.err
    assert not (finished_run / "evaluations/others/unchanged").exists()


def test_a_run_whose_fold_file_is_gone_is_refused(evaluate: Callable[..., Outcome], others: Others, finished_run: Path) -> None:
    (finished_run / "folds/stratified_3_42.csv").unlink()
    outcome = evaluate("bottleneck", *others.options)
    assert outcome.status == 2
    assert "its train patches are not known" in outcome.err


def test_ids_that_are_not_hashes_need_names(evaluate: Callable[..., Outcome], tmp_path: Path) -> None:
    named = Others(tmp_path / "named", [f"patient_{number}" for number in range(12)])
    refused = evaluate("bottleneck", *named.options)
    assert refused.status == 2
    assert "--ids names" in refused.err
    assert result(evaluate("bottleneck", *named.options, "--ids", "names", "--format", "json"))["patches"] == 12


def test_predictions_are_reused_until_a_checkpoint_or_a_patch_changes(
    evaluate: Callable[..., Outcome], others: Others, finished_run: Path, pcam: Callable[..., Outcome]
) -> None:
    file = finished_run / "evaluations/others/unchanged/bottleneck.csv"
    first, written = evaluate("bottleneck", *others.options), file.stat().st_mtime_ns
    again = evaluate("bottleneck", *others.options)
    assert (again.out, file.stat().st_mtime_ns) == (first.out, written)
    shutil.copy(finished_run / "runs/bottleneck/fold_0/best.pt", finished_run / "runs/bottleneck/fold_1/best.pt")
    assert evaluate("bottleneck", *others.options).status == 2
    assert pcam("predict").status == 0
    assert evaluate("bottleneck", *others.options).status == 0
    table = pd.read_csv(file)
    assert table["fold_0"].equals(table["fold_1"])
    config = finished_run / "runs/bottleneck/config.json"
    config.write_text(config.read_text().replace('"tta": 4', '"tta": 1'))
    assert evaluate("bottleneck", *others.options).status == 0
    assert not pd.read_csv(file).equals(table)


def test_results_of_other_patches_are_not_replaced(evaluate: Callable[..., Outcome], others: Others) -> None:
    assert evaluate("bottleneck", *others.options).status == 0
    others.table["label"] = 1 - others.table["label"]
    others.save()
    refused = evaluate("bottleneck", *others.options)
    assert refused.status == 2
    assert "choose another name with --name" in refused.err
    assert evaluate("bottleneck", *others.options, "--name", "swapped").status == 0


def test_folds_that_cannot_be_compared_are_named(
    evaluate: Callable[..., Outcome], others: Others, pcam: Callable[..., Outcome], finished_run: Path
) -> None:
    assert pcam("train", "--folds", "1", "--set", "seed=7", "--name", "part").status == 0
    for arguments, printed in (
        (["part", "--folds", "0"], "fold 0 is not trained"),
        (["bottleneck", "--folds", "7"], "bottleneck has folds 0 to 2"),
        (["bottleneck", "part"], "other folds are trained in each run (bottleneck 0,1,2, part 1)"),
        (["bottleneck", "unheard"], "no such run"),
        (["bottleneck", "--baseline", "part"], "--baseline part: not among bottleneck"),
    ):
        outcome = evaluate(*arguments, *others.options)
        assert outcome.status == 2
        assert printed in outcome.err
        assert outcome.err.count("\n") == 1
    assert evaluate("bottleneck", "part", "--folds", "1", *others.options).status == 0


def test_test_patches_that_a_teacher_labelled_are_refused(
    evaluate: Callable[..., Outcome], pcam: Callable[..., Outcome], data: Data, finished_run: Path, tmp_path: Path
) -> None:
    student = ["--set", "teacher=bottleneck", "--name", "student", "--folds", "1"]
    assert pcam("train", *student).status == 0
    ids = pd.read_csv(data.sample, dtype={"id": str})["id"]
    pd.DataFrame({"id": ids, "label": np.arange(len(ids)) % 2}).to_csv(tmp_path / "labels.csv", index=False)
    patches = ["--patches", str(data.patches("test")), "--labels", str(tmp_path / "labels.csv"), "--name", "test"]
    outcome = evaluate("student", *patches)
    assert outcome.status == 2
    assert "student: was trained on 7 of these 7 patches" in outcome.err
    assert not (finished_run / "runs/student/fold_0").exists()


def test_few_patches_are_said_to_be_few_for_batch_norm_statistics(
    evaluate: Callable[..., Outcome], others: Others, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "takes batch norm statistics from these 12 patches" in evaluate("bottleneck", *others.options).err
    monkeypatch.setattr("pcam_kaggle.training.held_out.FEW_PATCHES", 12)
    assert not evaluate("bottleneck", *others.options).err


def test_a_run_on_named_patches_says_that_renamed_ones_go_unnoticed(
    evaluate: Callable[..., Outcome], others: Others, finished_run: Path
) -> None:
    folds, config = finished_run / "folds/stratified_3_42.csv", finished_run / "runs/bottleneck/config.json"
    before = file_sha256(folds)
    table = pd.read_csv(folds)
    table.assign(id=[f"patch_{n}" for n in range(len(table))]).to_csv(folds, index=False)
    config.write_text(config.read_text().replace(before, file_sha256(folds)))
    outcome = evaluate("bottleneck", *others.options)
    assert outcome.status == 0
    assert "train patches under other names are not recognised" in outcome.err


def test_a_blend_is_the_weighted_mean_of_its_members(
    evaluate: Callable[..., Outcome], others: Others, finished_run: Path, pcam: Callable[..., Outcome]
) -> None:
    assert pcam("pipeline", "--set", "seed=7", "--name", "seven").status == 0
    assert pcam("blend", "bottleneck", "seven", "--name", "both").status == 0
    found = result(evaluate("both", "bottleneck", "seven", *others.options, "--format", "json", "--baseline", "seven"))
    tables = [
        pd.read_csv(finished_run / f"evaluations/others/unchanged/{name}.csv").filter(like="fold_")
        for name in ("bottleneck", "seven")
    ]
    labels = pd.read_csv(finished_run / "evaluations/others/unchanged/seven.csv")["label"]
    both = (tables[0] + tables[1]) / 2
    assert found["runs"][0]["mean"]["value"] == pytest.approx(roc_auc_score(labels, both.mean(axis=1)))
    assert found["runs"][0]["fold_auc"]["1"] == pytest.approx(roc_auc_score(labels, both["fold_1"]))
    assert [run["difference"] is None for run in found["runs"]] == [False, False, True]
    tables = [Run(finished_run / "runs" / name).fold(1).predictions()[0].sort_values("id") for name in ("bottleneck", "seven")]
    blended = (tables[0]["probability"].to_numpy() + tables[1]["probability"].to_numpy()) / 2
    assert found["runs"][0]["oof_auc"]["1"] == pytest.approx(roc_auc_score(tables[0]["label"], blended))
    assert found["runs"][1]["difference"]["value"] == pytest.approx(
        found["runs"][1]["mean"]["value"] - found["runs"][2]["mean"]["value"]
    )


def test_a_rank_blend_has_no_calibration(
    evaluate: Callable[..., Outcome], others: Others, finished_run: Path, pcam: Callable[..., Outcome]
) -> None:
    assert pcam("pipeline", "--set", "seed=7", "--name", "seven").status == 0
    assert pcam("blend", "bottleneck", "seven", "--name", "ranks", "--method", "rank").status == 0
    found = result(evaluate("ranks", *others.options, "--format", "json"))
    assert found["runs"][0]["calibration_error"] is None
    columns = [
        pd.read_csv(finished_run / f"evaluations/others/unchanged/{name}.csv")["fold_2"].rank()
        for name in ("bottleneck", "seven")
    ]
    labels = pd.read_csv(finished_run / "evaluations/others/unchanged/seven.csv")["label"]
    assert found["runs"][0]["fold_auc"]["2"] == pytest.approx(roc_auc_score(labels, sum(columns)))


@pytest.mark.parametrize("form", ["text", "md", "csv"])
def test_every_format_names_each_run(form: str, evaluate: Callable[..., Outcome], others: Others) -> None:
    outcome = evaluate("bottleneck", *others.options, "--format", form)
    assert outcome.status == 0, outcome.err
    assert "bottleneck" in outcome.out


def test_slides_are_the_unit_where_a_map_is_given(evaluate: Callable[..., Outcome], others: Others, tmp_path: Path) -> None:
    slides = tmp_path / "slides.csv"
    others.table.assign(wsi=[f"slide{n // 4}" for n in range(12)])[["id", "wsi"]].to_csv(slides, index=False)
    found = result(evaluate("bottleneck", *others.options, "--slides", str(slides), "--format", "json"))
    assert (found["unit"], found["runs"][0]["mean"]["units"]) == ("slide", 3)


def test_perturbations_are_scored_on_the_chosen_folds(
    evaluate: Callable[..., Outcome], others: Others, finished_run: Path
) -> None:
    found = result(evaluate("bottleneck", *others.options, "--folds", "1", "--perturb", "--format", "json"))
    assert [*found["runs"][0]["changed"]] == [*PERTURBATIONS]
    assert [*found["runs"][0]["fold_auc"]] == ["1"]
    unchanged = pd.read_csv(finished_run / "evaluations/others/unchanged/bottleneck.csv")
    for change, area in found["runs"][0]["changed"].items():
        table = pd.read_csv(finished_run / f"evaluations/others/{change}/bottleneck.csv")
        assert (table["fold_1"] != unchanged["fold_1"]).any()
        assert area == pytest.approx(roc_auc_score(table["label"], table["fold_1"]))


@pytest.fixture
def patch() -> Image:
    """A patch of smooth tissue colours."""
    rng = np.random.default_rng(1)
    coarse = rng.integers(60, 240, (12, 12, 3)).astype(np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_perturbation_changes_a_patch_and_depends_on_nothing_else(name: str, patch: Image) -> None:
    class One:
        def images(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
            return np.stack([patch if row == 1 else patch[::-1] for row in rows])

    perturbed = Perturbed(One(), PERTURBATIONS[name])
    alone, together = perturbed.images(np.array([1]))[0], perturbed.images(np.array([0, 1]))[1]
    assert alone.dtype == np.uint8
    assert alone.shape == patch.shape
    assert (alone != patch).any()
    assert np.array_equal(alone, together)


def test_perturbations_do_what_they_are_called(patch: Image) -> None:
    luma = np.array([0.299, 0.587, 0.114])
    values = patch.astype(float)
    made = {name: change(patch).astype(float) for name, change in PERTURBATIONS.items()}
    np.testing.assert_allclose(made["brightness_0.8"], values * 0.8, atol=0.51)
    np.testing.assert_allclose(made["chroma_blur_1.5"][40:56, 40:56] @ luma, values[40:56, 40:56] @ luma, atol=12)
    grey = (values @ luma)[..., None]
    np.testing.assert_allclose(made["saturation_0.7"], grey + 0.7 * (values - grey), atol=1.5)
    assert np.std(made["noise_10"] - values) == pytest.approx(10, abs=0.5)
    # Haematoxylin absorbs more red than eosin does.
    assert made["more_haematoxylin"][..., 0].mean() < values[..., 0].mean() < made["more_eosin"][..., 0].mean()
    # Orange to yellow: hue turned by ten degrees.
    orange = np.full((96, 96, 3), (200, 100, 0), np.uint8)
    assert PERTURBATIONS["hue_+10"](orange)[0, 0].tolist() == pytest.approx([200, 133, 0], abs=4)
