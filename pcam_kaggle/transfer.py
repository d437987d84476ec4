"""A run that was trained elsewhere, checked at the door and taken in."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from pcam_kaggle import checkpoint
from pcam_kaggle.artifacts import file_sha256, read_json, write
from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError
from pcam_kaggle.paths import Workspace
from pcam_kaggle.runs import read_log
from pcam_kaggle.tables import PLAIN_NAME, PREDICTIONS, read_numbers

RUN_FILES = ("config.json", "environment.json")
BLEND_FILES = ("metrics.json", "oof.csv", "test.csv")
FOLD_FILES = ("last.pt", "best.pt", "log.csv", "oof.csv", "test.csv", "predictions.json", "metrics.json")


def take_over(source: Path, workspace: Workspace) -> list[str]:
    """Take the runs in `source`/runs, their fold files and submissions into `workspace`; return the names of those taken.

    Of a fold that stands in both places the one with more finished epochs is kept. Files are read before they are copied, and
    only those that a run is made of are. Raises UserError where a file is damaged, where the run here has another config,
    where folds or a submission of that name stand here with other content, and where a name is none; nothing of that run is
    then taken.
    """
    taken = []
    for run in sorted(path for path in source.glob("runs/*") if path.is_dir()):
        _check_name(run, run.name)
        target = workspace.run(run.name)
        copies = [(file, target / file.relative_to(run)) for file in _run_files(run, target)]
        copies += [(file, target / file.name) for file in _blend_files(run) if copies or _lacking(run) < _lacking(target)]
        for file, _ in copies:
            _check(file)
        if not copies:
            continue
        beside = [(file, workspace.folds / file.name) for file in _fold_files(source / "folds", run)]
        beside += [(file, workspace.submissions / file.name) for file in _submissions(source / "submissions", run.name)]
        for file, copy in beside:
            if file.suffix == ".csv" and copy.exists() and file_sha256(copy) != file_sha256(file):
                raise UserError(f"{copy}: differs from {file}; move it away, or take the run into another folder with --work")
        for file, copy in (*copies, *beside):
            _copy(file, copy)
        taken.append(run.name)
    return taken


def _run_files(run: Path, target: Path) -> Iterator[Path]:
    """Yield the files of folder `run` that `target` lacks or has of an earlier epoch; none where `run` is a mere blend."""
    if not (run / "config.json").is_file():
        return
    own = target / "config.json"
    if own.exists() and read_json(own) != read_json(run / "config.json"):
        raise UserError(f"{run}: {target} holds a run with another config, other folds or other patches; move one of them")
    try:
        config = Config(**read_json(run / "config.json", config=dict)["config"])
    except TypeError:
        raise UserError(f"{run / 'config.json'}: not a config of this version; use the one that trained it") from None
    pairs = [(run / f"fold_{fold}", target / f"fold_{fold}") for fold in range(config.n_splits)]
    further = [theirs for theirs, ours in pairs if _progress(theirs) > _progress(ours)]
    if further or not own.exists():
        yield from (run / name for name in RUN_FILES if (run / name).is_file())
    for folder in further:
        yield from (folder / name for name in FOLD_FILES if (folder / name).is_file())


def _blend_files(run: Path) -> Iterator[Path]:
    """Yield the blend in folder `run` where it is whole: a session may end between its files, and it is soon made again."""
    files = [run / name for name in BLEND_FILES]
    if all(file.is_file() for file in files):
        made = read_json(run / "metrics.json", oof_sha256=str, test_sha256=str)
        if [made["oof_sha256"], made["test_sha256"]] == [file_sha256(run / name) for name in ("oof.csv", "test.csv")]:
            yield from files


def _lacking(run: Path) -> float:
    """Return how many folds the blend in folder `run` was made without; infinity where there is none."""
    file = run / "metrics.json"
    return len(read_json(file, missing_folds=list)["missing_folds"]) if file.exists() else math.inf


def _fold_files(folder: Path, run: Path) -> Iterator[Path]:
    """Yield the fold file of `run` in `folder` and its manifest, once it is the one that the run was trained on."""
    if not (run / "config.json").is_file():
        return
    made = read_json(run / "config.json", folds=str, folds_sha256=str)
    _check_name(run, made["folds"])
    table, manifest = (folder / f"{made['folds']}{suffix}" for suffix in (".csv", ".json"))
    if table.is_file() and manifest.is_file():
        _check(manifest)
        if table.is_symlink() or file_sha256(table) != made["folds_sha256"]:
            raise UserError(f"{table}: is not what the run {run.name} was trained on; get it again")
        yield from (table, manifest)


def _submissions(folder: Path, name: str) -> Iterator[Path]:
    """Yield the submissions of run `name` in `folder`, each with what stands beside it, once it is what that says."""
    for file in sorted(folder.glob("*.json")):
        _check(file)
        made = read_json(file, run=str, sha256=str)
        table = file.with_suffix(".csv")
        if made["run"] == name and table.exists():
            if table.is_symlink() or file_sha256(table) != made["sha256"]:
                raise UserError(f"{table}: is not what {file.name} describes; get it again")
            yield from (table, file)


def _progress(folder: Path) -> tuple[int, bool, bool]:
    """Return how far the fold in `folder` is: its epochs, whether it is finished, whether it is predicted."""
    return _epochs(folder), (folder / "metrics.json").exists(), (folder / "predictions.json").exists()


def _epochs(folder: Path) -> int:
    last = folder / "last.pt"
    return len(checkpoint.read_log(last, checkpoint.load(last, "net", "log"))) if last.exists() else 0


def _check_name(run: Path, name: object) -> None:
    if not (isinstance(name, str) and PLAIN_NAME.fullmatch(name)):
        raise UserError(f"{run}: {name!r} is no plain file name; use letters, digits, points, dashes and underscores")


def _check(file: Path) -> None:
    """Raise UserError where `file` is a link or damaged, or not what its fold's predictions say."""
    if file.is_symlink():
        raise UserError(f"{file}: is a link, not a file")
    if file.suffix == ".json":
        read_json(file)
    if file.name == "best.pt":
        checkpoint.load(file, "net")
    # A log that lacks its last rows is written anew when the fold goes on, and is final once the fold is finished.
    final = file.name == "log.csv" and (file.parent / "metrics.json").exists()
    if final and len(read_log(file.parent)) != _epochs(file.parent):
        raise UserError(f"{file}: is not the log of last.pt; get it again")
    if file.name in PREDICTIONS:
        read_numbers(file, PREDICTIONS[file.name])
    if file.name == "predictions.json":
        described = read_json(file, files=dict)["files"]
        for name in PREDICTIONS:
            if not (file.parent / name).is_file() or file_sha256(file.parent / name) != described.get(name):
                raise UserError(f"{file.parent / name}: is not what {file.name} describes; get it again")


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        write(target, lambda out: shutil.copyfileobj(file, out))
