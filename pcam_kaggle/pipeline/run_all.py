"""All stages in order, and what is left when the time is over."""

import logging
from dataclasses import replace

from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.pipeline.job import Job
from pcam_kaggle.pipeline.stages import run_blend, run_folds, run_predict, run_prepare, run_submission, run_train

log = logging.getLogger(__name__)


def run_all(job: Job) -> None:
    """Run every stage.

    If `job.chosen` leaves folds to be trained, stop after the predictions and say so. Folds that the budget left unfinished are
    missing from the blend and from the submission, whose name lists the others; without a finished fold there is none.
    """
    done = [run_prepare(job), run_folds(job), run_train(job)]
    part = finished(job)
    if part is None:
        return
    done.append(run_predict(part))
    store = PatchStore(job.workspace.store)
    numbers = range(part.config.n_splits)
    missing = [n for n in numbers if not all(each.run.fold(n).is_predicted(store) for each in part.parts())]
    if missing and job.chosen is not None:
        log.info("next: folds %s, then the blend", ", ".join(map(str, missing)))
        return
    part = part if missing else replace(part, chosen=None)
    done += [run_blend(part), run_submission(part)]
    if part.demo:
        log.info("This was the synthetic demo: its score and its submission mean nothing for Kaggle.")
    if not any(done):
        log.info("nothing to do: %s is up to date", part.submission())
    elif part.demo:
        log.info("next: get the competition's patches with `make data`, or point DATA at them, and run the command again")
    else:
        log.info("next: compare %s with other runs, or submit %s to Kaggle", part.name, part.submission())


def finished(job: Job) -> Job | None:
    """Return `job` restricted to runs and folds whose training is finished, and report the others; None if there is none.

    A run without a finished fold is left out, and a fold that any other run has not finished is left out of all.
    """
    started = [part for part in job.parts() if any(part.run.fold(n).is_trained for n in job.folds)]
    chosen = tuple(n for n in job.folds if started and all(part.run.fold(n).is_trained for part in started))
    if not chosen:
        log.info("missing: all of %s, no fold was finished in time; the same command resumes", job.run.folder)
        return None
    dropped = [part.name for part in job.parts() if part not in started]
    missing = [f"run {name}" for name in dropped] + [f"fold {n}" for n in job.folds if n not in chosen]
    if not missing:
        return job
    log.info("missing: %s, not finished in time; the same command resumes", ", ".join(missing))
    # A blend of fewer runs than intended is another blend, so it gets another name.
    name = "-without-".join([job.name, *dropped])
    names = {part.name for part in started}
    return replace(job, chosen=chosen, name=name, trains=tuple(part for part in job.trains if part.name in names))
