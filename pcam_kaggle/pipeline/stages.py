"""The stages: each one works on a job, and skips what is up to date."""

import logging
from collections.abc import Callable

import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import locked
from pcam_kaggle.data.folds import Folds, Scheme, fold_inputs, load_folds, make_folds
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.pipeline.compare import resampled_groups
from pcam_kaggle.pipeline.job import Job
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import write_ledger, write_submission
from pcam_kaggle.scoring.blend import Method, RunPredictions, blend
from pcam_kaggle.scoring.intervals import Clusters
from pcam_kaggle.scoring.results import BlendMetrics
from pcam_kaggle.scoring.tables import score_lines
from pcam_kaggle.training.distributed import one_rank_at_a_time

log = logging.getLogger(__name__)


@one_rank_at_a_time()
def run_prepare(job: Job) -> bool:
    """Pack the patches; return whether anything was done."""
    made, new = prepare(job.data, job.workspace.store, job.ids, job.skip_damaged)
    skipped = f", {made.skipped} skipped, see {job.workspace.store / 'skipped.csv'}" if made.skipped else ""
    _report(f"prepare: {made.train:,} train and {made.test:,} test patches in {job.workspace.store}{skipped}", new)
    if made.in_both:
        log.warning("ids in both train and test: %s (%s)", f"{len(made.in_both):,}", examples(made.in_both))
    return new


@one_rank_at_a_time()
def run_folds(job: Job) -> bool:
    """Draw the folds; return whether anything was done."""
    inputs = _fold_inputs(job)
    with locked(job.workspace.folds):
        folds, new = make_folds(*inputs, job.workspace.folds)
    manifest = folds.manifest
    counts = ", ".join(f"{n:,}" for n in manifest.patches)
    positives = ", ".join(f"{n:,}" for n in manifest.positives)
    _report(f"folds: {counts} patches, {positives} positive, in {job.workspace.folds / manifest.scheme}.csv", new)
    if manifest.slides:
        unmapped = f"; {manifest.unmapped:,} ids that the map lacks share one fold" if manifest.unmapped else ""
        kind = "stain group" if job.config.groups == "stain" else "mapped slide"
        log.info("folds: no %s is in two folds; groups per fold %s%s", kind, manifest.slides, unmapped)
    return new


def run_train(job: Job) -> bool:
    """Train what is not finished; return whether anything was done.

    A member of a blend is predicted before the next one is trained, so that the budget covers its predictions; training ends
    with the first member that the budget leaves unfinished.
    """
    from pcam_kaggle.models.factory import create

    # Missing weights are better reported now than after the hours of another member.
    for part in job.parts():
        if not all(fold.is_started or fold.is_trained for fold in map(part.run.fold, part.folds)):
            create(part.config)
    done = []
    for part in job.parts():
        done.append(_train(part))
        if not all(part.run.fold(number).is_trained for number in part.folds):
            break
        if job.trains:
            done.append(_predict(part))
    return any(done)


def _train(job: Job) -> bool:
    store, folds = _open(job)
    todo = [number for number in job.folds if not job.run.fold(number).is_trained]
    if todo:
        # torch and albumentations take seconds to import, and a finished run needs neither.
        from pcam_kaggle.training.probe import probe
        from pcam_kaggle.training.task import Task
        from pcam_kaggle.training.train import train

        work = probe if job.config.optimizer == "logistic" else train
        work(Task(job.run, job.experiment, job.config, store, folds), todo, job.budget)
    _report(f"train: folds {_listed(job.folds)} of {job.run.folder}", bool(todo))
    return bool(todo)


def run_predict(job: Job) -> bool:
    """Predict what is missing or out of date; return whether anything was done."""
    done = [_predict(part) for part in job.parts()]
    return any(done)


def _predict(job: Job) -> bool:
    store, folds = _open(job)
    parts = [job.run.fold(number) for number in job.folds]
    for fold in parts:
        if not fold.is_trained:
            raise UserError(f"{fold.folder}: training is not finished; run `python -m pcam_kaggle train` first")
    todo = [fold.number for fold in parts if not fold.is_predicted(store)]
    if todo:
        from pcam_kaggle.training.predict import predict
        from pcam_kaggle.training.task import Task

        predict(Task(job.run, job.experiment, job.config, store, folds), todo)
    _report(f"predict: folds {_listed(job.folds)} of {job.run.folder}", bool(todo))
    return bool(todo)


@one_rank_at_a_time()
def run_blend(job: Job) -> bool:
    """Blend the folds of the members and print the OOF table; return whether anything was done."""
    names = job.members or tuple(part.name for part in job.parts())
    members = [Run(job.workspace.run(name)).predictions(job.chosen) for name in names]
    for part in job.parts() if job.trains else ():
        # A member may have all folds where the blend lacks some, and is then complete by itself.
        has_all = all(fold.has_predictions for fold in part.run.folds())
        _blend(job, [part.run.predictions(None if has_all else job.chosen)], "mean", part.run)
    metrics, new = _blend(job, members, job.method, job.run)
    for line in score_lines(metrics):
        log.info("  %s", line)
    _report(f"blend: {metrics.method} of {', '.join(metrics.members)} in {job.run.folder}", new)
    return new


def _blend(job: Job, members: list[RunPredictions], method: Method, out: Run) -> tuple[BlendMetrics, bool]:
    """Blend `members` into `out`; intervals and tests resample the groups of their folds, or of the job's slide map."""
    first = members[0]
    groups, unit = resampled_groups(first.scheme, first.oof, job.workspace.folds, job.slides)
    with locked(out.folder):
        return out.write_blend(blend(members, method, Clusters.of(first.oof["id"], groups, unit)))


@one_rank_at_a_time()
def run_submission(job: Job) -> bool:
    """Write the submission; return whether anything was done."""
    target = job.submission()
    with locked(job.workspace.submissions):
        table, new = write_submission(job.run, job.data.sample, target)
        write_ledger(job.workspace.submissions)
    _report(f"submission: {len(table):,} rows in {target}", new)
    return new


STAGES: dict[str, Callable[[Job], bool]] = {
    "prepare": run_prepare,
    "folds": run_folds,
    "train": run_train,
    "predict": run_predict,
    "blend": run_blend,
    "submission": run_submission,
}


def _fold_inputs(job: Job) -> tuple[pd.DataFrame, Scheme, pd.DataFrame | None]:
    return fold_inputs(job.data, job.config, job.slides, job.workspace)


def _open(job: Job) -> tuple[PatchStore, Folds]:
    """Return the store and the folds, after checking that an existing run belongs to them."""
    store = PatchStore(job.workspace.store)
    folds = load_folds(*_fold_inputs(job), job.workspace.folds)
    job.run.check(job.config, store, folds)
    return store, folds


def _report(text: str, new: bool) -> None:
    log.info("%s%s", text, "" if new else " (up to date)")


def _listed(folds: list[int]) -> str:
    return ", ".join(map(str, folds))
