"""The JSON files of a run: those of earlier versions are read, and a damaged one is a line that names file and field."""

import json
from pathlib import Path
from typing import Any

import pytest

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.records import Record
from pcam_kaggle.runs.fold import LOG_COLUMNS, Fold
from pcam_kaggle.runs.records import BackendRecord, Environment, FoldMetrics, HeldOutRecord, PredictionsRecord, RunConfig
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import SubmissionRecord
from pcam_kaggle.scoring.held_out import EvaluationResult
from pcam_kaggle.scoring.results import BlendMetrics, Estimate

ESTIMATE = {"value": 0.9, "low": 0.8, "high": 1.0}
DIFFERENCE = ESTIMATE | {"error": 0.1, "p": 0.5, "unit": "slide", "units": 3, "undefined": ""}
BLEND = {"members": {"a": 1.0}, "method": "climb", "folds_sha256": "f", "fold_auc": [0.9], "mean": 0.9, "pooled": ESTIMATE}
BLEND |= {"ranked": ESTIMATE}
BACKEND = {"kind": "cuda", "precision": "bf16", "memory_format": "contiguous"}
FOLD = {"fold": 0, "valid_auc": 0.9, "parameters": 10, "seconds": 1.5, "images_per_second": 100.0}
SUBMISSION = {"sha256": "0123456789abcdefgh", "run": "a", "members": {"a": 1.0}, "method": "mean", "oof_auc": ESTIMATE}
HELD_OUT = {"patches_sha256": "s", "checkpoints": {"0": "c"}, "config": {}, "backend": BACKEND}
RESULT = {"name": "x", "patches_sha256": "s", "patches": 9, "positives": 3, "unit": "patch", "baseline": "a"}
SCORE = {"run": "a", "fold_auc": {"0": 0.8, "1": 0.9}, "mean": ESTIMATE}

# A file of an earlier version, and the values of fields that it lacks or that are of another type there.
EARLIER: list[tuple[type[Record], dict[str, Any], dict[str, Any]]] = [
    (RunConfig, {"config": {"optimizer": "logistic"}, "folds": "name", "folds_sha256": "f"}, {"weights_sha256": None}),
    (FoldMetrics, FOLD, {"epoch": None, "penalty": None, "macs": 0}),
    (BlendMetrics, BLEND, {"scheme": "", "sd": None, "pooled": Estimate(**ESTIMATE, unit="patch", units=0)}),
    (BlendMetrics, BLEND | {"asked": "climb", "gain_of_weights": DIFFERENCE}, {"method": "climb"}),
    (PredictionsRecord, {"sources": {}, "files": {"oof.csv": "h"}}, {"images_per_second": 0.0}),
    (SubmissionRecord, SUBMISSION, {"missing_folds": [], "public_score": None, "mark": "0123456789abcdef"}),
    (HeldOutRecord, {"sources": HELD_OUT, "csv_sha256": "h"}, {}),
    (EvaluationResult, RESULT | {"runs": [SCORE | {"single": 0.7, "fall": 0.1, "changed": {"noise_10": 0.5}}]}, {}),
]


@pytest.mark.parametrize(("kind", "content", "expected"), EARLIER)
def test_a_file_of_another_version_is_read(
    kind: type[Record], content: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "file.json"
    file.write_text(json.dumps(content | {"of_a_later_version": 1}))
    made = kind.read(file)
    assert {key: getattr(made, key) for key in expected} == expected
    made.write(file)
    assert "of_a_later_version" not in file.read_text()
    assert kind.read(file) == made


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (FoldMetrics, None, "no such file"),
        (FoldMetrics, "{", "Invalid JSON"),
        (FoldMetrics, json.dumps(FOLD | {"seconds": "1.5"}), "seconds: Input should be a valid number"),
        (FoldMetrics, json.dumps(FOLD | {"seconds": float("nan")}), "seconds: Input should be a finite number"),
        (BlendMetrics, json.dumps(BLEND | {"pooled": {"value": 0.5}}), "pooled.low: Field required"),
        (SubmissionRecord, json.dumps({**SUBMISSION, "oof_auc": None}), "oof_auc: "),
    ],
)
def test_a_damaged_file_is_one_line_with_its_field(kind: type[Record], text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=rf"^{file}: {message}") as caught:
        kind.read(file)
    assert "\n" not in str(caught.value)


def test_scores_of_a_held_out_set_are_computed_when_they_are_read() -> None:
    (run,) = EvaluationResult.model_validate_json(json.dumps(RESULT | {"runs": [SCORE | {"single": 0.7}]})).runs
    assert (run.single, run.drop) == (pytest.approx(0.85), None)


@pytest.mark.parametrize("is_list", [False, True])
def test_environments_of_earlier_versions_are_read(is_list: bool, tmp_path: Path) -> None:
    run, entry, backend = Run(tmp_path), {"backend": BACKEND, "started": "before"}, BackendRecord(**BACKEND)
    (run.folder / "environment.json").write_text(json.dumps([entry] if is_list else entry))
    first, second = Environment(backend=backend, started="before"), Environment(backend=backend)
    assert run.environments() == [first]
    for _ in range(2):
        run.add_environment(second)
    assert run.environments() == [first, second]
    measured = first.model_copy(update={"measured": {"loader_wait": 0.25}})
    run.add_environment(measured)
    assert run.environments() == [measured, second]
    for damaged in ("{", '[{"device": 3}]'):
        (run.folder / "environment.json").write_text(damaged)
        with pytest.raises(UserError, match=r"environment\.json: not in the format of this version"):
            run.environments()


def test_a_log_of_an_earlier_version_lacks_the_last_columns(tmp_path: Path) -> None:
    fold = Fold(tmp_path, 0)
    assert fold.log().columns.tolist() == LOG_COLUMNS
    row = {"epoch": 1, "train_loss": 0.5, "valid_auc": 0.75}
    fold.write_log([row, {**row, "valid_loss": 0.25}])
    log = fold.log()
    assert log.columns.tolist() == LOG_COLUMNS
    assert log.iloc[0, :3].tolist() == [1, 0.5, 0.75]
    assert log.iloc[0, 3:].isna().all()
    assert log["valid_loss"][1] == 0.25
