"""Predictions of runs for a set of labelled patches, and their scores, as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pcam_kaggle.core.files import file_sha256, read_json, write_csv, write_json
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.run import Run

UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The predictions and scores of runs on a set of labelled patches, in `folder`.

    - `<change>/<run>.csv`: id, label, and the probability by the net of each fold, `fold_<k>`, in [0, 1]; `change` is
      `unchanged` or the name of a perturbation
    - `<change>/<run>.json`: the hash of that table and of what it was computed from
    - `result.json`: the scores of the runs that were evaluated last
    """

    folder: Path

    @property
    def name(self) -> str:
        """Name of the set of patches."""
        return self.folder.name

    def predictions(self, run: str, change: str, sources: dict[str, Any]) -> pd.DataFrame | None:
        """Return the predictions of `run` for the patches under `change` if they were computed from `sources`."""
        table, record = self._files(run, change)
        if not (table.is_file() and record.is_file()):
            return None
        if read_json(record) != {"sources": sources, "csv_sha256": file_sha256(table)}:
            return None
        return read_numbers(table, ["label", *(f"fold_{number}" for number in sources["checkpoints"])])

    def current(self, run: Run) -> pd.DataFrame | None:
        """Return the stored predictions of `run` for the unchanged patches, None if none are by its present checkpoints."""
        table, record = self._files(run.name, UNCHANGED)
        if not (table.is_file() and record.is_file()):
            return None
        made = read_json(record, sources=dict, csv_sha256=str)
        checkpoints = made["sources"]["checkpoints"]
        files = {number: run.fold(int(number)).best_checkpoint for number in checkpoints}
        if any(not file.is_file() or file_sha256(file) != checkpoints[number] for number, file in files.items()):
            return None
        return self.predictions(run.name, UNCHANGED, made["sources"])

    def write_predictions(self, run: str, change: str, sources: dict[str, Any], predicted: pd.DataFrame) -> None:
        """Write the predictions of `run` for the patches under `change`, computed from `sources`."""
        table, record = self._files(run, change)
        write_csv(table, predicted)
        write_json(record, {"sources": sources, "csv_sha256": file_sha256(table)})

    @property
    def has_result(self) -> bool:
        """Whether runs have been scored on the set."""
        return (self.folder / "result.json").exists()

    def write_result(self, result: dict[str, Any]) -> None:
        """Write the scores."""
        write_json(self.folder / "result.json", result)

    def result(self) -> dict[str, Any]:
        """Return the scores; raises UserError if there are none or the file is damaged."""
        return read_json(self.folder / "result.json", patches=int, patches_sha256=str, runs=list)

    def _files(self, run: str, change: str) -> tuple[Path, Path]:
        return self.folder / change / f"{run}.csv", self.folder / change / f"{run}.json"
