"""A run that was trained elsewhere, checked and copied into this workspace."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from pcam_kaggle import UserError
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import PART, file_sha256, locked, read_json, write, write_json
from pcam_kaggle.data.csv_io import PLAIN_NAME, PREDICTIONS, read_numbers
from pcam_kaggle.data.layout import Workspace
from pcam_kaggle.models import checkpoint
from pcam_kaggle.runs.run import add_environment, read_environments, read_log, trained

# The last one is copied last: without it the others are copied again after an interruption.
BLEND_FILES = ("oof.csv", "test.csv", "metrics.json")
OLD = ".old"
FOLD_FILES = ("last.pt", "best.pt", "log.csv", "oof.csv", "test.csv", "predictions.json", "metrics.json", "teacher.json")


def take_over(source: Path, workspace: Workspace) -> list[str]:
    """Take the runs in `source`/runs, their fold files and submissions into `workspace`; return the names of those taken.

    Of a fold that is in both places the one with more finished epochs is taken, all of its files at once. Files are read before
    they are copied, and only those that a run is made of are.

    Raises:
        UserError: a file is damaged, the run here has another config, folds or a submission of that name have other content
            here, a name is not a plain file name, or another process is writing here. Nothing of that run is then taken.
    """
    taken = []
    for run in sorted(path for path in source.glob("runs/*") if path.is_dir()):
        _check_name(run, run.name)
        target = workspace.run(run.name)
        with locked(target):
            if _take_run(source, run, target, workspace):
                taken.append(run.name)
    return taken


def _take_run(source: Path, run: Path, target: Path, workspace: Workspace) -> bool:
    # Of a call that was interrupted while it replaced a fold.
    for old in list(target.glob(f".fold_*{OLD}")):
        _clear(old)
    folds = _newer_folds(run, target)
    is_new = (run / "config.json").is_file() and not (target / "config.json").exists()
    blend = list(_blend_files(run)) if folds or is_new or _lacking(run) < _lacking(target) else []
    if not (folds or is_new or blend):
        return False
    fold_files = [file for folder in folds for name in FOLD_FILES if (file := folder / name).is_file()]
    for file in (*fold_files, *blend):
        _check(file)
    for name in ("config.json", "environment.json"):
        _refuse_link(run / name)
    environments = read_environments(run)
    beside = [(file, workspace.folds / file.name) for file in _fold_files(source / "folds", run)]
    beside += [(file, workspace.submissions / file.name) for file in _submissions(source / "submissions", run.name)]
    for file, copy in beside:
        if file.suffix == ".csv" and copy.exists() and file_sha256(copy) != file_sha256(file):
            raise UserError(f"{copy}: differs from {file}; move it away, or take the run into another folder with --work")
    # These first: once the run is copied, the next call finds nothing to do.
    with locked(workspace.folds), locked(workspace.submissions):
        for file, copy in beside:
            _copy(file, copy)
    if folds or is_new:
        own = target / "config.json"
        write_json(own, read_json(run / "config.json") | (read_json(own) if own.exists() else {}))
        for entry in environments:
            add_environment(target, entry)
    for folder in folds:
        _replace_fold(folder, target / folder.name)
    for file in blend:
        _copy(file, target / file.name)
    return True


def _newer_folds(run: Path, target: Path) -> list[Path]:
    """Return the folders of the folds of `run` that `target` lacks or has of an earlier epoch; none if `run` is a blend."""
    if not (run / "config.json").is_file():
        return []
    own, theirs = target / "config.json", read_json(run / "config.json")
    ours = read_json(own) if own.exists() else {}
    # The hash of the weights is recorded when the first fold starts, and not at all by earlier versions.
    if any(ours.get(key, value) != value for key, value in theirs.items()):
        raise UserError(f"{run}: {target} holds a run with another config, other folds or other patches; move one of them")
    try:
        config = Config(**read_json(run / "config.json", config=dict)["config"])
    except TypeError:
        raise UserError(f"{run / 'config.json'}: not a config of this version; use the one that trained it") from None
    pairs = [(run / f"fold_{fold}", target / f"fold_{fold}") for fold in range(config.n_splits)]
    return [theirs for theirs, ours in pairs if _progress(theirs) > _progress(ours)]


def _replace_fold(source: Path, target: Path) -> None:
    """Put a copy of the fold in folder `source` in the place of `target`, all files at once; other files in `target` stay."""
    copied = target.with_name(f".{target.name}{PART}")
    for name in FOLD_FILES:
        if (source / name).is_file():
            _copy(source / name, copied / name)
    old = target.with_name(f".{target.name}{OLD}")
    if target.exists():
        target.replace(old)
    copied.replace(target)
    _clear(old)


def _clear(old: Path) -> None:
    """Delete the fold in folder `old`, once it was replaced and other files in it have moved to its successor."""
    fold = old.with_name(old.name.removeprefix(".").removesuffix(OLD))
    if not old.exists():
        return
    if not fold.exists():
        old.replace(fold)
        return
    for other in old.iterdir():
        if other.name not in FOLD_FILES and not (fold / other.name).exists():
            other.replace(fold / other.name)
    shutil.rmtree(old)


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
    return _epochs(folder), trained(folder), (folder / "predictions.json").exists()


def _epochs(folder: Path) -> int:
    """Return the finished epochs of the fold in `folder`; 0 if it can't be resumed, for want of its best checkpoint."""
    last = folder / "last.pt"
    log = checkpoint.read_log(last, checkpoint.load(last, "net", "log")) if last.exists() else []
    # A session may end before it has written the best checkpoint; the last one then holds the same weights.
    best_is_last = bool(log) and max(log, key=lambda row: row["valid_auc"]) is log[-1]
    return len(log) if best_is_last or (folder / "best.pt").exists() else 0


def _check_name(run: Path, name: object) -> None:
    if not (isinstance(name, str) and PLAIN_NAME.fullmatch(name)):
        raise UserError(f"{run}: {name!r} is no plain file name; use letters, digits, points, dashes and underscores")


def _check(file: Path) -> None:
    """Raise UserError where `file` is a link or damaged, or not what its fold's predictions say."""
    _refuse_link(file)
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


def _refuse_link(file: Path) -> None:
    if file.is_symlink():
        raise UserError(f"{file}: is a link, not a file")


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        write(target, lambda out: shutil.copyfileobj(file, out))
