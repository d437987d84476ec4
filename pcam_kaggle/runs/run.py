"""The folder of one run: what it is made of, what made it, and what in it is finished."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd

from pcam_kaggle import UserError
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import file_sha256, read_json, reading, write, write_json
from pcam_kaggle.data.csv_io import PREDICTIONS
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore

TEACHER = "teacher.json"
LOGGED = ("epoch", "train_loss", "valid_auc", "seconds", "valid_seconds")


def check_run(run: Path, config: Config, store: PatchStore, folds: Folds) -> None:
    """Check that the run in folder `run`, if there is one, was made of this config, these folds and these patches.

    Raises:
        UserError: something differs, the teacher's predictions among it, or there are checkpoints and no config.
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
    differ += [f"predictions of its teacher {config.teacher}"] if config.teacher and _teacher_changed(run, config) else []
    if differ:
        raise UserError(f"{run}: holds a run with other {', '.join(differ)}; use --name for a new run, or delete the folder")


def open_run(run: Path, experiment: str, config: Config, store: PatchStore, folds: Folds, weights: str | None = None) -> None:
    """Write what the run in folder `run` is made of, or check it as `check_run` does.

    `weights` is the SHA-256 of the pretrained weights that a fold is about to start from, None where none does.
    """
    check_run(run, config, store, folds)
    file = run / "config.json"
    made = read_json(file) if file.exists() else {"experiment": experiment, **_made_of(config, store, folds)}
    if weights and made.get("weights_sha256", weights) != weights:
        raise UserError(f"{run}: its other folds started from other weights than {config.weights}; use --name for a new run")
    # Of folds that have started before it was recorded it is not known.
    is_known = weights and not any(run.glob("fold_*/last.pt"))
    content = made | ({"weights_sha256": weights} if is_known else {})
    if not file.exists() or content != made:
        write_json(file, content)


def _made_of(config: Config, store: PatchStore, folds: Folds) -> dict[str, Any]:
    return {
        "config": dataclasses.asdict(config),
        "folds": folds.manifest["scheme"],
        "folds_sha256": folds.manifest["csv_sha256"],
        "train_sha256": store.manifest["train_sha256"],
    }


def taught(run: Path, config: Config, fold: int) -> Path:
    """Return the file of the teacher's predictions of the test patches for `fold` of the run in folder `run`.

    Its hash is recorded when the fold starts, and `check_run` compares it when the fold resumes.

    Raises:
        UserError: the teacher has no such predictions, or the fold has started and their hash was not recorded.
    """
    source, record = _taught(run, config, fold), run / f"fold_{fold}" / TEACHER
    if not source.exists():
        raise UserError(f"{source}: no predictions of the teacher; train and predict that run first")
    started = (record.parent / "last.pt").exists()
    if started and not record.exists():
        raise UserError(f"{record}: missing, so the teacher may have changed; delete {record.parent} to train it again")
    if not started:
        write_json(record, {"teacher": config.teacher, "test_sha256": file_sha256(source)})
    return source


def _teacher_changed(run: Path, config: Config) -> bool:
    pairs = [(run / f"fold_{fold}" / TEACHER, _taught(run, config, fold)) for fold in range(config.n_splits)]
    return any(
        read_json(record, test_sha256=str)["test_sha256"] != file_sha256(source)
        for record, source in pairs
        if record.exists() and source.exists() and (record.parent / "last.pt").exists()
    )


def _taught(run: Path, config: Config, fold: int) -> Path:
    return run.parent / config.teacher / f"fold_{fold}" / "test.csv"


def read_environments(run: Path) -> list[dict[str, Any]]:
    """Return what the run in folder `run` was computed by: one entry per session that worked on it, the first one first.

    Raises:
        UserError: environment.json is damaged.
    """
    file = run / "environment.json"
    if not file.exists():
        return []
    with reading(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        # Before there was an entry per session, the file held the first one alone.
        entries = content if isinstance(content, list) else [content]
        for entry in entries:
            entry["backend"]["kind"]
    return entries


def add_environment(run: Path, entry: dict[str, Any]) -> None:
    """Add `entry` to environment.json of the run in folder `run`, unless it is there already."""
    entries = read_environments(run)
    if entry not in entries:
        text = json.dumps([*entries, entry], indent=2, ensure_ascii=False) + "\n"
        write(run / "environment.json", lambda file: file.write(text.encode()))


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
