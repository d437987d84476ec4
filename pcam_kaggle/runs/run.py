"""The folder of one run: what it was made from, its folds, and its blended predictions."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from pcam_kaggle.core.config import Config, upgraded
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import csv_bytes, file_sha256, reading, sha256, write, write_csv
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import check_oof, read_numbers
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.records import Environment, RunConfig
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
    def environment_file(self) -> Path:
        """List with an entry for each session that worked on the run."""
        return self.folder / "environment.json"

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
        if not all((self.folder / name).exists() for name in BLEND_FILES):
            return False
        made = self.blend_metrics()
        return self._blend_hashes() == {"oof_sha256": made.oof_sha256, "test_sha256": made.test_sha256}

    def fold(self, number: int) -> Fold:
        """Return fold `number` (0-based), whether or not it exists."""
        return Fold(self.folder, number)

    def folds(self) -> list[Fold]:
        """Return all folds of the config; raises UserError if the config is missing or does not tell their number."""
        fields = self.made_from().config
        with reading(self.config_file):
            n_splits = Config(n_splits=fields["n_splits"]).n_splits
        return [self.fold(number) for number in range(n_splits)]

    def logs(self) -> dict[int, pd.DataFrame]:
        """Return the readable training logs by fold number; a blend has none, and damaged ones are left out with a warning."""
        names = [folder.name.removeprefix("fold_") for folder in self.folder.glob("fold_[0-9]*") if folder.is_dir()]
        logs = {}
        for number in sorted(int(name) for name in names if name.isdecimal()):
            try:
                table = self.fold(number).log()
            except UserError as error:
                log.warning("left out: %s", error)
                continue
            if len(table):
                logs[number] = table
        return logs

    def made_from(self) -> RunConfig:
        """Return what the run was made from; raises UserError if there is no such run or the file is damaged."""
        if not self.is_experiment:
            raise UserError(f"{self.folder}: no such run; train it, or name an existing one")
        return RunConfig.read(self.config_file)

    def config(self) -> Config:
        """Return the config of the run; raises UserError if it is not one of this version."""
        try:
            return Config(**upgraded(self.made_from().config))
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}; use the version that trained it") from None

    def check(self, config: Config, store: PatchStore, folds: Folds) -> None:
        """Check that an existing run was made from this config, these folds and these patches.

        Raises:
            UserError: Something differs, including the teacher's predictions, or there are checkpoints without a config.
        """
        if not self.is_experiment:
            if any(self.folder.glob("fold_*/*.pt")):
                raise UserError(
                    f"{self.config_file}: missing, but there are folds beside it; use --name for a new run, or delete "
                    f"{self.folder}"
                )
            return
        made, wanted = self.made_from(), _made_from("", config, store, folds)
        differ = [key for key in ("folds", "folds_sha256", "train_sha256") if getattr(made, key) != getattr(wanted, key)]
        old = upgraded(made.config)
        differ += [f"{key} ({old.get(key)} → {new})" for key, new in wanted.config.items() if old.get(key) != new]
        differ += [f"{key} (no longer a field)" for key in old.keys() - wanted.config.keys()]
        if config.teacher and any(self.fold(number).teacher_has_changed(config.teacher) for number in range(config.n_splits)):
            differ.append(f"predictions of its teacher {config.teacher}")
        if differ:
            raise UserError(
                f"{self.folder}: holds a run with other {', '.join(differ)}; use --name for a new run, or delete the folder"
            )

    def open(self, experiment: str, config: Config, store: PatchStore, folds: Folds, weights: str | None = None) -> None:
        """Write what a new run is made from, or check an existing one as `check` does.

        `weights` is the SHA-256 of the pretrained weights that a fold is about to start from, None if none does.

        Raises:
            UserError: As `check`, or the run's other folds started from other weights.
        """
        self.check(config, store, folds)
        made = self.made_from() if self.is_experiment else None
        self.check_weights(config.weights, weights)
        content = made or _made_from(experiment, config, store, folds)
        # Unknown for folds that started before the hash was recorded.
        if weights and not any(self.fold(number).is_started for number in range(config.n_splits)):
            content = content.model_copy(update={"weights_sha256": weights})
        if content != made:
            content.write(self.config_file)

    def check_weights(self, name: str, weights: str | None) -> None:
        """Raise UserError if the run was started from other pretrained weights than those called `name`.

        `weights` is their SHA-256; None if unknown, which is not compared.
        """
        recorded = self.made_from().weights_sha256 if self.is_experiment else None
        if weights and recorded not in (None, weights):
            raise UserError(
                f"{self.folder}: its folds started from other weights than {name} is now; restore them or use --name"
            )

    def environments(self) -> list[Environment]:
        """Return an entry per session that worked on the run, oldest first; raises UserError if the file is damaged."""
        file = self.environment_file
        if not file.exists():
            return []
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8"))
            # Files of version 0.1 before sessions were listed hold one entry.
            return _ENVIRONMENTS.validate_python(content if isinstance(content, list) else [content])

    def add_environment(self, entry: Environment) -> None:
        """Add `entry` to the environments, unless it is there already."""
        entries = self.environments()
        if entry not in entries:
            content = _ENVIRONMENTS.dump_python([*entries, entry], mode="json")
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            write(self.environment_file, lambda file: file.write(text.encode()))

    def predictions(self, chosen: Sequence[int] | None = None) -> RunPredictions:
        """Return the predictions of the folds `chosen` of an experiment's run, by default of all.

        Raises:
            UserError: A fold does not exist, or has no predictions or damaged ones.
        """
        made, folds = self.made_from(), self.chosen_folds(chosen)
        tables = [fold.predictions() for fold in folds]
        oof = pd.concat([table for table, _ in tables])
        if oof["id"].duplicated().any():
            twice = oof["id"][oof["id"].duplicated()].iloc[0]
            raise UserError(f"{self.folder}: id {twice} is out of fold twice; predict again")
        oof = oof.sort_values("id", ignore_index=True)[["id", "label", "fold", "probability"]]
        missing = [fold.number for fold in self.folds() if fold not in folds]
        return RunPredictions(self.name, oof, [test for _, test in tables], made.folds, made.folds_sha256, missing)

    def chosen_folds(self, chosen: Sequence[int] | None) -> list[Fold]:
        """Return the folds `chosen` (None for all); raises UserError if there is no such fold."""
        folds = {fold.number: fold for fold in self.folds()}
        unknown = [number for number in chosen or () if number not in folds]
        if unknown:
            raise UserError(f"--folds {unknown[0]}: {self.name} has folds 0 to {max(folds)}")
        return [folds[number] for number in (folds if chosen is None else chosen)]

    def ensemble(self) -> Ensemble:
        """Return the experiments' runs that this run is a mean of; raises UserError if there is no such run."""
        if self.is_experiment:
            return Ensemble(self.name, {self.name: 1.0})
        if not self.has_score:
            raise UserError(f"{self.folder}: no such run; train it, or name an existing one")
        made = self.blend_metrics()
        return Ensemble(self.name, made.members, made.method == "rank")

    def blend_metrics(self) -> BlendMetrics:
        """Return the score of the blended predictions; raises UserError if the file is missing or damaged."""
        if not self.has_score:
            raise UserError(f"{self.folder}: not blended; run `python -m pcam_kaggle blend`")
        return BlendMetrics.read(self.folder / "metrics.json")

    def write_blend(self, blend: Blend) -> tuple[BlendMetrics, bool]:
        """Write blended predictions and their score, unless they are up to date.

        Returns:
            The metrics with the hashes of both tables, and whether anything was written.

        Raises:
            UserError: This is an experiment's run, and other runs are blended.
        """
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
        """Return the blended out-of-fold predictions: id, label and fold (int64), probability; sorted by id.

        Raises:
            UserError: The table is missing or damaged, or changed since it was blended.
        """
        file = self.folder / "oof.csv"
        if not file.exists() or file_sha256(file) != self.blend_metrics().oof_sha256:
            raise UserError(f"{file}: not what metrics.json describes; blend again")
        with reading(file):
            table = pd.read_csv(file, dtype={"id": str})
            table["probability"] = table["probability"].astype(np.float64)
        return check_oof(file, table).sort_values("id", ignore_index=True)

    def test(self) -> pd.DataFrame:
        """Return the blended test predictions (id, probability).

        Raises:
            UserError: The table is missing or damaged, or changed since it was blended.
        """
        file = self.folder / "test.csv"
        if not file.exists() or file_sha256(file) != self.blend_metrics().test_sha256:
            raise UserError(f"{file}: has changed since it was blended; run `python -m pcam_kaggle blend`")
        return read_numbers(file, ["probability"])

    def _blend_hashes(self) -> dict[str, str]:
        return {f"{name}_sha256": file_sha256(self.folder / f"{name}.csv") for name in ("oof", "test")}


_ENVIRONMENTS = TypeAdapter(list[Environment])


def _made_from(experiment: str, config: Config, store: PatchStore, folds: Folds) -> RunConfig:
    return RunConfig(
        experiment=experiment,
        config=dataclasses.asdict(config),
        folds=folds.manifest.scheme,
        folds_sha256=folds.manifest.csv_sha256,
        train_sha256=store.manifest.train_sha256,
    )
