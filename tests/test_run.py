"""A run tells what is in its folder and when it is complete, and refuses predictions that are damaged or outdated."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from made_runs import noisy, write_blended_run, write_run

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import file_sha256, read_json, write_json
from pcam_kaggle.core.logs import configure_logging
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import blend

MADE = noisy("a", 1, 1)


def test_the_folds_of_a_run_are_those_of_its_config(tmp_path: Path) -> None:
    run = write_run(tmp_path, MADE)
    assert [fold.number for fold in run.folds()] == [0, 1, 2]
    made = read_json(run.config_file)
    for n_splits in (1, "many", None):
        write_json(run.config_file, made | {"config": {"n_splits": n_splits}})
        with pytest.raises(UserError, match="n_splits"):
            run.folds()


def test_missing_folds_are_listed_when_some_are_chosen(tmp_path: Path) -> None:
    run = write_run(tmp_path, MADE, lambda table: table.iloc[::-1])
    assert run.predictions().missing == []
    some = run.predictions([2, 0])
    assert (some.name, some.scheme, some.folds_sha256, some.missing) == ("a", MADE.scheme, MADE.folds_sha256, [1])
    expected = MADE.oof[MADE.oof["fold"] != 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(some.oof, expected, check_dtype=False)
    for table, number in zip(some.tests, (2, 0), strict=True):
        pd.testing.assert_frame_equal(table, MADE.tests[number])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run.fold(1).folder / "test.csv").write_text("id,prob"), "fold_1/test.csv: missing or changed"),
        (lambda run: (run.fold(1).folder / "oof.csv").unlink(), "fold_1/oof.csv: missing or changed"),
        (lambda run: (run.fold(0).folder / "predictions.json").unlink(), "no predictions of fold 0"),
        (lambda run: run.config_file.unlink(), "a: no such run"),
        (lambda run: run.fold(1).best_checkpoint.write_bytes(b"weights"), "fold_1: trained again since it was predicted"),
    ],
)
def test_damaged_predictions_are_refused(damage: Callable[[Run], object], message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, MADE)
    damage(run)
    with pytest.raises(UserError, match=message):
        run.predictions()


def test_a_blend_is_written_once_and_read_sorted_by_id_and_replaces_no_experiment(tmp_path: Path) -> None:
    run, made = Run(tmp_path / "ab"), blend([MADE, noisy("b", 1, 2)], "mean")
    metrics, new = run.write_blend(made)
    assert new
    hashes = {"oof_sha256": file_sha256(run.folder / "oof.csv"), "test_sha256": file_sha256(run.folder / "test.csv")}
    assert metrics == run.blend_metrics() == made.metrics.model_copy(update=hashes)
    assert run.write_blend(made) == (metrics, False)
    pd.testing.assert_frame_equal(run.oof(), made.oof, check_exact=True)
    pd.testing.assert_frame_equal(run.test(), made.test, check_exact=True)
    assert run.write_blend(blend([noisy("b", 1, 2), MADE], "rank"))[1]
    with pytest.raises(UserError, match="--name"):
        write_run(tmp_path, MADE).write_blend(made)


@pytest.mark.parametrize("name", ["oof.csv", "test.csv", "metrics.json"])
@pytest.mark.parametrize("loss", ["gone", "other"])
def test_an_incomplete_blend_is_written_again(name: str, loss: str, tmp_path: Path) -> None:
    run = write_blended_run(tmp_path, MADE)
    file = run.folder / name
    before = file.read_text()
    file.write_text(before.replace('"mean",', '"other",') if name == "metrics.json" else "other")
    if loss == "gone":
        file.unlink()
    if name != "metrics.json":
        with pytest.raises(UserError, match="blend"):
            run.oof() if name == "oof.csv" else run.test()
    assert run.write_blend(blend([MADE], "mean"))[1]
    assert file.read_text() == before


def test_empty_logs_are_left_out_and_damaged_ones_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    run = Run(tmp_path)
    row = dict.fromkeys(("epoch", "train_loss", "valid_auc", "seconds", "valid_seconds"), 1.0)
    for number in (0, 1, 2):
        run.fold(number).write_log([row, row])
    (run.fold(1).folder / "log.csv").write_text("epoch,train_loss,valid_auc\n")
    (run.fold(2).folder / "log.csv").write_text("damaged")
    (tmp_path / "fold_0_old").mkdir()
    assert {number: len(log) for number, log in run.logs().items()} == {0: 2}
    assert "fold_2/log.csv: not a training log" in capsys.readouterr().err
