"""Runs that were trained elsewhere, or their predictions alone: validated, and copied into this workspace."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import building, file_sha256, locked, write
from pcam_kaggle.core.paths import Data, Workspace, check_name
from pcam_kaggle.data.folds import find_folds, given_folds, make_folds
from pcam_kaggle.data.tables import read_labels, read_numbers, read_sample
from pcam_kaggle.runs import checkpoint
from pcam_kaggle.runs.fold import FOLD_FILES, Fold
from pcam_kaggle.runs.records import IMPORTED, RunConfig
from pcam_kaggle.runs.run import BLEND_FILES, Run
from pcam_kaggle.runs.submissions import SubmissionRecord, submission_table


def import_runs(source: Path, workspace: Workspace) -> list[str]:
    """Copy the runs in `source`/runs, their fold files and submissions into `workspace`; return the names of changed runs.

    Of a fold that is in both places the one with more finished epochs is used. Files are validated before they are copied, and
    only those that belong to a run are copied, `folds` and `submissions` beside `source`/runs included. If the call is
    interrupted, the next one completes it.

    Raises:
        UserError: A file is damaged, the run here has another config, folds or a submission of that name have other content
            here, a name is not a plain file name, or another process is writing here. Nothing of that run is then copied.
    """
    imported = []
    for folder in sorted(path for path in source.glob("runs/*") if path.is_dir()):
        check_name(folder.name, f"{folder}: ")
        target = Run(workspace.run(folder.name))
        with locked(target.folder):
            if _import_run(source, Run(folder), target, workspace):
                imported.append(folder.name)
    return imported


def import_predictions(name: str, oof: Path, test: Path, data: Data, workspace: Workspace) -> Run:
    """Make the run `name` of predictions in CSVs: `oof` (id, fold, probability), and `test` (id, probability) of every fold.

    Its folds are those of an equal fold file in `workspace`, or new ones. Raises UserError as `given_folds`, for wrong ids or
    probabilities, and if the run exists.
    """
    check_name(name)
    run, labels = Run(workspace.run(name)), read_labels(data.labels)
    if run.folder.exists():
        raise UserError(f"{run.folder}: exists; choose another name, or delete it")
    scheme, groups = given_folds(oof, labels)
    predicted, tests = (read_numbers(file, ["probability"]) for file in (oof, test))
    if ids := predicted.loc[~predicted["probability"].between(0, 1), "id"].tolist():
        raise UserError(f"{oof}: {len(ids):,} probabilities are outside of [0, 1] (ids {examples(ids)}); correct them", ids)
    submission_table(tests, read_sample(data.sample)["id"], test, data.sample)
    with locked(workspace.folds):
        made = find_folds(scheme.given, workspace.folds) or make_folds(labels, scheme, groups, workspace.folds)[0].manifest
    config = RunConfig(experiment=IMPORTED, config={"n_splits": made.n_splits}, folds=made.scheme, folds_sha256=made.csv_sha256)
    with locked(run.folder), building(run.folder, lambda _: False) as folder:
        for number, part in scheme.given.merge(predicted).groupby("fold"):
            Run(folder).fold(number).write_predictions(part[["id", "label", "probability"]], tests, None, 0.0)
        config.write(Run(folder).config_file)
    return run


def _import_run(source: Path, run: Run, target: Run, workspace: Workspace) -> bool:
    folds = _newer_folds(run, target) if run.is_experiment else []
    use_blend = folds or _missing_folds(run) < _missing_folds(target)
    # A session may end between the files of a blend, and blending again is cheap.
    blend = [run.folder / name for name in BLEND_FILES] if use_blend and run.has_consistent_blend else []
    if not (folds or blend):
        return False
    for fold in folds:
        _check_fold(fold)
    environments = run.environments()
    fold_files = _fold_files(source / "folds", run) if run.is_experiment else ()
    beside = [(file, workspace.folds / file.name) for file in fold_files]
    beside += [(file, workspace.submissions / file.name) for file in _submissions(source / "submissions", run.name)]
    for file, copy in beside:
        if file.suffix == ".csv" and copy.exists() and file_sha256(copy) != file_sha256(file):
            raise UserError(f"{copy}: differs from {file}; move it away, or import the run into another folder with --work")
    # These first: once the run is copied, the next call finds nothing to do.
    with locked(workspace.folds), locked(workspace.submissions):
        for file, copy in beside:
            _copy(file, copy)
    if folds:
        made = run.made_from()
        own = target.made_from() if target.is_experiment else made
        own.model_copy(update={"weights_sha256": own.weights_sha256 or made.weights_sha256}).write(target.config_file)
        for entry in environments:
            target.add_environment(entry)
    for fold in folds:
        _replace_fold(fold, target.fold(fold.number))
    # metrics.json is copied last: without it an interrupted copy is repeated.
    for file in blend:
        _copy(file, target.folder / file.name)
    return True


def _newer_folds(run: Run, target: Run) -> list[Fold]:
    """Return the folds of `run` that `target` lacks or has of an earlier epoch."""
    if target.is_experiment and not _is_same_run(run.made_from(), target.made_from()):
        raise UserError(
            f"{run.folder}: {target.folder} holds a run with another config, other folds or other patches; move one of them"
        )
    numbers = range(run.config().n_splits)
    return [run.fold(number) for number in numbers if _progress(run.fold(number)) > _progress(target.fold(number))]


def _is_same_run(theirs: RunConfig, ours: RunConfig) -> bool:
    # The hash of pretrained weights is recorded when the first fold starts.
    hashes = {theirs.weights_sha256, ours.weights_sha256} - {None}
    return theirs.model_copy(update={"weights_sha256": ours.weights_sha256}) == ours and len(hashes) < 2


def _replace_fold(source: Fold, target: Fold) -> None:
    """Replace `target` by a copy of `source`, all files at once; other files in its folder are kept."""
    with building(target.folder, lambda _: True) as folder:
        for name in FOLD_FILES:
            if (source.folder / name).is_file():
                _copy(source.folder / name, folder / name)
        for other in target.folder.glob("*"):
            if other.name not in FOLD_FILES:
                shutil.copytree(other, folder / other.name) if other.is_dir() else _copy(other, folder / other.name)


def _missing_folds(run: Run) -> float:
    """Return how many folds the blend was made without; infinity if there is no blend."""
    return len(run.blend_metrics().missing_folds) if run.has_score else math.inf


def _fold_files(folder: Path, run: Run) -> Iterator[Path]:
    made = run.made_from()
    check_name(made.folds, f"{run.folder}: ")
    table, manifest = (folder / f"{made.folds}{suffix}" for suffix in (".csv", ".json"))
    if table.is_file() and manifest.is_file():
        if file_sha256(table) != made.folds_sha256:
            raise UserError(f"{table}: not the folds that the run {run.name} was trained on; download it again")
        yield from (table, manifest)


def _submissions(folder: Path, name: str) -> Iterator[Path]:
    for file in sorted(folder.glob("*.json")):
        made, table = SubmissionRecord.read(file), file.with_suffix(".csv")
        if made.run == name and table.exists():
            if file_sha256(table) != made.sha256:
                raise UserError(f"{table}: not what {file.name} describes; download it again")
            yield from (table, file)


def _progress(fold: Fold) -> tuple[int, bool, bool]:
    """Return how far `fold` is: finished epochs, 0 if it lacks the best checkpoint to resume from, trained, predicted."""
    last = fold.last_checkpoint
    log = checkpoint.read_log(last, checkpoint.load(last, "net", "log")) if last.exists() else []
    # A session may end before it has written the best checkpoint; the last one then holds the same weights.
    best_is_last = bool(log) and max(log, key=lambda row: row["valid_auc"]) is log[-1]
    epochs = len(log) if best_is_last or fold.best_checkpoint.exists() else 0
    return epochs, fold.is_trained, fold.has_predictions


def _check_fold(fold: Fold) -> None:
    """Raise UserError if a file of `fold` is damaged, or a table of predictions is not the one that was recorded."""
    if fold.best_checkpoint.exists():
        checkpoint.load(fold.best_checkpoint, "net")
    fold.log()
    if fold.is_trained:
        fold.metrics()
    for changed in fold.changed_predictions() if fold.has_predictions else ():
        raise UserError(f"{fold.folder / changed}: not what predictions.json describes; download it again")


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        write(target, lambda out: shutil.copyfileobj(file, out))
