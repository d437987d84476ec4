"""Runs that were trained elsewhere, or their predictions alone: validated, and copied into this workspace."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import building, file_sha256, locked, write
from pcam_kaggle.core.paths import Data, Workspace, check_name
from pcam_kaggle.data.folds import given_folds, make_folds
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
    interrupted, the next one completes it. Raises UserError, with nothing of that run copied, if a file is damaged, the run
    here has another config, folds or a submission of that name have other content here, or another process is writing here.
    """
    imported = []
    for folder in sorted(path for path in source.glob("runs/*") if path.is_dir()):
        target = Run(workspace.run(folder.name))
        with locked(target.folder):
            if _import_run(source, Run(folder), target, workspace):
                imported.append(folder.name)
    return imported


def import_predictions(name: str, oof: Path, test: Path, data: Data, workspace: Workspace) -> Run:
    """Make the run `name` of predictions in CSVs: `oof` (id, fold, probability), and `test` (id, probability) of every fold.

    Raises UserError as `given_folds`, for wrong ids or probabilities, and if the run exists.
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
        made = make_folds(labels, scheme, groups, workspace.folds)[0].manifest
    config = RunConfig(experiment=IMPORTED, config={"n_splits": made.n_splits}, folds=made.scheme, folds_sha256=made.csv_sha256)
    with locked(run.folder), building(run.folder, lambda _: False) as folder:
        for number, part in scheme.given.merge(predicted).groupby("fold"):
            Run(folder).fold(number).write_predictions(part[["id", "label", "probability"]], tests, None, 0.0)
        config.write(Run(folder).config_file)
    return run


def _import_run(source: Path, run: Run, target: Run, workspace: Workspace) -> bool:
    folds = _newer_folds(run, target) if run.is_experiment else []
    use_blend = folds or run.missing_folds() < target.missing_folds()
    # A session may end between the files of a blend, and blending again is cheap.
    blend = [run.folder / name for name in BLEND_FILES] if use_blend and run.has_consistent_blend else []
    if not (folds or blend):
        return False
    for fold in folds:
        _check_fold(fold)
    environments = run.environments()
    beside = [*_beside(source, run, workspace)]
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
    if target.is_experiment:
        theirs, ours = run.made_from(), target.made_from()
        # The hash of pretrained weights is recorded when the first fold starts.
        hashes = {theirs.weights_sha256, ours.weights_sha256} - {None}
        if theirs.model_copy(update={"weights_sha256": ours.weights_sha256}) != ours or len(hashes) > 1:
            problem = "has another config, other folds or other patches than the run to import"
            raise UserError(f"{target.folder}: {problem}; move it away, or use another folder with --work")
    numbers = range(run.config().n_splits)
    return [run.fold(number) for number in numbers if _progress(run.fold(number)) > _progress(target.fold(number))]


def _replace_fold(source: Fold, target: Fold) -> None:
    """Replace `target` by a copy of `source`, all files at once; other files in its folder are kept."""
    with building(target.folder, lambda _: True) as folder:
        for name in FOLD_FILES:
            if (source.folder / name).is_file():
                _copy(source.folder / name, folder / name)
        if target.folder.is_dir():
            shutil.copytree(target.folder, folder, ignore=shutil.ignore_patterns(*FOLD_FILES), dirs_exist_ok=True)


def _beside(source: Path, run: Run, workspace: Workspace) -> Iterator[tuple[Path, Path]]:
    """Yield the fold file and the submissions of `run` in `source`, each before its JSON, and their places in `workspace`."""
    tables = []
    if run.is_experiment:
        made = run.made_from()
        tables.append((source / "folds" / f"{made.folds}.csv", made.folds_sha256, workspace.folds))
    records = {file: SubmissionRecord.read(file) for file in sorted(source.glob("submissions/*.json"))}
    own = {file.with_suffix(".csv"): record.sha256 for file, record in records.items() if record.run == run.name}
    for table, digest, target in [*tables, *((file, digest, workspace.submissions) for file, digest in own.items())]:
        copy, record = target / table.name, table.with_suffix(".json")
        if not (table.is_file() and record.is_file()):
            continue
        if file_sha256(table) != digest:
            raise UserError(f"{table}: has changed since the run {run.name} was made; download it again")
        if copy.exists() and file_sha256(copy) != digest:
            raise UserError(f"{copy}: differs from that of the imported run; move it away, or use another folder with --work")
        # The record here may have Kaggle's scores.
        if not (copy.exists() and (target / record.name).exists()):
            yield from ((table, copy), (record, target / record.name))


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
