"""Paired comparison of runs with a baseline: differences of AUC per fold and pooled, with intervals and p-values."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.scoring.intervals import Clusters, paired_test
from pcam_kaggle.scoring.metrics import holm
from pcam_kaggle.scoring.results import BlendMetrics, Difference, Unit


@dataclass(slots=True)
class ComparedRun:
    """One run of a comparison.

    `problem` is the reason why it cannot be scored, or ""; `metrics` and `oof` (id, label, fold, probability; sorted by id) may
    then be None. `config` has the fields of its config, none for a blend; `costs` are the training time in `minutes`,
    `parameters`, and training `images_per_second`. `unpaired_reason` is why it is not paired with the baseline, or "";
    `folds` and `pooled` are its differences to the baseline.
    """

    name: str
    problem: str = ""
    metrics: BlendMetrics | None = None
    config: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, float | None] = field(default_factory=dict)
    scheme: str = ""
    oof: pd.DataFrame | None = None
    unpaired_reason: str = ""
    folds: list[Difference] = field(default_factory=list)
    pooled: Difference | None = None

    def scored(self) -> tuple[pd.DataFrame, BlendMetrics]:
        """Return `oof` and `metrics` of a run without a problem."""
        assert self.oof is not None
        assert self.metrics is not None
        return self.oof, self.metrics


@dataclass(frozen=True, slots=True)
class Comparison:
    """Runs compared with the baseline, which is one of them.

    Differences resample `unit`; `groups` (id, wsi) are the groups of that unit, None for patches.
    """

    runs: list[ComparedRun]
    baseline: ComparedRun
    unit: Unit
    groups: pd.DataFrame | None = None


def find_baseline(runs: list[ComparedRun], name: str | None) -> ComparedRun:
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
    return max(scored, key=lambda run: run.scored()[1].pooled.value)


def compare(runs: list[ComparedRun], baseline: ComparedRun, groups: pd.DataFrame | None, unit: Unit) -> Comparison:
    """Fill in the differences of all runs that can be scored to `baseline`, or `unpaired_reason`.

    A difference is the run's AUC minus the baseline's on the same patches, per fold and pooled. `groups` (id, wsi), None for
    patches, are resampled. p-values of the pooled differences are corrected for their number (Holm).
    """
    oof, _ = baseline.scored()
    others = [run for run in runs if run is not baseline and not run.problem]
    for run in others:
        run.unpaired_reason = _unpaired_reason(run, baseline)
    paired = [run for run in others if not run.unpaired_reason]
    labels, folds, theirs = (oof[column].to_numpy() for column in ("label", "fold", "probability"))
    clusters = Clusters.of(oof["id"], groups, unit)
    parts = [*(folds == number for number in np.unique(folds)), np.full(len(folds), True)]
    tests = [paired_test(labels[part], theirs[part], clusters.part(part)) for part in parts]
    for run in paired:
        ours = run.scored()[0]["probability"].to_numpy()
        *run.folds, run.pooled = [test(ours[part]) for part, test in zip(parts, tests, strict=True)]
    for run, difference in zip(paired, corrected_for_number([run.pooled for run in paired if run.pooled]), strict=True):
        run.pooled = difference
    return Comparison(runs, baseline, unit, groups)


def corrected_for_number(differences: Sequence[Difference]) -> list[Difference]:
    """Return `differences` with `corrected_p`, by Holm's correction for their number."""
    corrected = holm(np.array([np.nan if each.p is None else each.p for each in differences]))
    values = [None if np.isnan(p) else p for p in corrected.tolist()]
    return [each.model_copy(update={"corrected_p": p}) for each, p in zip(differences, values, strict=True)]


def _unpaired_reason(run: ComparedRun, baseline: ComparedRun) -> str:
    (ours, our_metrics), (theirs, their_metrics) = run.scored(), baseline.scored()
    if our_metrics.folds_sha256 != their_metrics.folds_sha256:
        return f"not paired: folds or labels differ from those of {baseline.name}"
    if not ours[["id", "label", "fold"]].equals(theirs[["id", "label", "fold"]]):
        return f"not paired: patches differ from those of {baseline.name}"
    return ""
