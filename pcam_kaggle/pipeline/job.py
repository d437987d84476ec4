"""A job: a plan of runs, the data and folders it works on, and the choices of the user."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import Plan, changed_name, plan
from pcam_kaggle.core.paths import DEMO_SUFFIX, Data, Workspace, attached, attached_folder, find_data, find_workspace, unpack
from pcam_kaggle.data.folds import given_folds
from pcam_kaggle.data.listing import Ids
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels
from pcam_kaggle.pipeline.weights_folder import with_folder_settings
from pcam_kaggle.runs.import_run import import_runs
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import Method
from pcam_kaggle.training.budget import ENDLESS, Budget

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Selection:
    """What to read and to work on.

    `slides` is a CSV of id,wsi in place of the one beside the labels, `ids` the ID scheme (None for what `dataset.json` says).
    Only `folds` are worked on, None for all; `runs` are blended in place of those of the plan. `fold_file`: see `given_folds`.
    """

    slides: Path | None = None
    ids: Ids | None = None
    folds: tuple[int, ...] | None = None
    runs: tuple[str, ...] = ()
    fold_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """What the stages work on: the runs of `plan`, trained on the competition's `data`, with results in `workspace`.

    At the end of `budget`, training stops; the blend is then of the finished folds. `demo` is whether the data are synthetic.
    `seconds` are the durations of the stages since `started` (a value of the performance counter), `worked` the runs that these
    have trained or predicted. Raises UserError if there is no such fold or slide map.
    """

    plan: Plan
    data: Data
    workspace: Workspace
    selection: Selection = Selection()
    method: Method = "mean"
    budget: Budget = ENDLESS
    demo: bool = False
    started: float = field(default_factory=time.perf_counter, compare=False)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    worked: set[Run] = field(default_factory=set, compare=False)

    def __post_init__(self) -> None:
        selection = self.selection
        if selection.slides and not selection.slides.is_file():
            raise UserError(f"--slides {selection.slides}: no such file{unpack(selection.slides)}")
        # The folds of runs that are given are theirs, not this config's.
        unknown = [fold for fold in selection.folds or () if not (selection.runs or 0 <= fold < self.config.n_splits)]
        if unknown:
            raise UserError(f"--folds {unknown[0]}: there are folds 0 to {self.config.n_splits - 1}")

    @property
    def config(self) -> Config:
        """The config of the first run; the others have the same folds."""
        return self.plan.runs[0].config

    @property
    def folds(self) -> list[int]:
        """Numbers of the folds to work on, sorted."""
        chosen = self.selection.folds
        return list(range(self.config.n_splits)) if chosen is None else sorted(set(chosen))

    @property
    def run(self) -> Run:
        """The run of the result."""
        return Run(self.workspace.run(self.plan.name))

    @property
    def runs(self) -> list[Run]:
        """The runs to train."""
        return [Run(self.workspace.run(spec.name)) for spec in self.plan.runs]

    def store(self) -> PatchStore:
        """Return the packed patches."""
        return PatchStore(self.workspace.store_of(self.config.subset))

    def labels(self) -> pd.DataFrame:
        """Return the labels of the packed train patches, columns id and label."""
        labels = read_labels(self.data.labels)
        return labels[labels["id"].isin(self.store().ids("train"))]

    def submission(self) -> Path:
        """Return the file of the submission; the name of one that lacks folds lists those it has."""
        made = self.run.blend_metrics()
        part = f"-folds-{'-'.join(map(str, made.folds))}" if made.missing_folds else ""
        return self.workspace.submissions / f"{self.plan.name}{part}{DEMO_SUFFIX if self.demo else ''}.csv"


def with_given_folds(planned: Plan, fold_file: Path, data: Data) -> Plan:
    """Return `planned` with as many folds as the CSV `fold_file` has; raises UserError as `given_folds` does."""
    n_splits = given_folds(fold_file, read_labels(data.labels), planned.runs[0].config.subset)[0].n_splits
    log.info("folds: n_splits=%d, as in %s", n_splits, fold_file)
    return Plan(planned.name, tuple(replace(spec, config=replace(spec.config, n_splits=n_splits)) for spec in planned.runs))


def time_limit(hours: float | None) -> Budget:
    """Return the budget of `hours` from now, None for no limit."""
    return Budget.of_hours(hours) if hours else ENDLESS


def run_rehearsal(job: Job) -> None:
    """Take a step of each model that is about to be trained, so that one that is too large or lacks weights fails at once."""
    configs = [
        # Seeds train the same model.
        replace(spec.config, seed=job.config.seed)
        for spec in job.plan.trained
        if not all(fold.is_started or fold.is_trained for fold in map(Run(job.workspace.run(spec.name)).fold, job.folds))
    ]
    if configs:
        # torch and albumentations take seconds to import, and a finished run needs neither.
        from pcam_kaggle.training.train import rehearse

        for config in dict.fromkeys(configs):
            rehearse(config)


def kernel_job(
    experiment: str, changes: Sequence[str], hours: float, seeds: int, slides: str, allow_cpu: bool, name: str
) -> Job:
    """Return the job of a Kaggle session that ends after `hours`, after importing runs from attached outputs of the notebook.

    It trains an experiment with `changes` (`key=value`) to its config, with so many `seeds`, as `name` (or `changed_name`); the
    slide map in the attached dataset `slides` (owner/name) groups its folds. Raises UserError if there is no GPU that can
    compute and `allow_cpu` is false, the data are not attached, an output is damaged, there is no such experiment or field, or
    the session can't train it (`run_rehearsal`).
    """
    from pcam_kaggle.training.device import device_name, find_device

    budget, workspace, kind = time_limit(hours), find_workspace(None), find_device()
    if kind != "cuda" and not allow_cpu:
        raise UserError("no GPU: choose Settings, Accelerator, GPU T4 x2, and run all cells again; or set ALLOW_CPU = True")
    data = find_data(None, workspace.root)
    if data is None:
        raise UserError("the competition's data are not attached: Add Input, Competitions, Histopathologic Cancer Detection")
    for source in attached():
        imported = import_runs(source, workspace)
        log.info("%s: %s", source, f"resuming {', '.join(imported)}" if imported else "attached")
    slide_map = Data(folder).slides() if (folder := attached_folder(slides)) else None
    if slides and not slide_map:
        raise UserError(f"slides {slides}: not attached, or without patch_id_wsi*.csv; correct --slides")
    runs = plan(experiment, with_folder_settings(changes), name or changed_name(experiment, changes), seeds)
    job = Job(runs, data, workspace, Selection(slide_map), budget=budget)
    log.info("%s on %s, from %s", runs.name, device_name(kind), data.root)
    run_rehearsal(job)
    return job
