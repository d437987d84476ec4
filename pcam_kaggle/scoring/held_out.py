"""Scores of runs on labelled patches that they were not trained on."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.runs.evaluation import UNCHANGED, Evaluation
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.calibration import calibration_error
from pcam_kaggle.scoring.metrics import Difference, Estimate, Floats, Unit, auc, holm, rank_within
from pcam_kaggle.scoring.resampling import cluster_codes, interval, paired_test


@dataclass(frozen=True, slots=True)
class Mixture:
    """A run as a weighted mean of experiments: of itself, or, if it is a blend, of its members.

    Attributes:
        name: The name of the run.
        weights: The weight of each experiment's run by its name.
        ranked: Whether ranks are averaged instead of probabilities.
    """

    name: str
    weights: dict[str, float]
    ranked: bool = False

    @classmethod
    def of(cls, run: Run) -> "Mixture":
        """Return what `run` is made of; raises UserError if there is no such run."""
        if run.is_experiment:
            return cls(run.name, {run.name: 1.0})
        if not run.has_score:
            raise UserError(f"{run.folder}: no such run; train it, or name an existing one")
        made = run.blend_metrics(members=dict, method=str)
        return cls(run.name, made["members"], made["method"] == "rank")

    def mean(self, values: dict[str, Floats]) -> Floats:
        """Return the weighted mean (n,) of the probabilities (n,) of each experiment."""
        if self.ranked:
            values = {name: rank_within(np.zeros(len(each), np.int64), each) for name, each in values.items()}
        return np.sum([weight * values[name] for name, weight in self.weights.items()], axis=0)


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions of an experiment's run.

    Attributes:
        tables: For `unchanged` and each perturbation: columns id, label and `fold_<k>`.
        oof: By number, the out-of-fold table (id, label, probability; sorted by id) of each fold that has one.
    """

    tables: dict[str, pd.DataFrame]
    oof: dict[int, pd.DataFrame]


@dataclass(slots=True)
class Score:
    """What a run scores on a set of labelled patches.

    Attributes:
        name: The name of the run.
        fold_auc: AUC of the net of each fold, by its number; of a blend, of the mean of its members' nets of that fold.
        mean: AUC of the mean of these nets, with its 95 % interval.
        calibration: Expected calibration error of that mean; None if it is a mean of ranks.
        oof_auc: OOF AUC of those of these folds that have predictions.
        changed: AUC of the mean of the nets under each perturbation.
        difference: AUC of the mean of the nets minus that of the baseline; None for the baseline.
        corrected_p: p of `difference`, corrected for the number of runs; None where it is undefined.
    """

    name: str
    fold_auc: dict[int, float]
    mean: Estimate
    calibration: float | None
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


def read_oof(folds: list[Fold]) -> dict[int, pd.DataFrame]:
    """Return the out-of-fold table of each of `folds` that is predicted, by number; raises UserError if one is outdated."""
    return {fold.number: fold.predictions()[0].sort_values("id") for fold in folds if fold.has_predictions}


def score_runs(
    mixtures: list[Mixture], predicted: dict[str, Predictions], baseline: str | None, slides: pd.DataFrame | None
) -> Scores:
    """Score runs on the same patches and compare them with a baseline.

    Args:
        mixtures: The runs; their experiments have the same folds.
        predicted: The predictions of each experiment.
        baseline: The name of the baseline; None for the run with the highest AUC.
        slides: A slide map (id, wsi) to resample; None to resample patches.
    """
    table = next(iter(predicted.values())).tables[UNCHANGED]
    labels = table["label"].to_numpy(int)
    unit: Unit = "patch" if slides is None else "slide"
    codes = cluster_codes(table["id"], slides, "stratified")
    scores = []
    for mixture in mixtures:
        members = {name: predicted[name] for name in mixture.weights}
        nets = {
            change: {
                fold: mixture.mean({name: each.tables[change][fold].to_numpy() for name, each in members.items()})
                for fold in changed.filter(like="fold_")
            }
            for change, changed in next(iter(members.values())).tables.items()
        }
        means = {change: np.mean([*each.values()], axis=0) for change, each in nets.items()}
        ours = means.pop(UNCHANGED)
        score = Score(
            mixture.name,
            {int(fold.removeprefix("fold_")): auc(labels, values) for fold, values in nets[UNCHANGED].items()},
            interval(labels, ours, codes, unit),
            None if mixture.ranked else calibration_error(labels, ours),
            _oof_auc(mixture, {name: each.oof for name, each in members.items()}),
            {change: auc(labels, values) for change, values in means.items()},
        )
        scores.append((score, ours))
    best = max(scores, key=lambda each: each[0].mean.value)
    base, theirs = next((each for each in scores if each[0].name == baseline), best)
    test = paired_test(labels, theirs, codes, unit)
    for score, ours in scores:
        score.difference = None if score is base else test(ours)
    others = [score for score, _ in scores if score is not base]
    corrected = holm(np.array([score.difference.p for score in others if score.difference]))
    for score, p in zip(others, corrected.tolist(), strict=True):
        score.corrected_p = None if np.isnan(p) else p
    return Scores([score for score, _ in scores], base.name, len(labels), int(labels.sum()), unit)


def recorded_auc(evaluation: Evaluation, mixture: Mixture, runs: dict[str, Run]) -> tuple[float, int]:
    """Return the AUC of the mean of the nets of `mixture` in stored predictions, and the number of nets of each member.

    It is NaN of 0 nets unless the predictions of all members are stored, by their present checkpoints of the same folds.

    Args:
        evaluation: The predictions for a set of labelled patches.
        mixture: The run.
        runs: The run of each of its members.
    """
    tables = {name: evaluation.current(run) for name, run in runs.items()}
    found = {name: table for name, table in tables.items() if table is not None}
    folds = {tuple(table.filter(like="fold_")) for table in found.values()}
    if len(found) < len(tables) or len(folds) != 1:
        return float("nan"), 0
    (nets,) = folds
    first = next(iter(found.values()))
    means = {name: table.set_index("id").loc[first["id"], list(nets)].to_numpy() for name, table in found.items()}
    values = np.mean([mixture.mean({name: each[:, net] for name, each in means.items()}) for net in range(len(nets))], axis=0)
    return auc(first["label"].to_numpy(int), values), len(nets)


def _oof_auc(mixture: Mixture, oof: dict[str, dict[int, pd.DataFrame]]) -> dict[int, float]:
    """Return the OOF AUC of each fold that all experiments of `mixture` have predicted."""
    first = next(iter(oof.values()))
    areas = {}
    for number in (number for number in first if all(number in tables for tables in oof.values())):
        values = {name: tables[number]["probability"].to_numpy() for name, tables in oof.items()}
        areas[number] = auc(first[number]["label"].to_numpy(), mixture.mean(values))
    return areas
