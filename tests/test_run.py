"""A run tells what is in its folder and when it is complete."""

from pathlib import Path

import pandas as pd
import pytest

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import write_json
from pcam_kaggle.core.logs import configure_logging
from pcam_kaggle.runs.run import Run

OOF = pd.DataFrame({"id": ["b", "a"], "label": [1, 0], "fold": [0, 1], "probability": [0.75, 0.25]})
TEST = pd.DataFrame({"id": ["c"], "probability": [0.5]})


def test_the_folds_of_a_run_are_those_of_its_config(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"config": {"n_splits": 3}})
    assert [fold.number for fold in Run(tmp_path).folds()] == [0, 1, 2]
    for config in ({}, {"n_splits": 1}, {"n_splits": "many"}, {"n_splits": None}):
        write_json(tmp_path / "config.json", {"config": config})
        with pytest.raises(UserError, match=r"config\.json|n_splits"):
            Run(tmp_path).folds()


def test_a_blend_is_written_once_and_read_sorted_by_id(tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    metrics, new = run.write_blend(OOF, TEST, {"mean": 1.0})
    assert new
    assert run.write_blend(OOF, TEST, {"mean": 1.0}) == (metrics, False)
    assert run.write_blend(OOF, TEST, {"mean": 0.5})[1]
    assert run.oof()["id"].tolist() == ["a", "b"]
    assert run.test()["probability"].tolist() == [0.5]


@pytest.mark.parametrize("name", ["oof", "test"])
def test_changed_predictions_of_a_blend_are_refused(name: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "a")
    run.write_blend(OOF, TEST, {})
    file = run.folder / f"{name}.csv"
    file.write_bytes(file.read_bytes().replace(b"0.", b".0"))
    with pytest.raises(UserError, match="blend"):
        getattr(run, name)()


def test_damaged_logs_are_left_out_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    run = Run(tmp_path)
    row = dict.fromkeys(("epoch", "train_loss", "valid_auc", "seconds", "valid_seconds"), 1.0)
    for number in (0, 2):
        run.fold(number).write_log([row, row])
    (run.fold(2).folder / "log.csv").write_text("damaged")
    (tmp_path / "fold_0_old").mkdir()
    assert {number: len(log) for number, log in run.logs().items()} == {0: 2}
    assert "fold_2/log.csv: not a training log" in capsys.readouterr().err
