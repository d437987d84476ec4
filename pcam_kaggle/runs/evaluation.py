"""Predictions of runs for a held-out set, and their scores, as files."""

import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import file_sha256, write_csv
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.records import HeldOutRecord, HeldOutSources
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.held_out import EvaluationResult

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The predictions and scores of runs on a held-out set, in `folder`.

    - `predictions/<run>.csv`: id, label, and the probability by the model of each fold, `fold_<k>`, in [0, 1]
    - `predictions/<run>.json`: the hash of that table and of what it was computed from
    - `result.json`: the scores of the runs that were evaluated last
    """

    folder: Path

    @property
    def result_file(self) -> Path:
        """File of the scores."""
        return self.folder / "result.json"

    def predictions(self, run: str, sources: HeldOutSources) -> pd.DataFrame | None:
        """Return the predictions of `run` if they were computed from `sources`."""
        table, record = self._files(run)
        if not (table.is_file() and record.is_file()):
            return None
        if HeldOutRecord.read(record) != HeldOutRecord(sources=sources, csv_sha256=file_sha256(table)):
            return None
        return read_numbers(table, ["label", *(f"fold_{number}" for number in sources.checkpoints)])

    def current(self, run: Run) -> pd.DataFrame | None:
        """Return the predictions of `run` by its present checkpoints for the scored patches; None if lacking or damaged."""
        record = self._files(run.name)[1]
        if not (record.is_file() and self.result_file.is_file()):
            return None
        try:
            # Predictions of an evaluation that failed may be of patches or labels that have been corrected since.
            sources, scored = HeldOutRecord.read(record).sources, EvaluationResult.read(self.result_file)
            best = {number: run.fold(number).best_checkpoint for number in sources.checkpoints}
            hashes = {number: file_sha256(file) for number, file in best.items() if file.is_file()}
            is_current = (hashes, scored.patches_sha256) == (sources.checkpoints, sources.patches_sha256)
            return self.predictions(run.name, sources) if is_current else None
        except UserError as error:
            log.warning("left out: %s", error)
            return None

    def write_predictions(self, run: str, sources: HeldOutSources, predicted: pd.DataFrame) -> None:
        """Write the predictions of `run`, computed from `sources`."""
        table, record = self._files(run)
        write_csv(table, predicted)
        HeldOutRecord(sources=sources, csv_sha256=file_sha256(table)).write(record)

    def _files(self, run: str) -> tuple[Path, Path]:
        return self.folder / "predictions" / f"{run}.csv", self.folder / "predictions" / f"{run}.json"
