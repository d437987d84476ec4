"""The folder of one run: what it was made from, its folds, and its blended predictions."""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError, examples, program
from pcam_kaggle.core.files import csv_bytes, file_sha256, reading, sha256, write_csv, write_json
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.provenance import session_start
from pcam_kaggle.runs.records import IMPORTED, Environment, RunConfig
from pcam_kaggle.scoring.blend import Blend, RunPredictions
from pcam_kaggle.scoring.held_out import Ensemble
from pcam_kaggle.scoring.results import BlendMetrics

log = logging.getLogger(__name__)

BLEND_FILES = ("oof.csv", "test.csv", "metrics.json")


@dataclass(frozen=True, slots=True)
class Run:
    """A run in `folder`: an experiment's, with a folder per fold, or a blend of other runs, which has no config.

    - `config.json`: see `RunConfig`
    - `environment.json`: a list with an entry for each session that worked on the run
    - `session.json`: the session on Kaggle that it was imported from, if any
    - `fold_<k>/`: see `Fold`
    - `oof.csv`, `test.csv`, `metrics.json`: the blended predictions and their score, written in this order
    """

    folder: Path

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def config_file(self) -> Path:
        """What the run was made from."""
        return self.folder / "config.json"

    @property
    def session_file(self) -> Path:
        """The session on Kaggle that it was imported from."""
        return self.folder / "session.json"

    @property
    def is_experiment(self) -> bool:
        """Whether the folder holds an experiment's run, which has a config."""
        return self.config_file.is_file()

    @property
    def has_score(self) -> bool:
        """Whether the score of a blend exists, which is written last."""
        return (self.folder / "metrics.json").exists()

    @property
    def has_consistent_blend(self) -> bool:
        """Whether the blended predictions exist and are those that the score describes."""
        return self.has_score and self._is_blended("oof") and self._is_blended("test")

    def is_copy_of(self, other: "Run") -> bool:
        """Return whether this run is an imported `other`: it has tables of it, and none differs; the logs hold durations."""
        tables = [*other.folder.glob("fold_*/*.csv")] or [*other.folder.glob("*.csv")]
        pairs = [(table, self.folder / table.relative_to(other.folder)) for table in tables]
        same = [file_sha256(table) == file_sha256(own) for table, own in pairs if own.is_file()]
        return bool(same) and all(same)

    def fold(self, number: int) -> Fold:
        """Return fold `number` (0-based), whether or not it exists."""
        return Fold(self.folder, number)

    def folds(self) -> list[Fold]:
        """Return all folds of the config; raises UserError if the config is missing or does not tell their number."""
        return [self.fold(number) for number in range(Config(n_splits=self.made_from().config["n_splits"]).n_splits)]

    def missing_folds(self) -> float:
        """Return how many folds the blend was made without; infinity if there is no blend."""
        return len(self.blend_metrics().missing_folds) if self.has_score else math.inf

    def predicted_folds(self) -> list[int]:
        """Return the numbers of the folds that have predictions; raises UserError as `folds` does."""
        return [fold.number for fold in self.folds() if fold.has_predictions]

    def logs(self) -> dict[int, pd.DataFrame]:
        """Return the training logs of an epoch or more by fold number; damaged ones are left out with a warning."""
        logs = {}
        names = [file.parent.name.removeprefix("fold_") for file in self.folder.glob("fold_*/log.csv")]
        for number in sorted(int(name) for name in names if name.isdecimal()):
            try:
                logs[number] = self.fold(number).log()
            except UserError as error:
                log.warning("left out: %s", error)
        return {number: table for number, table in logs.items() if len(table)}

    def made_from(self) -> RunConfig:
        """Return what the run was made from; raises UserError if there is no such run or the file is damaged."""
        if not self.is_experiment:
            raise UserError(f"{self.folder}: no such run; train it, or name an existing one")
        return RunConfig.read(self.config_file)

    def config(self) -> Config:
        """Return the config of the run; raises UserError if it is not one of this version."""
        try:
            return Config(**self.made_from().config)
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}; use the version that trained it") from None

    def check_models(self) -> None:
        """Raise UserError if there is no such run, or if it has no models, since it was imported as predictions."""
        if self.made_from().experiment == IMPORTED:
            raise UserError(f"{self.folder}: was imported as predictions and has no models; name another run")

    def check(self, config: Config, store: PatchStore, folds: Folds) -> None:
        """Raise UserError if an existing run was made from another config, folds, patches or teacher."""
        advice = "use --name for a new run, or delete the folder"
        if not self.is_experiment:
            if any(self.folder.glob("fold_*/*.pt")):
                raise UserError(f"{self.config_file}: missing, but there are folds beside it; {advice}")
            return
        made, wanted = self.made_from(), _made_from("", config, store, folds)
        differ = [key for key in ("folds", "folds_sha256", "train_sha256") if getattr(made, key) != getattr(wanted, key)]
        old = made.config
        differ += [f"{key} ({old.get(key)} → {new})" for key, new in wanted.config.items() if old.get(key) != new]
        differ += [f"{key} (no longer a field)" for key in old.keys() - wanted.config.keys()]
        if config.teacher and any(self.fold(number).teacher_has_changed(config.teacher) for number in range(config.n_splits)):
            differ.append(f"models of its teacher {config.teacher}")
        if differ:
            raise UserError(f"{self.folder}: holds a run with other {examples(differ)}; {advice}", differ)

    def open(self, experiment: str, config: Config, store: PatchStore, folds: Folds, weights: str | None = None) -> None:
        """Write what a new run is made from, or check an existing one; for `weights` see `check_weights`."""
        self.check(config, store, folds)
        self.check_weights(config.weights, weights)
        made = self.made_from() if self.is_experiment else None
        content = made or _made_from(experiment, config, store, folds)
        # Unknown for folds that started before the hash was recorded.
        if weights and not any(self.fold(number).is_started for number in range(config.n_splits)):
            content = content.model_copy(update={"weights_sha256": weights})
        if content != made:
            content.write(self.config_file)

    def check_weights(self, name: str, weights: str | None) -> None:
        """Raise UserError if the run was started from other weights than `name`, of SHA-256 `weights`, None if unknown."""
        recorded = self.made_from().weights_sha256 if self.is_experiment else None
        if weights and recorded not in (None, weights):
            raise UserError(f"{self.folder}: its folds started from other weights than {name}; restore them or use --name")

    def environments(self) -> list[Environment]:
        """Return an entry per session that worked on the run, oldest first; raises UserError if the file is damaged."""
        file = self.folder / "environment.json"
        if not file.exists():
            return []
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8"))
            # Files of version 0.1 before sessions were listed hold one entry.
            entries = content if isinstance(content, list) else [content]
            return [Environment.model_validate(entry) for entry in entries]

    def add_environment(self, entry: Environment) -> None:
        """Add `entry` to the environments, in place of an entry of the same session, which may have measured something else."""
        entries = {each.model_dump_json(exclude={"measured"}): each for each in [*self.environments(), entry]}
        write_json(self.folder / "environment.json", [each.model_dump(mode="json") for each in entries.values()])

    def measure(self, seconds: dict[str, float]) -> None:
        """Add the `seconds` of stages and the rates of the last finished fold to the entry of this session, if it has one."""
        for entry in [each for each in self.environments() if each.started == session_start()][-1:]:
            folds = [fold.metrics() for fold in self.folds() if fold.is_trained][-1:]
            measured = {key: getattr(fold, key) for fold in folds for key in ("images_per_second", "loader_wait", "steps")}
            measured |= {f"{stage}_seconds": round(value, 1) for stage, value in seconds.items()}
            self.add_environment(entry.model_copy(update={"measured": measured}))

    def predictions(self, chosen: Sequence[int] | None = None) -> RunPredictions:
        """Return the predictions of the folds `chosen` of an experiment's run, by default of all; or raise UserError."""
        made, folds = self.made_from(), self.chosen_folds(chosen)
        tables = [fold.predictions() for fold in folds]
        oof = pd.concat([table for table, _ in tables]).sort_values("id", ignore_index=True)
        oof = oof[["id", "label", "fold", "probability"]]
        missing = [fold.number for fold in self.folds() if fold not in folds]
        return RunPredictions(self.name, oof, [test for _, test in tables], made.folds, made.folds_sha256, missing)

    def chosen_folds(self, chosen: Sequence[int] | None) -> list[Fold]:
        """Return the folds `chosen` (None for all); raises UserError if there is no such fold."""
        folds = {fold.number: fold for fold in self.folds()}
        if unknown := [number for number in chosen or () if number not in folds]:
            raise UserError(f"--folds {unknown[0]}: {self.name} has folds 0 to {max(folds)}")
        return [folds[number] for number in (folds if chosen is None else chosen)]

    def ensemble(self) -> Ensemble:
        """Return the experiments' runs that this run is a mean of; raises UserError if there is no such run."""
        if self.is_experiment:
            return Ensemble(self.name, {self.name: 1.0})
        made = self.blend_metrics()
        return Ensemble(self.name, made.members, made.method == "rank")

    def blend_metrics(self) -> BlendMetrics:
        """Return the score of the blended predictions; raises UserError if the file is missing or damaged."""
        if not self.has_score:
            raise UserError(f"{self.folder}: no such run, or not blended; run `{program()} blend`")
        return BlendMetrics.read(self.folder / "metrics.json")

    def write_blend(self, blend: Blend) -> tuple[BlendMetrics, bool]:
        """Write blended predictions and their score; return the score with their hashes, and whether they are new."""
        if self.is_experiment and [*blend.metrics.members] != [self.name]:
            raise UserError(f"{self.folder}: is the run of an experiment; choose another name with --name")
        hashes = {"oof_sha256": sha256(csv_bytes(blend.oof)), "test_sha256": sha256(csv_bytes(blend.test))}
        metrics = blend.metrics.model_copy(update=hashes)
        if self.has_consistent_blend and self.blend_metrics() == metrics:
            return metrics, False
        write_csv(self.folder / "oof.csv", blend.oof)
        write_csv(self.folder / "test.csv", blend.test)
        metrics.write(self.folder / "metrics.json")
        return metrics, True

    def oof(self) -> pd.DataFrame:
        """Return the blended predictions (id, label and fold as int64, probability), sorted by id; or raise UserError."""
        file = self._blended("oof")
        table = read_numbers(file, ["label", "fold", "probability"])
        return table.astype({"label": "int64", "fold": "int64"}).sort_values("id", ignore_index=True)

    def test(self) -> pd.DataFrame:
        """Return the blended test predictions (id, probability); raises UserError as `oof` does."""
        return read_numbers(self._blended("test"), ["probability"])

    def _is_blended(self, name: str) -> bool:
        file = self.folder / f"{name}.csv"
        return file.exists() and file_sha256(file) == getattr(self.blend_metrics(), f"{name}_sha256")

    def _blended(self, name: str) -> Path:
        file = self.folder / f"{name}.csv"
        if not self._is_blended(name):
            raise UserError(f"{file}: has changed since it was blended; run `{program()} blend`")
        return file


def _made_from(experiment: str, config: Config, store: PatchStore, folds: Folds) -> RunConfig:
    return RunConfig(
        experiment=experiment,
        config=dataclasses.asdict(config),
        folds=folds.manifest.scheme,
        folds_sha256=folds.manifest.csv_sha256,
        train_sha256=store.manifest.train_sha256,
    )
