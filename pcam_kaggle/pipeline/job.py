"""What is to be done: an experiment on some data, into some folders, within some time."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from pcam_kaggle import UserError
from pcam_kaggle.config.experiments import experiment
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import read_json, reading
from pcam_kaggle.data.layout import DEMO_SUFFIX, Data, Workspace, attached, find_data, find_workspace
from pcam_kaggle.data.prepare import Ids
from pcam_kaggle.runs.import_run import take_over
from pcam_kaggle.scoring.blend import Method
from pcam_kaggle.training.budget import ENDLESS, Budget


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the stages work on; `name` is the run's, `chosen` the folds to train, None for all.

    `trains` are the members of an experiment that is a blend; `members` the runs that the blend stage is given. Training ends
    with the `budget`, and the blend is then of the folds that are finished.
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
    trains: tuple[str, ...] = ()
    method: Method = "mean"
    budget: Budget = ENDLESS

    @property
    def run(self) -> Path:
        """Folder of the run."""
        return self.workspace.run(self.name)

    def target(self) -> Path:
        """Return the file of the submission; that of a blend which lacks folds has a name of its own."""
        file = self.run / "metrics.json"
        made = read_json(file, folds=list, missing_folds=list)
        with reading(file):
            part = f"-folds-{'-'.join(f'{fold:d}' for fold in made['folds'])}" if made["missing_folds"] else ""
        return self.workspace.submissions / f"{self.name}{part}{DEMO_SUFFIX if self.demo else ''}.csv"

    def parts(self) -> list["Job"]:
        """Return the jobs to train and predict: this one, or one for each experiment that it blends."""
        parts = [replace(self, experiment=name, config=experiment(name).config, name=name, trains=()) for name in self.trains]
        return parts or [self]

    def folds(self) -> list[int]:
        """Return the folds to work on; raises UserError on one that the config does not have."""
        n_splits = self.config.n_splits
        for fold in self.chosen or ():
            if not 0 <= fold < n_splits:
                raise UserError(f"--folds {fold}: there are folds 0 to {n_splits - 1}")
        return list(range(n_splits)) if self.chosen is None else sorted(set(self.chosen))


def kernel_job(name: str, changes: list[str], hours: float) -> Job:
    """Return the job of a Kaggle kernel: experiment `name` with `changes` to its config, to end within `hours`.

    What earlier outputs of the kernel, attached as inputs, hold of it is taken over.

    Raises UserError where the competition's data or a net's weights are not attached, and where an output is damaged.
    """
    workspace = find_workspace(None)
    data = find_data(None, workspace.root)
    if data is None:
        raise UserError("the competition's data are not attached: Add Input, Competitions, Histopathologic Cancer Detection")
    for source in attached():
        taken = take_over(source, workspace)
        print(f"{source}: goes on with {', '.join(taken)}" if taken else f"{source}: attached")
    chosen = experiment(name)
    job = Job(
        data=data,
        workspace=workspace,
        demo=False,
        experiment=name,
        config=chosen.changed(changes),
        name=re.sub(r"[^A-Za-z0-9_.-]", "_", "-".join([name, *changes])),
        trains=chosen.members,
        budget=Budget.of_hours(hours),
    )
    # A GPU or weights that are not there are better missed now than after an hour's preparation.
    from pcam_kaggle.models.factory import create
    from pcam_kaggle.training.device import device_name, find_device

    print(f"{job.name} on {device_name(find_device())}, from {data.root}")
    for part in job.parts():
        create(part.config)
    return job
