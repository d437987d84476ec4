"""A job: an experiment on some data, into some folders, within some time. Made here for the command line and for Kaggle."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import Part, changed_name, experiment, seeds_name
from pcam_kaggle.core.paths import DEMO_SUFFIX, Data, Workspace, attached, find_data, find_workspace
from pcam_kaggle.data.prepare import Ids
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import PLAIN_NAME, read_labels, read_sample
from pcam_kaggle.models.weights_source import with_folder_settings
from pcam_kaggle.runs.import_run import import_runs
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import Method
from pcam_kaggle.training.budget import ENDLESS, Budget

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the stages work on.

    Attributes:
        data: The competition's files.
        workspace: Where results are written.
        demo: Whether the data are the synthetic demo's.
        experiment: Name of the experiment.
        config: Its config, with the user's changes.
        name: Name of the run and of its submission.
        chosen: Folds to work on, None for all.
        slides: CSV of id,wsi that takes the place of the one beside the labels.
        ids: How ids are made, None for what `dataset.json` says.
        skip_damaged: Whether damaged train patches are skipped.
        members: Runs that the blend stage is given.
        trains: Runs to train, of an experiment that is a blend or of several seeds.
        method: How predictions are blended.
        budget: Time at whose end training stops; the blend is then of the folds that are finished.
    """

    data: Data
    workspace: Workspace
    demo: bool
    experiment: str
    config: Config
    name: str
    chosen: tuple[int, ...] | None = None
    slides: Path | None = None
    ids: Ids | None = None
    skip_damaged: bool = False
    members: tuple[str, ...] = ()
    trains: tuple[Part, ...] = ()
    method: Method = "mean"
    budget: Budget = ENDLESS

    @property
    def run(self) -> Run:
        """The job's run."""
        return Run(self.workspace.run(self.name))

    @property
    def folds(self) -> list[int]:
        """Numbers of the folds to work on, sorted."""
        return list(range(self.config.n_splits)) if self.chosen is None else sorted(set(self.chosen))

    def store(self) -> PatchStore:
        """Return the packed patches."""
        return PatchStore(self.workspace.store)

    def labels(self) -> pd.DataFrame:
        """Return the labels of the packed train patches, columns id and label."""
        labels = read_labels(self.data.labels)
        return labels[labels["id"].isin(self.store().ids("train"))]

    def submission(self) -> Path:
        """Return the file of the submission; the name of one that lacks folds lists those it has."""
        made = self.run.blend_metrics(folds=list, missing_folds=list)
        part = f"-folds-{'-'.join(map(str, made['folds']))}" if made["missing_folds"] else ""
        return self.workspace.submissions / f"{self.name}{part}{DEMO_SUFFIX if self.demo else ''}.csv"

    def parts(self) -> list["Job"]:
        """Return the jobs to train and predict: this one, or one for each run that it blends."""
        parts = [
            replace(self, name=part.name, experiment=part.experiment, config=part.config, trains=()) for part in self.trains
        ]
        return parts or [self]


def make_job(
    data: Data,
    workspace: Workspace,
    experiment_name: str,
    changes: Sequence[str] = (),
    *,
    name: str = "",
    folds: tuple[int, ...] | None = None,
    slides: Path | None = None,
    ids: Ids | None = None,
    skip_damaged: bool = False,
    members: tuple[str, ...] = (),
    method: Method = "mean",
    hours: float | None = None,
    seeds: int = 1,
    demo: bool = False,
) -> Job:
    """Return the job of an experiment with `changes` (`key=value`) to its config.

    Args:
        data: The competition's files.
        workspace: Where results are written.
        experiment_name: Name of the experiment.
        changes: Assignments to fields of its config.
        name: Name of the run; by default the experiment's, or that of the members.
        folds: Folds to work on, None for all.
        slides: CSV of id,wsi.
        ids: How ids are made.
        skip_damaged: Whether damaged train patches are skipped.
        members: Runs to blend.
        method: How predictions are blended.
        hours: Time for the job, None for no limit.
        seeds: Number of seeds to train and to blend, from that of the config on; each has a run, `<name>-seed<number>`.
        demo: Whether the data are the synthetic demo's.

    Raises:
        UserError: There is no such experiment, field, fold or file, or a name can't be a file name.
    """
    chosen = experiment(experiment_name)
    name = name or "-".join(members) or experiment_name
    for text in (name, *members):
        if not PLAIN_NAME.fullmatch(text):
            raise UserError(f"{text!r} is not a plain file name; use letters, digits, points, dashes and underscores")
    if slides and not slides.is_file():
        raise UserError(f"--slides {slides}: no such file")
    # A folder of weights says which net they are for.
    config = chosen.changed(with_folder_settings(list(changes)))
    if members and seeds > 1:
        raise UserError(f"--seeds {seeds}: trains runs, so it can't be combined with runs to blend")
    trains = chosen.parts(experiment_name, name, config, seeds)
    name = seeds_name(name, seeds)
    # The folds of runs that are blended are theirs, not this config's.
    unknown = [fold for fold in folds or () if not 0 <= fold < config.n_splits and not members]
    if unknown:
        raise UserError(f"--folds {unknown[0]}: there are folds 0 to {config.n_splits - 1}")
    return Job(
        data=data,
        workspace=workspace,
        demo=demo,
        experiment=experiment_name,
        config=config,
        name=name,
        chosen=folds,
        slides=slides,
        ids=ids,
        skip_damaged=skip_damaged,
        members=members,
        trains=trains,
        method=method,
        budget=Budget.of_hours(hours) if hours else ENDLESS,
    )


def kernel_job(experiment_name: str, changes: list[str], hours: float, seeds: int = 1) -> Job:
    """Return the job of a Kaggle kernel, after importing the runs in attached outputs of the same kernel.

    Args:
        experiment_name: Name of the experiment.
        changes: Assignments (`key=value`) to fields of its config.
        hours: Time after which the session must have ended.
        seeds: Number of seeds to train and to blend.

    Raises:
        UserError: The competition's data or a net's weights are not attached, an output is damaged, or there is no GPU that
            this build of torch can use.
    """
    workspace = find_workspace(None)
    data = find_data(None, workspace.root)
    if data is None:
        raise UserError("the competition's data are not attached: Add Input, Competitions, Histopathologic Cancer Detection")
    for source in attached():
        imported = import_runs(source, workspace)
        log.info("%s: %s", source, f"resuming {', '.join(imported)}" if imported else "attached")
    name = changed_name(experiment_name, changes)
    job = make_job(data, workspace, experiment_name, changes, name=name, hours=hours, seeds=seeds)
    # A missing GPU or missing weights are better reported now than after an hour of preparation.
    from pcam_kaggle.models.factory import create
    from pcam_kaggle.training.capacity import check_capacity, this_machine
    from pcam_kaggle.training.device import device_name, find_device

    device = find_device()
    log.info("%s on %s, from %s", job.name, device_name(device), data.root)
    if device == "cuda":
        counts = len(read_labels(data.labels)), len(read_sample(data.sample))
        log.info("%s %s", job.name, check_capacity([part.config for part in job.parts()], *counts, this_machine(hours)))
    for part in job.parts():
        create(part.config)
    return job
