"""The folder of one run: what it is made of, and what in it is finished."""

import dataclasses
from pathlib import Path
from typing import Any

from pcam_kaggle.artifacts import file_sha256, read_json, write_json
from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError
from pcam_kaggle.folds import Folds
from pcam_kaggle.store import PatchStore


def open_run(run: Path, experiment: str, config: Config, store: PatchStore, folds: Folds) -> None:
    """Write what the run in folder `run` is made of, or check that it is the same.

    Raises UserError, with what differs, where the folder holds a run of another config, other folds or other patches.
    """
    wanted = {
        "experiment": experiment,
        "config": dataclasses.asdict(config),
        "folds": folds.manifest["scheme"],
        "folds_sha256": folds.manifest["csv_sha256"],
        "train_sha256": store.manifest["train_sha256"],
    }
    file = run / "config.json"
    if not file.exists():
        write_json(file, wanted)
        return
    made = read_json(file)
    differ = [key for key in ("folds", "folds_sha256", "train_sha256") if made.get(key) != wanted[key]]
    old = made.get("config", {})
    differ += [f"{key} ({old.get(key)} → {new})" for key, new in wanted["config"].items() if old.get(key) != new]
    if differ:
        raise UserError(f"{run}: holds a run with other {', '.join(differ)}; use --name for a new run, or delete the folder")


def trained(folder: Path) -> dict[str, Any] | None:
    """Return the metrics of the fold trained in `folder`, None where it is not finished."""
    if (folder / "metrics.json").exists() and (folder / "best.pt").exists():
        return read_json(folder / "metrics.json")
    return None


def sources(folder: Path, store: PatchStore) -> dict[str, str]:
    """Return the hashes of what the predictions of the fold in `folder` are made of."""
    return {
        "best_sha256": file_sha256(folder / "best.pt"),
        "train_sha256": store.manifest["train_sha256"],
        "test_sha256": store.manifest["test_sha256"],
    }


def predicted(folder: Path, store: PatchStore) -> bool:
    """Tell whether the predictions in `folder` stand whole and belong to its checkpoint and to the patches of `store`."""
    file = folder / "predictions.json"
    if not file.exists():
        return False
    made = read_json(file)
    return made["sources"] == sources(folder, store) and all(
        (folder / name).exists() and file_sha256(folder / name) == digest for name, digest in made["files"].items()
    )
