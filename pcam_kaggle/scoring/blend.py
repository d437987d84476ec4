"""Blending: the predictions of the folds of an experiment, or of several experiments, are averaged by id and scored."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.scoring.intervals import PATCHES, Clusters, interval, paired_difference
from pcam_kaggle.scoring.metrics import Floats, Labels, auc, rank_within
from pcam_kaggle.scoring.results import BlendMetrics, Difference, OofScore

Method = Literal["mean", "rank", "climb"]
CLIMB_STEPS = 50


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

    `mean` averages probabilities, `rank` their ranks within a fold. `climb` weights the members by greedy forward selection on
    the OOF AUC (Caruana et al. 2004); it falls back to the mean unless it is significantly better on folds that its weights
    were not chosen on. Intervals and the test of the weights resample `clusters`. Raises UserError if the members differ in
    folds, patches or test ids, if one is named twice, or if `climb` has one fold only.
    """
    _check(members)
    first = members[0]
    labels, folds = first.oof["label"].to_numpy(), first.oof["fold"].to_numpy()
    values = [member.oof["probability"].to_numpy() for member in members]
    tests = [[test["probability"].to_numpy() for test in member.tests] for member in members]
    if method == "rank":
        values = [rank_within(folds, each) for each in values]
        tests = [[rank_within(np.zeros(len(each), np.int64), each) for each in per_fold] for per_fold in tests]
    oof, test = np.stack(values), np.stack([np.mean(per_fold, axis=0) for per_fold in tests])

    used, weights, gain = method, np.full(len(members), 1 / len(members)), None
    blended = weights @ oof
    if method == "climb":
        if len(np.unique(folds)) < 2:
            raise UserError("--method climb: needs at least two folds and there is one; use mean")
        crossed, gain = cross_climb(labels, folds, oof, clusters)
        used = "mean"
        if gain.low is not None and gain.low > 0:
            used, weights, blended = "climb", climb(labels, oof), crossed
    result = first.oof[["id", "label", "fold"]].assign(probability=blended)
    metrics = BlendMetrics(
        members={member.name: float(weight) for member, weight in zip(members, weights, strict=True)},
        method=used,
        asked=method,
        gain_of_weights=gain,
        scheme=first.scheme,
        folds_sha256=first.folds_sha256,
        missing_folds=first.missing,
        **dict(score(result, clusters)),
    )
    return Blend(result, pd.DataFrame({"id": first.tests[0]["id"], "probability": weights @ test}), metrics)


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


def climb(labels: Labels, values: Floats) -> Floats:
    """Return weights (members,) that sum to 1, by greedy forward selection with replacement (Caruana et al. 2004).

    Starting from the best member, each of up to 50 steps adds the member that raises the AUC of the sum most, until none does.
    `labels` are (n,), `values` (members, n).
    """
    counts = np.zeros(len(values))
    total, best = np.zeros(values.shape[1]), -np.inf
    for _ in range(CLIMB_STEPS):
        areas = [auc(labels, total + column) for column in values]
        chosen = int(np.argmax(areas))
        if areas[chosen] <= best:
            break
        best = areas[chosen]
        counts[chosen] += 1
        total = total + values[chosen]
    return counts / counts.sum()


def cross_climb(
    labels: Labels, folds: NDArray[np.int64], values: Floats, clusters: Clusters = PATCHES
) -> tuple[Floats, Difference]:
    """Return the blend (n,) whose weights for each fold come from `climb` on the other folds, and its AUC minus the mean's.

    `labels` and `folds` are (n,), `values` (members, n). The test of the difference resamples `clusters`.
    """
    blended = np.empty(len(labels))
    for fold in np.unique(folds):
        inside = folds == fold
        blended[inside] = climb(labels[~inside], values[:, ~inside]) @ values[:, inside]
    return blended, paired_difference(labels, blended, values.mean(axis=0), clusters)


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
