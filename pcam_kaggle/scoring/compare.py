"""Paired comparison of runs: differences of AUC per fold and pooled, with simultaneous intervals and p-values."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.scoring.intervals import Clusters, compare_aucs, joint_aucs
from pcam_kaggle.scoring.results import Difference, Family, OofScore, Unit


@dataclass(slots=True)
class ComparedRun:
    """One run of a comparison.

    `problem` is the reason why it cannot be scored, or "". Of its `n_splits` folds it has `predicted` some; `oof` (id, label,
    fold, probability; sorted by id) has those that are compared, and `metrics` are their score. `config` has the fields of its
    config, none for a blend; `costs` are the training time in `minutes`, `parameters`, and training `images_per_second`.
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
    predicted: list[int] = field(default_factory=list)
    oof: pd.DataFrame | None = None
    unpaired_reason: str = ""
    folds: list[Difference] = field(default_factory=list)
    pooled: Difference | None = None

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


def choose_folds(runs: Sequence[ComparedRun], are_named: bool) -> list[int]:
    """Return the folds on which to compare `runs`, of one fold file: of runs that are named, those that all of them have.

    Of other runs it is all folds if any run has them. Else it is the fold that most runs have, and what these have in common
    beside it. Raises UserError if named runs have no fold in common.
    """
    found = [run for run in runs if run.predicted]
    if are_named or not found:
        return common_folds({run.name: run.predicted for run in found})
    if complete := [run for run in found if len(run.predicted) == run.n_splits]:
        return complete[0].predicted
    most_frequent = pd.Series([fold for run in found for fold in run.predicted]).mode()[0]
    return common_folds({run.name: run.predicted for run in found if most_frequent in run.predicted})


def common_folds(predicted: Mapping[str, Sequence[int]]) -> list[int]:
    """Return the folds that all runs have `predicted`, sorted; raises UserError if there are runs, but no such fold."""
    common = set.intersection(*map(set, predicted.values())) if predicted else set()
    if predicted and not common:
        folds = [f"{name} has {', '.join(map(str, numbers))}" for name, numbers in predicted.items()]
        raise UserError(f"no fold is predicted in all of these runs: {examples(folds)}", folds)
    return sorted(common)


def lacks(run: ComparedRun, folds: Sequence[int]) -> str:
    """Return which of `folds` the run lacks, as its problem, or ""."""
    if any(fold >= run.n_splits for fold in folds):
        return f"has folds 0 to {run.n_splits - 1}"
    lacking = [str(fold) for fold in folds if fold not in run.predicted]
    return f"unfinished: folds {', '.join(lacking)} lack predictions (--folds chooses others)" if lacking else ""


def find_reference(runs: Sequence[ComparedRun], name: str | None) -> ComparedRun:
    """Return the run called `name`, for None that of the highest pooled AUC on the folds that most runs were drawn on.

    Raises UserError if it has no score.
    """
    if name:
        named = next(run for run in runs if run.name == name)
        if named.problem:
            raise UserError(f"--baseline {name}: {named.problem}")
        return named
    scored = [run for run in runs if not run.problem]
    if not scored:
        problems = [f"{run.name}: {run.problem}" for run in runs]
        raise UserError(f"none of {len(problems)} runs can be scored: {examples(problems)}", problems)
    on_same_folds = Counter(run.folds_sha256 for run in scored)
    return max(scored, key=lambda run: (on_same_folds[run.folds_sha256], _pooled_auc(run)))


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
    clusters, parts = Clusters.of(oof["id"], groups, unit), [folds == number for number in np.unique(folds)]
    compared = [
        compare_aucs(joint_aucs(labels[part], scores[:, part], clusters.part(part)), family)
        for part in (*parts, np.full(len(folds), True))
    ]
    for place, run in enumerate(paired[1:]):
        *run.folds, run.pooled = [differences[place] for differences, _ in compared]
    return Comparison(runs, reference, unit, groups, family, [paired[index].name for index in compared[-1][1]])


def _pooled_auc(run: ComparedRun) -> float:
    return run.scored()[1].pooled.value


def _unpaired_reason(run: ComparedRun, reference: ComparedRun) -> str:
    if run.folds_sha256 != reference.folds_sha256:
        return f"not paired: folds or labels differ from those of {reference.name}"
    columns = ["id", "label", "fold"]
    if not run.scored()[0][columns].equals(reference.scored()[0][columns]):
        return f"not paired: patches differ from those of {reference.name}"
    return ""
