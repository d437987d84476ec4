"""One fold of a run: its files, and when each of them is complete."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from pcam_kaggle.core.errors import UserError, program
from pcam_kaggle.core.files import file_sha256, write_csv
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.records import FoldMetrics, PredictionSources, PredictionsRecord, TeacherRecord

LOG_COLUMNS = ["epoch", "train_loss", "valid_auc", "valid_loss", "seconds", "valid_seconds"]
# The tables of predictions, and the columns of numbers in each.
PREDICTIONS = {"oof.csv": ["label", "probability"], "test.csv": ["probability"]}
# In the order in which an import copies them: the fold is older than its source until the last three are there.
FOLD_FILES = ("teacher.json", "best.pt", "log.csv", *PREDICTIONS, "last.pt", "metrics.json", "predictions.json")


@dataclass(frozen=True, slots=True)
class Fold:
    """Fold `number` (0-based) of the run in `run_folder`, whose files are, in the order in which they are written.

    - `teacher.json`: name of the teacher and hash of its model, if the fold has one
    - `last.pt`: state after the last finished epoch, from which training resumes; a probe has none
    - `best.pt`: EMA of the weights in the epoch with the highest validation AUC, without those of frozen layers
    - `log.csv`: a row per finished epoch; a probe has none
    - `metrics.json`: result of a finished training
    - `oof.csv`, `test.csv`: predictions of the validation part and of the test set
    - `predictions.json`: hashes of both tables and of what they were computed from
    """

    run_folder: Path
    number: int

    @property
    def folder(self) -> Path:
        """Folder of the fold's files."""
        return self.run_folder / f"fold_{self.number}"

    @property
    def last_checkpoint(self) -> Path:
        """State after the last finished epoch."""
        return self.folder / "last.pt"

    @property
    def best_checkpoint(self) -> Path:
        """Weights of the best epoch."""
        return self.folder / "best.pt"

    def lock(self) -> FileLock:
        """Return the lock of a fold that several processes train alternately; entering it waits for the other to end."""
        self.run_folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.run_folder / f".fold_{self.number}.lock")

    @property
    def is_started(self) -> bool:
        """Whether at least one epoch is finished."""
        return self.last_checkpoint.exists()

    @property
    def is_trained(self) -> bool:
        """Whether training is finished."""
        return (self.folder / "metrics.json").exists() and self.best_checkpoint.exists()

    @property
    def has_predictions(self) -> bool:
        """Whether predictions are complete; `is_predicted` also checks that they are up to date."""
        return (self.folder / "predictions.json").exists()

    def log(self) -> pd.DataFrame:
        """Return the training log: float64 columns `LOG_COLUMNS`, a row per finished epoch; raises UserError if damaged."""
        file = self.folder / "log.csv"
        if not file.exists():
            return pd.DataFrame(columns=LOG_COLUMNS, dtype=float)
        try:
            table = pd.read_csv(file)
            # Logs of earlier versions lack some of the last columns.
            return table[LOG_COLUMNS[:3]].join(table.reindex(columns=LOG_COLUMNS[3:])).astype(float)
        except (KeyError, ValueError):
            raise UserError(f"{file}: not a training log; delete {self.folder} to train the fold again") from None

    def write_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the log, a row per finished epoch."""
        write_csv(self.folder / "log.csv", pd.DataFrame(rows))

    def metrics(self) -> FoldMetrics:
        """Return the result of a finished training; raises UserError if it is missing or damaged."""
        return FoldMetrics.read(self.folder / "metrics.json")

    def write_metrics(self, metrics: FoldMetrics) -> None:
        """Write the result of training, which marks the fold as finished."""
        metrics.write(self.folder / "metrics.json")

    def predictions_record(self) -> PredictionsRecord:
        """Return what was recorded with the predictions; raises UserError if it is missing or damaged."""
        return PredictionsRecord.read(self.folder / "predictions.json")

    def is_predicted(self, store: PatchStore) -> bool:
        """Return whether predictions are complete and were computed from the current checkpoint and patches."""
        is_current = self.has_predictions and self.predictions_record().sources == self._sources(store)
        return is_current and not self.changed_predictions()

    def changed_predictions(self) -> list[str]:
        """Return the names of the tables of predictions that are missing or not those that were recorded."""
        hashes = self.predictions_record().files
        paths = [self.folder / name for name in PREDICTIONS]
        return [path.name for path in paths if not path.exists() or file_sha256(path) != hashes.get(path.name)]

    def oof(self) -> pd.DataFrame:
        """Return the OOF predictions (id, label, fold, probability), sorted by id; or raise UserError."""
        return self._predicted("oof.csv").assign(fold=self.number).astype({"label": "int64", "fold": "int64"})

    def predictions(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return the OOF predictions and those of the test set (id, probability), sorted by id; or raise UserError."""
        return self.oof(), self._predicted("test.csv").sort_values("id", ignore_index=True)

    def _predicted(self, name: str) -> pd.DataFrame:
        folder, best, advice = self.folder, self.best_checkpoint, f"run `{program()} predict`"
        if not self.has_predictions:
            raise UserError(f"{folder}: no predictions of fold {self.number}; train it, then {advice}")
        if best.exists() and file_sha256(best) != self.predictions_record().sources.best_sha256:
            raise UserError(f"{folder}: trained again since it was predicted; {advice}")
        if name in self.changed_predictions():
            raise UserError(f"{folder / name}: missing or changed since it was predicted; {advice}")
        return read_numbers(folder / name, PREDICTIONS[name])

    def write_predictions(self, oof: pd.DataFrame, test: pd.DataFrame, store: PatchStore | None, rate: float) -> None:
        """Write the predictions `oof` (id, label, probability) and `test` (id, probability), their sources, and images/s."""
        for name, table in zip(PREDICTIONS, (oof, test), strict=True):
            write_csv(self.folder / name, table)
        hashes = {name: file_sha256(self.folder / name) for name in PREDICTIONS}
        sources = self._sources(store) if store else PredictionSources()
        record = PredictionsRecord(sources=sources, files=hashes, images_per_second=rate)
        record.write(self.folder / "predictions.json")

    def teacher(self, name: str) -> "Fold":
        """Return the same fold of the run called `name`, whose model teaches this one."""
        return Fold(self.run_folder.parent / name, self.number)

    def record_teacher(self, name: str) -> None:
        """Record the hash of the teacher's model; raises UserError if the teacher's training is not finished."""
        teacher = self.teacher(name)
        if not teacher.is_trained:
            raise UserError(f"{teacher.folder}: the teacher's training is not finished; train that run first")
        TeacherRecord(teacher=name, best_sha256=file_sha256(teacher.best_checkpoint)).write(self.folder / "teacher.json")

    def teacher_has_changed(self, name: str) -> bool:
        """Return whether this fold has started with another model of the run called `name` than there is now."""
        best, record = self.teacher(name).best_checkpoint, self.folder / "teacher.json"
        return self.is_started and best.exists() and TeacherRecord.read(record).best_sha256 != file_sha256(best)

    def _sources(self, store: PatchStore) -> PredictionSources:
        hashes = store.manifest.model_dump(include={"train_sha256", "test_sha256"})
        return PredictionSources(best_sha256=file_sha256(self.best_checkpoint), **hashes)
