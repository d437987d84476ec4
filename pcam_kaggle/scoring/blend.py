"""Blending: the predictions of the folds of an experiment, or of several experiments, are averaged by id and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import Difference, Floats, Unit, auc, json_fields, rank_within
from pcam_kaggle.scoring.resampling import cluster_codes, interval, paired_test

Method = Literal["mean", "rank", "climb"]
CLIMB_STEPS = 50


@dataclass(frozen=True, slots=True)
class Member:
    """The predictions of one experiment.

    Attributes:
        name: The name of the run.
        oof: Columns id, label, fold, probability, sorted by id.
        tests: One table of id, probability per fold, sorted by id.
        folds: SHA-256 of the fold file.
        missing: The folds that are left out.
        scheme: The name of the fold file.
    """

    name: str
    oof: pd.DataFrame
    tests: list[pd.DataFrame]
    folds: str
    missing: list[int]
    scheme: str


def read_member(run: Run, chosen: Sequence[int] | None = None) -> Member:
    """Return the predictions of `run`.

    Args:
        run: An experiment's run.
        chosen: Folds to read, None for all.

    Raises:
        UserError: A fold does not exist, or has no predictions or damaged ones.
    """
    made = run.made_from()
    folds = {fold.number: fold for fold in run.folds()}
    unknown = [number for number in chosen or () if number not in folds]
    if unknown:
        raise UserError(f"--folds {unknown[0]}: {run.name} has folds 0 to {max(folds)}")
    predictions = [folds[number].predictions() for number in (folds if chosen is None else chosen)]
    table = pd.concat([oof for oof, _ in predictions])
    if table["id"].duplicated().any():
        twice = table["id"][table["id"].duplicated()].iloc[0]
        raise UserError(f"{run.folder}: id {twice} is out of fold twice; predict again")
    table = table.sort_values("id", ignore_index=True)[["id", "label", "fold", "probability"]]
    missing = [number for number in folds if chosen is not None and number not in chosen]
    return Member(run.name, table, [test for _, test in predictions], made["folds_sha256"], missing, made["folds"])


def blend(
    members: list[Member], method: Method, out: Run, slides: pd.DataFrame | None = None, unit: Unit = "slide"
) -> tuple[dict[str, Any], bool]:
    """Blend `members` and write `oof.csv`, `test.csv` and `metrics.json` to the folder `out`.

    The test prediction of a member is the mean over its folds.

    Args:
        members: Runs on the same folds, patches and test ids.
        method: `mean` averages probabilities, `rank` their ranks within a fold. `climb` weights the members by greedy forward
            selection on the OOF AUC (Caruana et al. 2004); it falls back to the mean unless it is significantly better on
            folds that its weights were not chosen on.
        out: The folder of the blended run.
        slides: The groups (id, wsi) that intervals and the test of the weights resample; patches where it is None.
        unit: What a group is called.

    Returns:
        The content of `metrics.json`, and whether any file was written.

    Raises:
        UserError: The members differ in folds, patches or test ids, `out` is another run, or `climb` has one fold only.
        ValueError: The fold scheme has groups and `slides` is None.
    """
    _check(members, out)
    base = members[0].oof
    labels, folds = base["label"].to_numpy(), base["fold"].to_numpy()
    codes = cluster_codes(base["id"], slides, members[0].scheme)
    scaled = rank_within if method == "rank" else _identity
    oof = np.stack([scaled(folds, member.oof["probability"].to_numpy()) for member in members])
    tests = np.stack([np.mean([scaled(*_one_group(test)) for test in member.tests], axis=0) for member in members])

    equal = np.full(len(members), 1 / len(members))
    weights, blended, used, gain = equal, equal @ oof, method, None
    if method == "climb":
        if len(np.unique(folds)) < 2:
            raise UserError("--method climb: needs at least two folds and there is one; use mean")
        crossed, gain = cross_climb(labels, folds, oof, codes, unit)
        # False where the interval is undefined: its ends are NaN.
        used = "climb" if gain.low > 0 else "mean"
        if used == "climb":
            weights, blended = climb(labels, oof), crossed
    result = base[["id", "label", "fold"]].assign(probability=blended)
    test = pd.DataFrame({"id": members[0].tests[0]["id"], "probability": weights @ tests})
    metrics = {
        "members": {member.name: float(weight) for member, weight in zip(members, weights, strict=True)},
        "method": used,
        "asked": method,
        "gain_of_weights": json_fields(gain) if gain else None,
        "scheme": members[0].scheme,
        "folds_sha256": members[0].folds,
        "missing_folds": members[0].missing,
        **score(result, codes, unit),
    }
    return out.write_blend(result, test, metrics)


def score(oof: pd.DataFrame, clusters: NDArray[np.int64] | None = None, unit: Unit = "slide") -> dict[str, Any]:
    """Return the OOF AUC per fold, pooled, and pooled after ranking within folds.

    Args:
        oof: Columns id, label, fold, probability.
        clusters: (n,), the cluster of each patch for bootstrap intervals; DeLong's over patches where it is None.
        unit: What a cluster is called.

    Returns:
        `folds`, `patches` and `fold_auc` by fold; `mean` and `sd` (sample SD, None for one fold) over folds; `pooled` and
        `ranked` as fields of `Estimate` with 95 % intervals.
    """
    folds, labels, values = (oof[column].to_numpy() for column in ("fold", "label", "probability"))
    per_fold = [auc(labels[folds == fold], values[folds == fold]) for fold in np.unique(folds)]
    pooled, ranked = (interval(labels, scores, clusters, unit) for scores in (values, rank_within(folds, values)))
    return {
        "folds": np.unique(folds).tolist(),
        "patches": [int((folds == fold).sum()) for fold in np.unique(folds)],
        "fold_auc": per_fold,
        "mean": float(np.mean(per_fold)),
        "sd": float(np.std(per_fold, ddof=1)) if len(per_fold) > 1 else None,
        "pooled": json_fields(pooled),
        "ranked": json_fields(ranked),
    }


def climb(labels: NDArray[np.int64], values: Floats) -> Floats:
    """Return weights (members,) that sum to 1, by greedy forward selection with replacement (Caruana et al. 2004).

    Starting from the best member, each of up to 50 steps adds the member that raises the AUC of the sum most, until none does.

    Args:
        labels: (n,), 0 or 1.
        values: (members, n).
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
    labels: NDArray[np.int64],
    folds: NDArray[np.int64],
    values: Floats,
    clusters: NDArray[np.int64] | None = None,
    unit: Unit = "slide",
) -> tuple[Floats, Difference]:
    """Return the blend (n,) whose weights for each fold come from `climb` on the other folds, and its AUC minus the mean's.

    Args:
        labels: (n,), 0 or 1.
        folds: (n,).
        values: (members, n).
        clusters: (n,), the cluster of each patch for a bootstrap test; DeLong's over patches where it is None.
        unit: What a cluster is called.
    """
    blended = np.empty(len(labels))
    for fold in np.unique(folds):
        inside = folds == fold
        blended[inside] = climb(labels[~inside], values[:, ~inside]) @ values[:, inside]
    return blended, paired_test(labels, values.mean(axis=0), clusters, unit)(blended)


def _check(members: list[Member], out: Run) -> None:
    first = members[0]
    if len({member.name for member in members}) < len(members):
        raise UserError(f"{', '.join(member.name for member in members)}: a run is named twice; name each once")
    for member in members[1:]:
        same = (member.scheme, member.folds) == (first.scheme, first.folds)
        if not same or not member.oof[["id", "label", "fold"]].equals(first.oof[["id", "label", "fold"]]):
            raise UserError(f"{member.name} and {first.name}: trained on other folds or patches; blend runs that share them")
    for member in members:
        for test in member.tests:
            if not test["id"].equals(first.tests[0]["id"]):
                raise UserError(f"{member.name}: its test ids are not those of {first.name}; predict both on the same data")
    alone = len(members) == 1 and out.name == first.name
    if not alone and out.is_experiment:
        raise UserError(f"{out.folder}: is the run of an experiment; choose another name with --name")


def _identity(groups: NDArray[np.int64], values: Floats) -> Floats:
    return values


def _one_group(test: pd.DataFrame) -> tuple[NDArray[np.int64], Floats]:
    return np.zeros(len(test), np.int64), test["probability"].to_numpy()
