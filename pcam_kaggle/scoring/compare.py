"""Paired comparison of runs: differences of AUC per fold and pooled, with simultaneous intervals and p-values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.scoring.intervals import Clusters, joint_aucs, not_worse, pairs_to_test, simultaneous_differences
from pcam_kaggle.scoring.results import Difference, Family, OofScore, Unit


@dataclass(slots=True)
class ComparedRun:
    """One run of a comparison.

    `problem` is the reason why it cannot be scored, or "". `oof` (id, label, fold, probability; sorted by id) has the folds of
    the `n_splits` that it has predicted, and later those that are compared; `metrics` are their score. `config` has the fields
    of its config, none for a blend; `costs` are the training time in `minutes`, `parameters`, and training `images_per_second`.
    `unpaired_reason` is why it is not paired with the reference, or ""; `folds` and `pooled` are its differences to it.
    """

    name: str
    problem: str = ""
    metrics: OofScore | None = None
    config: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)
    scheme: str = ""
    folds_sha256: str = ""
    n_splits: int = 0
    oof: pd.DataFrame | None = None
    unpaired_reason: str = ""
    folds: list[Difference] = field(default_factory=list)
    pooled: Difference | None = None

    def predicted(self) -> set[int]:
        """Return the numbers of the folds in `oof`."""
        return set() if self.oof is None else set(self.oof["fold"])

    @property
    def is_complete(self) -> bool:
        """Whether all folds are predicted."""
        return len(self.predicted()) == self.n_splits

    def scored(self) -> tuple[pd.DataFrame, OofScore]:
        """Return `oof` and `metrics` of a run without a problem."""
        assert self.oof is not None
        assert self.metrics is not None
        return self.oof, self.metrics


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs with their differences to one of them, the `reference`: the baseline that was named, or the run of the highest AUC.

    Differences resample `unit`; `groups` (id, wsi) are the groups of that unit, None for patches. Those of `family` are tested
    together. `best` are the names of the runs that may be the best, none if a baseline was named.
    """

    runs: list[ComparedRun]
    reference: ComparedRun
    unit: Unit
    groups: pd.DataFrame | None
    family: Family
    best: list[str]

    @property
    def folds(self) -> list[int]:
        """Numbers of the folds of the reference, in which differences are taken."""
        return self.reference.scored()[1].folds


def choose_folds(runs: Sequence[ComparedRun], are_named: bool) -> set[int] | None:
    """Return the folds to compare, None for all folds of each run: of runs that are named, the folds that all of them have.

    Of other runs it is all folds if any run has them, and else the folds that most runs have. Raises UserError if named runs
    have no fold in common.
    """
    found = [run for run in runs if not run.problem]
    complete = [run.is_complete for run in found]
    if not found or (all(complete) if are_named else any(complete)):
        return None
    if are_named:
        common = set.intersection(*(run.predicted() for run in found))
        if not common:
            folds = [f"{run.name} has {', '.join(map(str, sorted(run.predicted())))}" for run in found]
            raise UserError(f"no fold is predicted in all of these runs: {examples(folds)}", folds)
        return common
    counts = pd.Series([fold for run in found for fold in run.predicted()]).value_counts()
    return set(counts.index[counts == counts.max()])


def restrict(run: ComparedRun, folds: set[int] | None) -> None:
    """Leave the predictions of `folds`, None for all folds, in `run`; one that lacks some of them gets a problem."""
    if lacking := sorted((set(range(run.n_splits)) if folds is None else folds) - run.predicted()):
        run.problem = run.problem or f"unfinished: folds {', '.join(map(str, lacking))} lack predictions"
    elif run.oof is not None and folds is not None:
        run.oof = run.oof[run.oof["fold"].isin(folds)].reset_index(drop=True)


def find_reference(runs: Sequence[ComparedRun], name: str | None) -> ComparedRun:
    """Return the run called `name`, or the one with the highest pooled AUC for None; raises UserError if it has no score."""
    if name:
        named = next(run for run in runs if run.name == name)
        if named.problem:
            raise UserError(f"--baseline {name}: {named.problem}")
        return named
    scored = [run for run in runs if not run.problem]
    if not scored:
        problems = [f"{run.name}: {run.problem}" for run in runs]
        raise UserError(f"none of {len(problems)} runs can be scored: {examples(problems)}", problems)
    return max(scored, key=_pooled_auc)


def compare(
    runs: list[ComparedRun], reference: ComparedRun, family: Family, groups: pd.DataFrame | None, unit: Unit
) -> Comparison:
    """Fill in the differences of all runs that can be scored to `reference`, or `unpaired_reason`.

    A difference is the run's AUC minus the reference's on the same patches, per fold and pooled. `groups` (id, wsi), None for
    patches, are resampled. Within a fold, and pooled, intervals and p-values hold for all differences of `family` at once.
    """
    others = [run for run in runs if run is not reference and not run.problem]
    for run in others:
        run.unpaired_reason = _unpaired_reason(run, reference)
    paired = [reference, *sorted((run for run in others if not run.unpaired_reason), key=_pooled_auc, reverse=True)]
    scores = np.stack([run.scored()[0]["probability"].to_numpy() for run in paired])
    oof, _ = reference.scored()
    labels, folds = oof["label"].to_numpy(), oof["fold"].to_numpy()
    clusters, pairs = Clusters.of(oof["id"], groups, unit), pairs_to_test(len(paired), family)
    *per_fold, pooled = [
        simultaneous_differences(joint_aucs(labels[part], scores[:, part], clusters.part(part)), pairs)
        for part in (*(folds == number for number in np.unique(folds)), np.full(len(folds), True))
    ]
    for place, run in enumerate(paired[1:]):
        run.folds, run.pooled = [differences[place] for differences in per_fold], pooled[place]
    may_be_best = not_worse(len(paired), pairs, pooled) if family == "all pairs" else []
    return Comparison(runs, reference, unit, groups, family, [paired[index].name for index in may_be_best])


def _pooled_auc(run: ComparedRun) -> float:
    return run.scored()[1].pooled.value


def _unpaired_reason(run: ComparedRun, reference: ComparedRun) -> str:
    if run.folds_sha256 != reference.folds_sha256:
        return f"not paired: folds or labels differ from those of {reference.name}"
    columns = ["id", "label", "fold"]
    if not run.scored()[0][columns].equals(reference.scored()[0][columns]):
        return f"not paired: patches differ from those of {reference.name}"
    return ""
