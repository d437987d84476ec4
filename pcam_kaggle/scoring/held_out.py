"""Scores of runs on a held-out set: labelled patches that they were not trained on."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from pydantic import computed_field

from pcam_kaggle.core.records import Record
from pcam_kaggle.scoring.intervals import Clusters, compare_aucs, family_of, interval, joint_aucs
from pcam_kaggle.scoring.metrics import Floats, Labels, auc, calibration_error, rank_within
from pcam_kaggle.scoring.results import Difference, Estimate, Family, Unit


@dataclass(frozen=True, slots=True)
class Ensemble:
    """A run as a weighted mean of experiments' runs: of itself, or, if it is a blend, of its members.

    `weights` are by the name of the run; if `ranked`, ranks are averaged instead of probabilities.
    """

    name: str
    weights: dict[str, float]
    ranked: bool = False

    def mean(self, values: dict[str, Floats]) -> Floats:
        """Return the weighted mean (n,) of the probabilities (n,) of each experiment."""
        if self.ranked:
            values = {name: rank_within(np.zeros(len(each), np.int64), each) for name, each in values.items()}
        return np.sum([weight * values[name] for name, weight in self.weights.items()], axis=0)

    def models(self, tables: dict[str, pd.DataFrame]) -> dict[str, Floats]:
        """Return the mean (n,) of each column `fold_<k>` of the tables of all experiments, which have the same rows."""
        folds = next(iter(tables.values())).filter(like="fold_")
        return {fold: self.mean({run: tables[run][fold].to_numpy() for run in self.weights}) for fold in folds}


class RunScore(Record):
    """What a run scores on a held-out set; of a blend, a model of a fold is the mean of its members' models of that fold.

    `fold_auc` is that of the model of each fold by its number, `oof_auc` the OOF AUC of those of these folds that have
    predictions. `mean` is the AUC of the mean of the models, `calibration_error` its expected calibration error, None for a
    mean of ranks, and `difference` its AUC minus the baseline's, None for the baseline.
    """

    run: str
    fold_auc: dict[int, float]
    mean: Estimate
    oof_auc: dict[int, float] = {}
    calibration_error: float | None = None
    difference: Difference | None = None

    @computed_field  # type: ignore[prop-decorator]
    @property
    def single(self) -> float:
        """Mean AUC of the single models."""
        return float(np.mean([*self.fold_auc.values()]))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def drop(self) -> float | None:
        """Mean OOF AUC minus the mean AUC here, over the folds that have both; None if there are none."""
        drops = [area - self.fold_auc[number] for number, area in self.oof_auc.items()]
        return float(np.mean(drops)) if drops else None


class EvaluationResult(Record):
    """The scores of several runs on a held-out set called `name`, `result.json` of an evaluation.

    `patches_sha256` is the hash of the set's ids, labels and pixels. Differences are to `baseline`, which was named, or has the
    highest AUC; those of `family` are tested together. `best` are the runs that may be the best if no baseline was named.
    """

    name: str
    patches_sha256: str
    patches: int
    positives: int
    unit: Unit
    baseline: str
    family: Family = "holm"
    best: list[str] = []
    runs: list[RunScore]


def score_runs(
    name: str,
    patches_sha256: str,
    ensembles: list[Ensemble],
    tables: dict[str, pd.DataFrame],
    oof: dict[str, dict[int, pd.DataFrame]],
    baseline: str | None,
    slides: pd.DataFrame | None,
) -> EvaluationResult:
    """Score `ensembles` on the held-out set called `name`, and compare them with a baseline.

    `tables` has the predictions of each experiment: id, label, and `fold_<k>`, the probability by the model of each fold, the
    same for all. `oof` has, by fold, the out-of-fold tables (id, label, probability; sorted by id) that there are. The baseline
    is the run with the highest AUC if None is named. The slides of `slides` (id, wsi) are resampled, patches if it is None.
    """
    first = next(iter(tables.values()))
    labels = first["label"].to_numpy(int)
    clusters = Clusters.of(first["id"], slides, "patch" if slides is None else "slide")
    models = {ensemble.name: ensemble.models(tables) for ensemble in ensembles}
    means = {run: np.mean([*folds.values()], axis=0) for run, folds in models.items()}
    estimates = {run: interval(labels, mean, clusters) for run, mean in means.items()}
    best_first = sorted(means, key=lambda run: estimates[run].value, reverse=True)
    base, family = baseline or best_first[0], family_of(baseline)
    compared = [base, *(run for run in best_first if run != base)]
    tested, may_be_best = compare_aucs(joint_aucs(labels, np.stack([means[run] for run in compared]), clusters), family)
    differences = dict(zip(compared[1:], tested, strict=True))
    runs = [
        RunScore(
            run=ensemble.name,
            fold_auc={int(fold.removeprefix("fold_")): auc(labels, values) for fold, values in models[ensemble.name].items()},
            mean=estimates[ensemble.name],
            oof_auc=_oof_auc(ensemble, {run: oof[run] for run in ensemble.weights}),
            calibration_error=None if ensemble.ranked else calibration_error(labels, means[ensemble.name]),
            difference=differences.get(ensemble.name),
        )
        for ensemble in ensembles
    ]
    return EvaluationResult(
        name=name,
        patches_sha256=patches_sha256,
        patches=len(labels),
        positives=int(labels.sum()),
        unit=clusters.unit,
        baseline=base,
        family=family,
        best=[compared[index] for index in may_be_best],
        runs=runs,
    )


def ensemble_mean(ensemble: Ensemble, tables: dict[str, pd.DataFrame]) -> tuple[Labels, Floats, int]:
    """Return labels and mean of the models of `ensemble`, both (n,), and their number, from tables of id, label, `fold_<k>`.

    Both arrays are empty, of 0 models, unless all members have a table, of the same folds.
    """
    folds = {tuple(table.filter(like="fold_")) for table in tables.values()}
    if tables.keys() < ensemble.weights.keys() or len(folds) != 1:
        return np.empty(0, int), np.empty(0), 0
    first = next(iter(tables.values()))
    models = ensemble.models({run: table.set_index("id").loc[first["id"]] for run, table in tables.items()})
    return first["label"].to_numpy(int), np.mean([*models.values()], axis=0), len(models)


def _oof_auc(ensemble: Ensemble, oof: dict[str, dict[int, pd.DataFrame]]) -> dict[int, float]:
    """Return the OOF AUC of each fold that all experiments of `ensemble` have predicted."""
    first = next(iter(oof.values()))
    areas = {}
    for number in [number for number in first if all(number in tables for tables in oof.values())]:
        mean = ensemble.mean({run: tables[number]["probability"].to_numpy() for run, tables in oof.items()})
        areas[number] = auc(first[number]["label"].to_numpy(), mean)
    return areas
