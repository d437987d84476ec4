"""A run that was trained elsewhere, checked at the door and taken in."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from pcam_kaggle import checkpoint
from pcam_kaggle.artifacts import file_sha256, read_json, write
from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError
from pcam_kaggle.paths import Workspace
from pcam_kaggle.runs import logged
from pcam_kaggle.tables import PLAIN_NAME, read_numbers

RUN_FILES = ("config.json", "environment.json")
BLEND_FILES = ("metrics.json", "oof.csv", "test.csv")
FOLD_FILES = ("last.pt", "best.pt", "log.csv", "oof.csv", "test.csv", "predictions.json", "metrics.json")
COLUMNS = {"oof.csv": ["label", "probability"], "test.csv": ["probability"]}


def take_over(source: Path, workspace: Workspace) -> list[str]:
    """Take the runs in `source`/runs, their fold files and submissions into `workspace`; return the names of the runs.

    Of a fold that stands in both places the one with more finished epochs is kept. Files are read before they are copied, and
    only those that a run is made of are. Raises UserError where a file is damaged, where the run here has another config, and
    where a name is none; nothing of that run is then taken.
    """
    taken = []
    for run in sorted(path.parent for path in source.glob("runs/*/config.json")):
        made = read_json(run / "config.json", "config", "folds")
        for name in (run.name, made["folds"]):
            if not (isinstance(name, str) and PLAIN_NAME.fullmatch(name)):
                raise UserError(f"{run}: {name!r} is no plain file name; use letters, digits, points, dashes and underscores")
        target = workspace.run(run.name)
        files = [*_run_files(run, target)]
        for file in files:
            _check(file)
        copies = [(file, target / file.relative_to(run)) for file in files]
        schemes = [f"{made['folds']}{suffix}" for suffix in (".csv", ".json")]
        beside = [(source / "folds" / name, workspace.folds / name) for name in schemes]
        beside += [(file, workspace.submissions / file.name) for file in _submissions(source / "submissions", run.name)]
        copies += [(file, copy) for file, copy in beside if file.is_file() and not copy.exists()]
        for file, copy in copies:
            _copy(file, copy)
        taken.append(run.name)
    return taken


def _run_files(run: Path, target: Path) -> Iterator[Path]:
    """Yield the files of folder `run` that `target` lacks or has of an earlier epoch."""
    own = target / "config.json"
    if own.exists() and read_json(own) != read_json(run / "config.json"):
        raise UserError(f"{run}: {target} holds a run with another config, other folds or other patches; move one of them")
    try:
        config = Config(**read_json(run / "config.json", "config")["config"])
    except TypeError:
        raise UserError(f"{run / 'config.json'}: not a config of this version; use the one that trained it") from None
    yield from (run / name for name in RUN_FILES)
    pairs = [(run / f"fold_{fold}", target / f"fold_{fold}") for fold in range(config.n_splits)]
    further = [theirs for theirs, ours in pairs if _progress(theirs) > _progress(ours)]
    for folder in further:
        yield from (folder / name for name in FOLD_FILES if (folder / name).is_file())
    if further:
        yield from (run / name for name in BLEND_FILES if (run / name).is_file())


def _submissions(folder: Path, name: str) -> Iterator[Path]:
    """Yield the submissions of run `name` in `folder`, each with what stands beside it, once it is what that says."""
    for file in sorted(folder.glob("*.json")):
        made = read_json(file, "run", "sha256")
        table = file.with_suffix(".csv")
        if made["run"] != name:
            continue
        if table.is_symlink() or not table.is_file() or file_sha256(table) != made["sha256"]:
            raise UserError(f"{table}: is not what {file.name} describes; get it again")
        yield from (table, file)


def _progress(folder: Path) -> tuple[int, bool, bool]:
    return logged(folder), (folder / "metrics.json").exists(), (folder / "predictions.json").exists()


def _check(file: Path) -> None:
    """Raise UserError where `file` is a link or damaged, or not what its fold's predictions say."""
    if file.is_symlink():
        raise UserError(f"{file}: is a link, not a file")
    if file.suffix == ".json":
        read_json(file)
    if file.name == "best.pt":
        checkpoint.load(file, "net")
    if file.name == "last.pt":
        epochs, finished = len(json.loads(checkpoint.load(file, "net", "log")["log"])), (file.parent / "metrics.json").exists()
        # A session may end between the checkpoint of an epoch and its row in the log.
        if epochs - logged(file.parent) not in ((0,) if finished else (0, 1)):
            raise UserError(f"{file.parent / 'log.csv'}: is not the log of {file.name}; get it again")
    if file.name in COLUMNS:
        read_numbers(file, COLUMNS[file.name])
    if file.name == "predictions.json":
        for name, digest in read_json(file, "files")["files"].items():
            if name not in COLUMNS or not (file.parent / name).is_file() or file_sha256(file.parent / name) != digest:
                raise UserError(f"{file.parent / name}: is not what {file.name} describes; get it again")


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        write(target, lambda out: shutil.copyfileobj(file, out))
