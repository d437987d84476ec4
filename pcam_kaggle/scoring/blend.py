"""Blending: the predictions of the folds of an experiment, or of several experiments, are averaged by id and scored."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.scoring.intervals import PATCHES, Clusters, interval
from pcam_kaggle.scoring.metrics import auc, rank_within
from pcam_kaggle.scoring.results import BlendMetrics, OofScore

Method = Literal["mean", "rank"]


@dataclass(frozen=True, slots=True)
class RunPredictions:
    """The predictions of one experiment's run on the folds of `scheme`, of which those in `missing` are left out.

    `oof` has the columns id, label, fold and probability, `tests` has a table of id and probability per fold; all are sorted
    by id. `folds_sha256` is the hash of the fold file.
    """

    name: str
    oof: pd.DataFrame
    tests: list[pd.DataFrame]
    scheme: str
    folds_sha256: str
    missing: list[int]


@dataclass(frozen=True, slots=True)
class Blend:
    """Blended predictions, `oof` (id, label, fold, probability) and `test` (id, probability), with their score."""

    oof: pd.DataFrame
    test: pd.DataFrame
    metrics: BlendMetrics


def blend(members: list[RunPredictions], method: Method, clusters: Clusters = PATCHES) -> Blend:
    """Blend `members`, runs on the same folds, patches and test ids; test predictions are means over a member's folds.

    `mean` averages probabilities, `rank` their ranks within a fold. Intervals resample `clusters`. Raises UserError if the
    members differ in folds, patches or test ids, or if one is named twice.
    """
    _check(members)
    first = members[0]
    folds = first.oof["fold"].to_numpy()
    values = [member.oof["probability"].to_numpy() for member in members]
    tests = [[test["probability"].to_numpy() for test in member.tests] for member in members]
    if method == "rank":
        values = [rank_within(folds, each) for each in values]
        tests = [[rank_within(np.zeros(len(each), np.int64), each) for each in per_fold] for per_fold in tests]
    weight, oof, test = 1 / len(members), np.mean(values, axis=0), np.mean([np.mean(each, axis=0) for each in tests], axis=0)
    result = first.oof[["id", "label", "fold"]].assign(probability=oof)
    metrics = BlendMetrics(
        members=dict.fromkeys([member.name for member in members], weight),
        method=method,
        scheme=first.scheme,
        folds_sha256=first.folds_sha256,
        missing_folds=first.missing,
        **dict(score(result, clusters)),
    )
    return Blend(result, pd.DataFrame({"id": first.tests[0]["id"], "probability": test}), metrics)


def score(oof: pd.DataFrame, clusters: Clusters = PATCHES) -> OofScore:
    """Return the score of `oof` (id, label, fold, probability): per fold, pooled, and ranked; intervals resample `clusters`."""
    folds, labels, values = (oof[column].to_numpy() for column in ("fold", "label", "probability"))
    numbers = np.unique(folds)
    per_fold = [auc(labels[folds == fold], values[folds == fold]) for fold in numbers]
    return OofScore(
        folds=numbers.tolist(),
        patches=[int((folds == fold).sum()) for fold in numbers],
        fold_auc=per_fold,
        mean=float(np.mean(per_fold)),
        sd=float(np.std(per_fold, ddof=1)) if len(per_fold) > 1 else None,
        pooled=interval(labels, values, clusters),
        ranked=interval(labels, rank_within(folds, values), clusters),
    )


def _check(members: list[RunPredictions]) -> None:
    first = members[0]
    if len({member.name for member in members}) < len(members):
        raise UserError(f"{', '.join(member.name for member in members)}: a run is named twice; name each once")
    for member in members:
        is_same = member.folds_sha256 == first.folds_sha256
        if not is_same or not member.oof[["id", "label", "fold"]].equals(first.oof[["id", "label", "fold"]]):
            raise UserError(f"{member.name} and {first.name}: trained on other folds or patches; blend runs that share them")
        if not all(test["id"].equals(first.tests[0]["id"]) for test in member.tests):
            raise UserError(f"{member.name}: its test ids are not those of {first.name}; predict both on the same data")
