"""Scores of runs on labelled patches that they were not trained on."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pcam_kaggle import UserError
from pcam_kaggle.runs.evaluation import UNCHANGED
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.calibration import calibration_error
from pcam_kaggle.scoring.metrics import Difference, Estimate, Unit, auc, holm, rank_within
from pcam_kaggle.scoring.resampling import cluster_codes, interval, paired_test

# Predictions by perturbation: columns id, label, fold_<k>.
Tables = dict[str, pd.DataFrame]


@dataclass(slots=True)
class Score:
    """What a run, or a blend of runs, scores on a set of labelled patches.

    Attributes:
        name: The name of the run.
        fold_auc: AUC of the net of each fold, by its number; of a blend, of its members' nets of that fold.
        mean: AUC of the mean of these nets, with its 95 % interval.
        calibration: Expected calibration error of that mean.
        oof_auc: OOF AUC of the same folds, of those that have predictions.
        changed: AUC of the mean of the nets under each perturbation.
        difference: AUC of the mean of the nets minus that of the baseline; None for the baseline.
        corrected_p: p of `difference`, corrected for the number of runs; None where it is undefined.
    """

    name: str
    fold_auc: dict[int, float]
    mean: Estimate
    calibration: float
    oof_auc: dict[int, float]
    changed: dict[str, float] = field(default_factory=dict)
    difference: Difference | None = None
    corrected_p: float | None = None

    @property
    def single(self) -> float:
        """Mean AUC of the single nets."""
        return float(np.mean([*self.fold_auc.values()]))

    @property
    def fall(self) -> float | None:
        """Mean OOF AUC minus the mean AUC here, over the folds that have both; None if there are none."""
        falls = [area - self.fold_auc[number] for number, area in self.oof_auc.items()]
        return float(np.mean(falls)) if falls else None


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of several runs on the same patches.

    Attributes:
        scores: The runs, in the order in which they were named.
        baseline: The name of the run that the others are compared with.
        patches: Number of patches.
        positives: Number of those with tumour.
        unit: What intervals and tests resample.
    """

    scores: list[Score]
    baseline: str
    patches: int
    positives: int
    unit: Unit


def blended(run: Run, tables: dict[str, Tables]) -> Tables:
    """Return the predictions of the blend `run`: fold by fold, those of its members with its weights.

    Args:
        run: A blend.
        tables: Predictions of each of its members.

    Raises:
        UserError: The members have no fold in common.
    """
    made = run.blend_metrics(members=dict, method=str)
    members = {name: tables[name] for name in made["members"]}
    first = next(iter(members.values()))[UNCHANGED]
    folds = [column for column in first if all(column in each[UNCHANGED] for each in members.values())][2:]
    if not folds:
        raise UserError(f"{run.folder}: its members have no trained fold in common")
    ranked = made["method"] == "rank"
    result = {}
    for change in next(iter(members.values())):
        result[change] = first[["id", "label"]].copy()
        for fold in folds:
            columns = {name: each[change][fold].to_numpy() for name, each in members.items()}
            if ranked:
                columns = {name: rank_within(np.zeros(len(values), int), values) for name, values in columns.items()}
            result[change][fold] = sum(made["members"][name] * values for name, values in columns.items())
    return result


def score_runs(runs: list[Run], tables: dict[str, Tables], baseline: str | None, slides: pd.DataFrame | None) -> Scores:
    """Score runs on the same patches and compare them with a baseline.

    Args:
        runs: The runs.
        tables: Predictions of each run by its name.
        baseline: The name of the baseline; None for the run with the highest AUC.
        slides: A slide map (id, wsi) to resample; None to resample patches.
    """
    table = tables[runs[0].name][UNCHANGED]
    labels = table["label"].to_numpy(int)
    unit: Unit = "patch" if slides is None else "slide"
    codes = cluster_codes(table["id"], slides, "stratified")
    scores = []
    for run in runs:
        nets = {change: each.filter(like="fold_") for change, each in tables[run.name].items()}
        means = {change: each.mean(axis=1).to_numpy() for change, each in nets.items()}
        unchanged = means.pop(UNCHANGED)
        folds = {int(str(name).removeprefix("fold_")): values for name, values in nets[UNCHANGED].items()}
        score = Score(
            run.name,
            {number: auc(labels, values.to_numpy()) for number, values in folds.items()},
            interval(labels, unchanged, codes, unit),
            calibration_error(labels, unchanged),
            {number: area for number, area in oof_aucs(run).items() if number in folds},
            {change: auc(labels, values) for change, values in means.items()},
        )
        scores.append((score, unchanged))
    base, theirs = next((each for each in scores if each[0].name == baseline), max(scores, key=lambda each: each[0].mean.value))
    test = paired_test(labels, theirs, codes, unit)
    others = [(score, ours) for score, ours in scores if score is not base]
    for score, ours in others:
        score.difference = test(ours)
    corrected = holm(np.array([score.difference.p for score, _ in others if score.difference]))
    for (score, _), p in zip(others, corrected.tolist(), strict=True):
        score.corrected_p = None if np.isnan(p) else p
    return Scores([score for score, _ in scores], base.name, len(labels), int(labels.sum()), unit)


def oof_aucs(run: Run) -> dict[int, float]:
    """Return the OOF AUC of each fold of `run`, an experiment's or a blend, that has predictions."""
    if run.is_experiment:
        parts = [fold.predictions()[0] for fold in run.folds() if fold.has_predictions]
    else:
        parts = [part for _, part in run.oof().groupby("fold")]
    return {int(part["fold"].iloc[0]): auc(part["label"].to_numpy(), part["probability"].to_numpy()) for part in parts}
