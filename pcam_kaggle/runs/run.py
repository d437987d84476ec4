"""The folder of one run: what it was made from, its folds, and its blended predictions."""

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.core.config import Config, upgraded
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import csv_bytes, file_sha256, read_json, reading, sha256, write, write_csv, write_json
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import check_oof, read_numbers
from pcam_kaggle.runs.fold import Fold

log = logging.getLogger(__name__)

BLEND_FILES = ("oof.csv", "test.csv", "metrics.json")


@dataclass(frozen=True, slots=True)
class Run:
    """A run in `folder`: an experiment's, with a folder per fold, or a blend of other runs, which has no config.

    - `config.json`: experiment, config, and the hashes of folds, patches and pretrained weights
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
    def is_experiment(self) -> bool:
        """Whether the folder holds an experiment's run, which has a config."""
        return (self.folder / "config.json").is_file()

    @property
    def is_blended(self) -> bool:
        """Whether the blended predictions and their score exist."""
        return all((self.folder / name).exists() for name in BLEND_FILES)

    @property
    def environment_file(self) -> Path:
        """List with an entry for each session that worked on the run."""
        return self.folder / "environment.json"

    @property
    def has_score(self) -> bool:
        """Whether the score of a blend exists, which is written last."""
        return (self.folder / "metrics.json").exists()

    @property
    def has_consistent_blend(self) -> bool:
        """Whether the blended predictions are those that the score describes."""
        made = self.blend_metrics(oof_sha256=str, test_sha256=str)
        return self._blend_hashes().items() <= made.items()

    def fold(self, number: int) -> Fold:
        """Return fold `number` (0-based), whether or not it exists."""
        return Fold(self.folder, number)

    def folds(self) -> list[Fold]:
        """Return all folds of the config; raises UserError if the config is missing or does not tell their number."""
        file = self.folder / "config.json"
        fields = read_json(file, config=dict)["config"]
        with reading(file):
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

    def made_from(self) -> dict[str, Any]:
        """Return the content of `config.json`: at least `config` (upgraded), `folds` (the scheme) and `folds_sha256`.

        Raises:
            UserError: The file is missing or damaged.
        """
        if not self.is_experiment:
            raise UserError(f"{self.folder}: no such run; train it, or name an existing one")
        made = read_json(self.folder / "config.json", config=dict, folds=str, folds_sha256=str)
        return made | {"config": upgraded(made["config"])}

    def check(self, config: Config, store: PatchStore, folds: Folds) -> None:
        """Check that an existing run was made from this config, these folds and these patches.

        Raises:
            UserError: Something differs, including the teacher's predictions, or there are checkpoints without a config.
        """
        file = self.folder / "config.json"
        if not file.exists():
            if any(self.folder.glob("fold_*/*.pt")):
                raise UserError(
                    f"{file}: missing, but there are folds beside it; use --name for a new run, or delete {self.folder}"
                )
            return
        wanted = _inputs(config, store, folds)
        made = read_json(file, **{key: type(value) for key, value in wanted.items()})
        differ = [key for key in wanted if key != "config" and made[key] != wanted[key]]
        old = upgraded(made["config"])
        differ += [f"{key} ({old.get(key)} → {new})" for key, new in wanted["config"].items() if old.get(key) != new]
        differ += [f"{key} (no longer a field)" for key in old.keys() - wanted["config"].keys()]
        if config.teacher and any(self.fold(number).teacher_has_changed(config.teacher) for number in range(config.n_splits)):
            differ.append(f"predictions of its teacher {config.teacher}")
        if differ:
            raise UserError(
                f"{self.folder}: holds a run with other {', '.join(differ)}; use --name for a new run, or delete the folder"
            )

    def open(self, experiment: str, config: Config, store: PatchStore, folds: Folds, weights: str | None = None) -> None:
        """Write what a new run is made from, or check an existing one as `check` does.

        Args:
            experiment: Name of the experiment.
            config: Its config.
            store: The patches.
            folds: The folds.
            weights: SHA-256 of the pretrained weights that a fold is about to start from, None if none does.

        Raises:
            UserError: As `check`, or the run's other folds started from other weights.
        """
        self.check(config, store, folds)
        file = self.folder / "config.json"
        made = read_json(file) if file.exists() else {"experiment": experiment, **_inputs(config, store, folds)}
        self.check_weights(config.weights, weights)
        # Unknown for folds that started before the hash was recorded.
        is_known = weights and not any(self.fold(number).is_started for number in range(config.n_splits))
        content = made | ({"weights_sha256": weights} if is_known else {})
        if not file.exists() or content != made:
            write_json(file, content)

    def check_weights(self, name: str, weights: str | None) -> None:
        """Raise UserError if the run was started from other pretrained weights than those called `name`.

        Args:
            name: What the config calls them.
            weights: Their SHA-256; None if unknown, which is not compared.
        """
        file = self.folder / "config.json"
        made = read_json(file) if file.exists() else {}
        if weights and made.get("weights_sha256", weights) != weights:
            raise UserError(
                f"{self.folder}: its folds started from other weights than {name} is now; restore them or use --name"
            )

    def environments(self) -> list[dict[str, Any]]:
        """Return an entry per session that worked on the run, oldest first; raises UserError if the file is damaged."""
        file = self.environment_file
        if not file.exists():
            return []
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8"))
            # Files of version 0.1 before sessions were listed hold one entry.
            entries = content if isinstance(content, list) else [content]
            for entry in entries:
                entry["backend"]["kind"]
        return entries

    def add_environment(self, entry: dict[str, Any]) -> None:
        """Add `entry` to the environments, unless it is there already."""
        entries = self.environments()
        if entry not in entries:
            text = json.dumps([*entries, entry], indent=2, ensure_ascii=False) + "\n"
            write(self.environment_file, lambda file: file.write(text.encode()))

    def blend_metrics(self, **kinds: type) -> dict[str, Any]:
        """Return the score of the blended predictions.

        Args:
            **kinds: Keys that must exist, with the types of their values.

        Raises:
            UserError: The file is missing or damaged.
        """
        if not self.has_score:
            raise UserError(f"{self.folder}: not blended; run `python -m pcam_kaggle blend`")
        return read_json(self.folder / "metrics.json", **kinds)

    def write_blend(self, oof: pd.DataFrame, test: pd.DataFrame, metrics: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Write the blended predictions and their score, unless they are up to date.

        Args:
            oof: Columns id, label, fold, probability.
            test: Columns id, probability.
            metrics: The score and what was blended.

        Returns:
            The metrics with the hashes of both tables, and whether anything was written.
        """
        hashes = {"oof_sha256": sha256(csv_bytes(oof)), "test_sha256": sha256(csv_bytes(test))}
        metrics = metrics | hashes
        if self.is_blended and self._blend_hashes() == hashes and self.blend_metrics() == metrics:
            return metrics, False
        write_csv(self.folder / "oof.csv", oof)
        write_csv(self.folder / "test.csv", test)
        write_json(self.folder / "metrics.json", metrics)
        return metrics, True

    def oof(self) -> pd.DataFrame:
        """Return the blended out-of-fold predictions: id, label and fold (int64), probability; sorted by id.

        Raises:
            UserError: The table is missing or damaged, or changed since it was blended.
        """
        file = self.folder / "oof.csv"
        if not file.exists() or file_sha256(file) != self.blend_metrics(oof_sha256=str)["oof_sha256"]:
            raise UserError(f"{file}: not what metrics.json describes; blend again")
        with reading(file):
            table = pd.read_csv(file, dtype={"id": str})
            table["probability"] = table["probability"].astype(np.float64)
        return check_oof(file, table).sort_values("id", ignore_index=True)

    def test(self) -> pd.DataFrame:
        """Return the blended test predictions: id, probability.

        Raises:
            UserError: The table is missing or damaged, or changed since it was blended.
        """
        file = self.folder / "test.csv"
        if not file.exists() or file_sha256(file) != self.blend_metrics(test_sha256=str)["test_sha256"]:
            raise UserError(f"{file}: has changed since it was blended; run `python -m pcam_kaggle blend`")
        return read_numbers(file, ["probability"])

    def _blend_hashes(self) -> dict[str, str]:
        return {f"{name}_sha256": file_sha256(self.folder / f"{name}.csv") for name in ("oof", "test")}


def _inputs(config: Config, store: PatchStore, folds: Folds) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "folds": folds.manifest["scheme"],
        "folds_sha256": folds.manifest["csv_sha256"],
        "train_sha256": store.manifest["train_sha256"],
    }
