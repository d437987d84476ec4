"""The folder of one run: what it is made of, and what in it is finished."""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd

from pcam_kaggle.artifacts import file_sha256, read_json, write_json
from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError
from pcam_kaggle.folds import Folds
from pcam_kaggle.store import PatchStore
from pcam_kaggle.tables import PREDICTIONS

LOGGED = ("epoch", "train_loss", "valid_auc", "seconds", "valid_seconds")


def check_run(run: Path, config: Config, store: PatchStore, folds: Folds) -> None:
    """Raise UserError, with what differs, where folder `run` holds a run of another config, other folds or other patches.

    So it does where checkpoints stand there and nothing tells what they are.
    """
    file = run / "config.json"
    if not file.exists():
        if any(run.glob("fold_*/*.pt")):
            raise UserError(f"{file}: missing, though folds stand beside it; use --name for a new run, or delete {run}")
        return
    wanted = _made_of(config, store, folds)
    made = read_json(file, **{key: type(value) for key, value in wanted.items()})
    differ = [key for key in wanted if key != "config" and made[key] != wanted[key]]
    old = made["config"]
    differ += [f"{key} ({old.get(key)} → {new})" for key, new in wanted["config"].items() if old.get(key) != new]
    if differ:
        raise UserError(f"{run}: holds a run with other {', '.join(differ)}; use --name for a new run, or delete the folder")


def open_run(run: Path, experiment: str, config: Config, store: PatchStore, folds: Folds) -> None:
    """Write what the run in folder `run` is made of, or check it as `check_run` does."""
    check_run(run, config, store, folds)
    if not (run / "config.json").exists():
        write_json(run / "config.json", {"experiment": experiment, **_made_of(config, store, folds)})


def _made_of(config: Config, store: PatchStore, folds: Folds) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "folds": folds.manifest["scheme"],
        "folds_sha256": folds.manifest["csv_sha256"],
        "train_sha256": store.manifest["train_sha256"],
    }


def trained(folder: Path) -> bool:
    """Tell whether the fold in `folder` is trained to its end."""
    return (folder / "metrics.json").exists() and (folder / "best.pt").exists()


def read_log(folder: Path) -> pd.DataFrame:
    """Return the log of the fold in `folder`, a row per finished epoch; raises UserError where it is damaged."""
    file = folder / "log.csv"
    if not file.exists():
        return pd.DataFrame(columns=list(LOGGED), dtype=float)
    try:
        return pd.read_csv(file)[list(LOGGED)].astype(float)
    except (ValueError, KeyError):
        raise UserError(f"{file}: not a training log; delete {folder} to train the fold anew") from None


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
    made = read_json(file, sources=dict, files=dict)
    return made["sources"] == sources(folder, store) and all(
        (folder / name).exists() and file_sha256(folder / name) == made["files"].get(name) for name in PREDICTIONS
    )
