"""The stages: each one works on a job, and skips what is up to date. The whole pipeline runs all of them in order."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING

from pcam_kaggle.core.errors import UserError, examples, program
from pcam_kaggle.core.experiments import RunSpec
from pcam_kaggle.core.files import locked
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.data.folds import fold_inputs, load_folds, make_folds
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.pipeline.compare import resampled_groups, with_groups
from pcam_kaggle.pipeline.job import Job, run_rehearsal
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import write_ledger, write_submission
from pcam_kaggle.scoring.blend import Method, RunPredictions, blend
from pcam_kaggle.scoring.compare import common_folds
from pcam_kaggle.scoring.intervals import Clusters
from pcam_kaggle.scoring.results import BlendMetrics
from pcam_kaggle.scoring.tables import score_lines
from pcam_kaggle.training.distributed import on_first_rank, process_group, rank

if TYPE_CHECKING:
    from pcam_kaggle.training.task import Task

log = logging.getLogger(__name__)

Stage = Callable[[Job], bool]


def _once(stage: Stage) -> Stage:
    """Return `stage` for torchrun: rank 0 works, the other ranks wait for what it returns."""
    return wraps(stage)(lambda job: on_first_rank(partial(stage, job)))


@_once
def run_prepare(job: Job) -> bool:
    """Pack the patches; return whether anything was done."""
    folder, selection = job.workspace.store_of(job.config.subset), job.selection
    made, new = prepare(job.data, folder, selection.ids, job.config.subset)
    _report(job, f"prepare: {made.train:,} train and {made.test:,} test patches in {folder}", new)
    if made.in_both:
        log.warning("ids in both train and test: %s (%s)", f"{len(made.in_both):,}", examples(made.in_both))
    return new


@_once
def run_folds(job: Job) -> bool:
    """Draw the folds; return whether anything was done."""
    inputs = fold_inputs(job.data, job.config, job.selection.slides, job.workspace, job.selection.fold_file)
    with locked(job.workspace.folds):
        folds, new = make_folds(*inputs, job.workspace.folds)
    manifest = folds.manifest
    counts, positives = (", ".join(f"{n:,}" for n in each) for each in (manifest.patches, manifest.positives))
    _report(job, f"folds: {counts} patches, {positives} positive, in {job.workspace.folds / manifest.scheme}.csv", new)
    if manifest.slides:
        unmapped = f"; {manifest.unmapped:,} ids that the map lacks share one fold" if manifest.unmapped else ""
        kind = "stain group" if job.config.groups == "stain" else "mapped slide"
        log.info("folds: no %s is in two folds; groups per fold %s%s", kind, manifest.slides, unmapped)
    return new


def run_train(job: Job) -> bool:
    """Train and predict what is not finished, until the budget leaves a run unfinished; return whether anything was done.

    A run is predicted before the next one is trained, so that the budget covers its predictions.
    """
    done = []
    for spec in job.plan.trained:
        run = Run(job.workspace.run(spec.name))
        # A teacher that has its folds may have been made in another way.
        if run in job.runs or not all(run.fold(number).is_trained for number in job.folds):
            done.append(_train(job, spec))
        trained = [number for number in job.folds if run.fold(number).is_trained]
        if trained and run in job.runs:
            done.append(_predict(job, spec, trained))
        if trained != job.folds:
            break
    return any(done)


def _train(job: Job, spec: RunSpec) -> bool:
    task = _task(job, spec)
    todo = [number for number in job.folds if not task.run.fold(number).is_trained]
    if todo:
        from pcam_kaggle.training.probe import probe
        from pcam_kaggle.training.train import train

        work = probe if spec.config.probe else train
        work(task, todo, job.budget)
    return _report(job, f"train: folds {', '.join(map(str, job.folds))} of {task.run.folder}", bool(todo), task.run)


def run_predict(job: Job) -> bool:
    """Predict what is missing or out of date; return whether anything was done."""
    done = [_predict(job, spec, job.folds) for spec in job.plan.runs]
    return any(done)


def _predict(job: Job, spec: RunSpec, numbers: list[int]) -> bool:
    task = _task(job, spec)
    folds = [task.run.fold(number) for number in numbers]
    for fold in folds:
        if not fold.is_trained:
            raise UserError(f"{fold.folder}: training is not finished; run `{program()} train` first")
    todo = [fold.number for fold in folds if not fold.is_predicted(task.store)]
    if todo:
        from pcam_kaggle.training.predict import predict

        predict(task, todo)
    return _report(job, f"predict: folds {', '.join(map(str, numbers))} of {task.run.folder}", bool(todo), task.run)


@_once
def run_blend(job: Job) -> bool:
    """Blend the folds of the runs and print the OOF table; return whether anything was done."""
    named = [Run(job.workspace.run(name)) for name in job.selection.runs]
    chosen = job.selection.folds or common_folds({run.name: run.predicted_folds() for run in named}) or None
    members = [run.predictions(chosen) for run in named or job.runs]
    # Of a blend, perhaps of the one run that was finished in time.
    for run in job.runs if not named and job.run not in job.runs else ():
        # A run may have all folds where the blend lacks some, and is then complete by itself.
        has_all = len(run.predicted_folds()) == len(run.folds())
        _blend(job, [run.predictions(None if has_all else chosen)], "mean", run)
    metrics, new = _blend(job, members, job.method, job.run)
    for line in score_lines(metrics):
        log.info("  %s", line)
    return _report(job, f"blend: {metrics.method} of {', '.join(metrics.members)} in {job.run.folder}", new)


def _blend(job: Job, members: list[RunPredictions], method: Method, out: Run) -> tuple[BlendMetrics, bool]:
    """Blend `members` into `out`; intervals and tests resample the groups of their folds, or of the job's slide map."""
    members = [with_groups(member, job.workspace.folds) for member in members]
    first = members[0]
    groups, unit = resampled_groups(first.scheme, first.oof, job.workspace.folds, job.selection.slides)
    with locked(out.folder):
        return out.write_blend(blend(members, method, Clusters.of(first.oof["id"], groups, unit)))


@_once
def run_submission(job: Job) -> bool:
    """Write the submission; return whether anything was done."""
    target = job.submission()
    with locked(job.workspace.submissions):
        table, new = write_submission(job.run, job.data.sample, target)
        write_ledger(job.workspace.submissions)
    return _report(job, f"submission: {len(table):,} rows in {target}", new)


STAGES: dict[str, Stage] = {
    "prepare": run_prepare,
    "folds": run_folds,
    "train": run_train,
    "predict": run_predict,
    "blend": run_blend,
    "submission": run_submission,
}


def _make_demo(job: Job) -> None:
    if job.demo and not job.selection.runs:
        on_first_rank(partial(make_demo, job.data))


@process_group()
def run_stage(job: Job, name: str) -> None:
    """Run the stage called `name`, in every process that torchrun has started."""
    _make_demo(job)
    if name == "train":
        run_rehearsal(job)
    STAGES[name](job)


@process_group()
def run_all(job: Job) -> None:
    """Run every stage, in every process that torchrun has started.

    Folds that the job's selection leaves to be trained end it before the blend; those that the budget left unfinished are
    missing from the blend and from the submission, whose name lists the others. Without a finished fold there is none.
    """
    _make_demo(job)
    run_rehearsal(job)
    done = [run_prepare(job), run_folds(job), run_train(job)]
    part = restrict_to_trained(job)
    if part is None:
        return
    store = part.store()
    missing = [n for n in range(job.config.n_splits) if not all(run.fold(n).is_predicted(store) for run in part.runs)]
    if missing and job.selection.folds is not None:
        log.info("next: folds %s, then the blend", ", ".join(map(str, missing)))
        return
    part = part if missing else replace(part, selection=replace(part.selection, folds=None))
    done += [run_blend(part), run_submission(part)]
    if part.demo:
        log.info("This was the synthetic demo: its score and its submission mean nothing for Kaggle.")
    if not any(done):
        log.info("nothing to do: %s is up to date", part.submission())
    elif part.demo:
        log.info("next: get the competition's data with make data, or %s kaggle download, and run it on them", program())
    else:
        log.info("next: compare %s with other runs, or submit %s to Kaggle", part.plan.name, part.submission())


def restrict_to_trained(job: Job) -> Job | None:
    """Return `job` restricted to runs and folds whose training is finished, and report the others; None if there is none.

    A run without a finished fold is left out, and a fold that any other run has not finished is left out of all.
    """
    started = [run for run in job.runs if any(run.fold(n).is_trained for n in job.folds)]
    folds = tuple(n for n in job.folds if started and all(run.fold(n).is_trained for run in started))
    if not folds:
        log.info("missing: all of %s, no fold was finished in time; the same command resumes", job.run.folder)
        return None
    dropped = [run.name for run in job.runs if run not in started]
    missing = [f"run {name}" for name in dropped] + [f"fold {n}" for n in job.folds if n not in folds]
    if not missing:
        return job
    log.info("missing: %s, not finished in time; the same command resumes", ", ".join(missing))
    return replace(job, plan=job.plan.without(dropped), selection=replace(job.selection, folds=folds))


def _task(job: Job, spec: RunSpec) -> "Task":
    """Return what training and prediction take, after checking that an existing run belongs to the store and the folds."""
    from pcam_kaggle.training.task import Task

    store = job.store()
    inputs = fold_inputs(job.data, spec.config, job.selection.slides, job.workspace, job.selection.fold_file)
    folds = load_folds(*inputs, job.workspace.folds)
    task = Task(Run(job.workspace.run(spec.name)), spec.experiment, spec.config, store, folds)
    task.run.check(spec.config, store, folds)
    return task


def _report(job: Job, text: str, new: bool, *worked: Run) -> bool:
    """Log the end of a stage and return whether it is `new`; runs worked on then record the seconds since the stage before."""
    log.info("%s%s", text, "" if new else " (up to date)")
    if new and rank() == 0:
        stage, passed = text.partition(":")[0], time.perf_counter() - job.started
        job.seconds[stage] = job.seconds.get(stage, 0.0) + passed - sum(job.seconds.values())
        job.worked.update(worked)
        for run in job.worked:
            run.measure(job.seconds)
    return new
