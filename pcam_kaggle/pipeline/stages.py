"""The stages in their order, each kept where it is finished and still belongs to its inputs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from pcam_kaggle import UserError, examples
from pcam_kaggle.data import folds as fold_files
from pcam_kaggle.data.atomic_io import locked, write_csv
from pcam_kaggle.data.csv_io import read_labels, read_slides
from pcam_kaggle.data.folds import Folds, Scheme
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore, whole
from pcam_kaggle.kaggle.ledger import write_ledger
from pcam_kaggle.kaggle.submission import submit
from pcam_kaggle.pipeline.job import Job
from pcam_kaggle.runs.run import check_run, predicted, trained
from pcam_kaggle.scoring.blend import Member, Method, blend, read_member
from pcam_kaggle.scoring.metrics import interval_text
from pcam_kaggle.scoring.resampling import resampling
from pcam_kaggle.training.distributed import in_turn


def finished(job: Job) -> Job | None:
    """Return `job` on the runs and folds that are trained to their end, and name those that are not; None where none is.

    A run without a finished fold is left out, and a fold that is not finished in all others.
    """
    begun = [part for part in job.parts() if any(trained(part.run / f"fold_{fold}") for fold in job.folds())]
    chosen = tuple(fold for fold in job.folds() if begun and all(trained(part.run / f"fold_{fold}") for part in begun))
    if not chosen:
        print(f"missing: all of {job.run}, no fold was finished in time; the same command goes on from there")
        return None
    dropped = [part.name for part in job.parts() if part not in begun]
    missing = [f"run {name}" for name in dropped] + [f"fold {fold}" for fold in job.folds() if fold not in chosen]
    if not missing:
        return job
    print(f"missing: {', '.join(missing)}, not finished in time; the same command goes on from there")
    # What is blended of fewer runs than it was meant to be is another blend.
    name = "-without-".join([job.name, *dropped])
    return replace(job, chosen=chosen, name=name, trains=tuple(part.name for part in begun if job.trains))


@in_turn()
def run_prepare(job: Job) -> bool:
    """Pack the patches; return whether anything was done."""
    made, new = prepare(job.data, job.workspace.store, job.ids, job.skip_damaged)
    skipped = f", {made['skipped']} set aside in {job.workspace.store / 'skipped.csv'}" if made["skipped"] else ""
    _say(f"prepare: {made['train']:,} train and {made['test']:,} test patches in {job.workspace.store}{skipped}", new)
    in_both = made.get("in_both")
    if in_both:
        print(f"warning: ids in both train and test: {len(in_both):,} ({examples(in_both)})")
    return new


@in_turn()
def run_folds(job: Job) -> bool:
    """Draw the folds; return whether anything was done."""
    split = _split(job)
    with locked(job.workspace.folds):
        folds, new = fold_files.make(*split, job.workspace.folds)
    manifest = folds.manifest
    counts = ", ".join(f"{n:,}" for n in manifest["patches"])
    positives = ", ".join(f"{n:,}" for n in manifest["positives"])
    _say(f"folds: {counts} patches, {positives} positive, in {job.workspace.folds / manifest['scheme']}.csv", new)
    if manifest["slides"]:
        unmapped = f"; {manifest['unmapped']:,} ids that the map lacks share one fold" if manifest["unmapped"] else ""
        kind = "group of like stain" if job.config.groups == "stain" else "mapped slide"
        print(f"folds: no {kind} lies in two folds; groups per fold {manifest['slides']}{unmapped}")
    look_alikes = job.workspace.folds / f"{manifest['scheme']}_look_alikes.csv"
    if whole(job.workspace.store) and (new or not look_alikes.exists()):
        _report_look_alikes(job, folds, look_alikes)
    return new


def _report_look_alikes(job: Job, folds: Folds, file: Path) -> None:
    alike = fold_files.look_alikes(PatchStore(job.workspace.store), folds.table)
    with locked(job.workspace.folds):
        write_csv(file, alike)
    share = f"{len(alike):,} of {len(folds.table):,} patches look like one of another fold, {alike['copy'].sum():,} are copies"
    print(f"folds: {share}; listed in {file}")


def run_train(job: Job) -> bool:
    """Train what is not finished; return whether anything was done.

    A member of a blend is predicted before the next one is trained, which the budget then knows, and the next one is not begun
    where it ended.
    """
    from pcam_kaggle.models.factory import create

    # Weights that are not there are better missed now than after the hours of another member.
    for part in job.parts():
        if not all((part.run / f"fold_{fold}" / "last.pt").exists() for fold in part.folds()):
            create(part.config)
    done = []
    for part in job.parts():
        done.append(_train(part))
        if not all(trained(part.run / f"fold_{fold}") for fold in part.folds()):
            break
        if job.trains:
            done.append(_predict(part))
    return any(done)


def _train(job: Job) -> bool:
    store, folds = _open(job)
    todo = [fold for fold in job.folds() if not trained(job.run / f"fold_{fold}")]
    if todo:
        # torch and albumentations take seconds to import, and a run that is finished needs neither.
        from pcam_kaggle.training.train import train

        train(job.run, job.experiment, job.config, store, folds, todo, job.budget)
    _say(f"train: folds {_listed(job.folds())} of {job.run}", bool(todo))
    return bool(todo)


def run_predict(job: Job) -> bool:
    """Predict what is missing or stale; return whether anything was done."""
    done = [_predict(part) for part in job.parts()]
    return any(done)


def _predict(job: Job) -> bool:
    store, folds = _open(job)
    for fold in job.folds():
        if not trained(job.run / f"fold_{fold}"):
            raise UserError(f"{job.run / f'fold_{fold}'}: not trained to its end; run `python -m pcam_kaggle train` first")
    todo = [fold for fold in job.folds() if not predicted(job.run / f"fold_{fold}", store)]
    if todo:
        from pcam_kaggle.training.predict import predict

        predict(job.run, job.config, store, folds, todo)
    _say(f"predict: folds {_listed(job.folds())} of {job.run}", bool(todo))
    return bool(todo)


@in_turn()
def run_blend(job: Job) -> bool:
    """Blend the folds of the members and print the OOF table; return whether anything was done."""
    members = [read_member(job.workspace.run(name), job.chosen) for name in job.members or job.trains or (job.name,)]
    for part in (part for part in job.parts() if part is not job):
        # A member may have folds that the blend is made without, and be whole by itself.
        predicted_all = all((part.run / f"fold_{fold}" / "predictions.json").exists() for fold in range(part.config.n_splits))
        _blend(job, [read_member(part.run, None if predicted_all else job.chosen)], "mean", part.run)
    metrics, new = _blend(job, members, job.method, job.run)
    for fold, size, area in zip(metrics["folds"], metrics["patches"], metrics["fold_auc"], strict=True):
        print(f"  fold {fold}   {size:>7,} patches   OOF AUC {area:.4f}")
    deviation = "" if metrics["sd"] is None else f" ± {metrics['sd']:.4f} (SD over folds)"
    print(f"  mean     {metrics['mean']:.4f}{deviation}")
    for kind, title in (("pooled", "pooled"), ("ranked", "pooled after ranking within folds")):
        made = metrics[kind]
        interval = interval_text(made["low"], made["high"], made["undefined"])
        print(f"  {title}   {made['value']:.4f}, 95 % interval {interval} (unit: {made['unit']})")
    if gain := metrics["gain_of_weights"]:
        if gain["undefined"]:
            verdict = "not known to be more than the noise, so the mean is used"
        elif metrics["method"] == "climb":
            verdict = "more than the noise, so weights are used"
        else:
            verdict = "within the noise, so the mean is used"
        interval = interval_text(gain["low"], gain["high"], gain["undefined"], "+.4f")
        print(f"  weights against the mean   {gain['value']:+.4f} {interval} (unit: {gain['unit']}): {verdict}")
    _say(f"blend: {metrics['method']} of {', '.join(metrics['members'])} in {job.run / 'oof.csv'} and test.csv", new)
    return new


def _blend(job: Job, members: list[Member], method: Method, out: Path) -> tuple[dict[str, Any], bool]:
    """Blend `members` into `out`; what intervals and tests resample is told by their folds, or by the job's slide map."""
    groups = resampling(members[0].scheme, members[0].oof, job.workspace.folds, job.slides)
    with locked(out):
        return blend(members, method, out, *groups)


@in_turn()
def run_submission(job: Job) -> bool:
    """Write the submission; return whether anything was done."""
    target = job.target()
    with locked(job.workspace.submissions):
        table, new = submit(job.run, job.data.sample, target)
        write_ledger(job.workspace.submissions)
    _say(f"submission: {len(table):,} rows in {target}", new)
    return new


STAGES: dict[str, Callable[[Job], bool]] = {
    "prepare": run_prepare,
    "folds": run_folds,
    "train": run_train,
    "predict": run_predict,
    "blend": run_blend,
    "submission": run_submission,
}


def run_all(job: Job) -> None:
    """Run every stage; where `job.chosen` leaves folds to be trained, stop after their prediction and say so.

    Folds that the budget leaves unfinished are missing from the blend and the submission, which say so; without a finished
    fold there is none.
    """
    done = [run_prepare(job), run_folds(job), run_train(job)]
    asked, ended = job, finished(job)
    if ended is None:
        return
    job = ended
    done.append(run_predict(job))
    store = PatchStore(job.workspace.store)
    folders = {fold: [part.run / f"fold_{fold}" for part in job.parts()] for fold in range(job.config.n_splits)}
    left = [fold for fold, parts in folders.items() if not all(predicted(folder, store) for folder in parts)]
    if left and asked.chosen is not None:
        print(f"next: folds {_listed(left)}, then the blend")
        return
    job = job if left else replace(job, chosen=None)
    done += [run_blend(job), run_submission(job)]
    if job.demo:
        print("This was the synthetic demo: its score and its submission mean nothing for Kaggle.")
    if not any(done):
        print(f"nothing to do: {job.target()} is up to date")
    elif not job.demo:
        print(f"next: compare {job.run / 'metrics.json'} with other runs, or submit {job.target()} to Kaggle")
    else:
        print("next: get the competition's patches with `make data`, or point DATA at them, and run the command again")


def _split(job: Job) -> tuple[pd.DataFrame, Scheme, pd.DataFrame | None]:
    """Return what the job's fold file is drawn from: labels, scheme, map of slides or of stain."""
    labels, groups = read_labels(job.data.labels), job.config.groups
    if groups in ("none", "stain") and job.slides:
        raise UserError(f"groups={groups} and --slides contradict each other; leave one out")
    if groups == "stain":
        return labels, Scheme(job.config.n_splits, job.config.fold_seed, "stain"), _stain_map(job)
    path = None if groups == "none" else job.slides or job.data.slides()
    if groups == "slides" and path is None:
        raise UserError(f"groups=slides: no slide map in {job.data.root}; give one with --slides, or use --set groups=auto")
    scheme = Scheme(job.config.n_splits, job.config.fold_seed, "slides" if path else "stratified")
    return labels, scheme, read_slides(path) if path else None


def _stain_map(job: Job) -> pd.DataFrame:
    """Return the groups of like stain, found once for these patches and then read."""
    store = PatchStore(job.workspace.store)
    file = job.workspace.folds / f"stain_groups_{store.manifest['train_sha256'][:12]}.csv"
    if not file.exists():
        groups = fold_files.stain_groups(store)
        with locked(job.workspace.folds):
            write_csv(file, groups)
    return read_slides(file)


def _open(job: Job) -> tuple[PatchStore, Folds]:
    """Return the store and the folds, once the run's folder, if it stands, is known to belong to them."""
    store = PatchStore(job.workspace.store)
    folds = fold_files.load(*_split(job), job.workspace.folds)
    check_run(job.run, job.config, store, folds)
    return store, folds


def _say(text: str, new: bool) -> None:
    print(text if new else f"{text} (kept)", flush=True)


def _listed(folds: list[int]) -> str:
    return ", ".join(map(str, folds))
