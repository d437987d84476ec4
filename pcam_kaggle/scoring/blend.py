"""Many predictions of a patch made one: the folds of an experiment, or several experiments, averaged by id and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle import UserError
from pcam_kaggle.data.atomic_io import csv_bytes, file_sha256, read_json, sha256, write_csv, write_json
from pcam_kaggle.data.csv_io import PREDICTIONS, check_oof, read_numbers
from pcam_kaggle.data.folds import numbers
from pcam_kaggle.scoring.metrics import (
    Difference,
    Unit,
    auc,
    auc_interval,
    json_fields,
    paired_test,
    rank_within,
    slide_interval,
)
from pcam_kaggle.scoring.resampling import clusters

Method = Literal["mean", "rank", "climb"]
CLIMB_STEPS = 50
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Member:
    """The predictions of one experiment: `oof` has id, label, fold, probability, sorted by id; `tests` id, probability.

    `folds` is the hash of the fold file and `scheme` its name; `missing` are the folds that were left out.
    """

    name: str
    oof: pd.DataFrame
    tests: list[pd.DataFrame]
    folds: str
    missing: list[int]
    scheme: str


def read_member(run: Path, chosen: Sequence[int] | None = None) -> Member:
    """Return the predictions in folder `run` of the folds in `chosen`, of all where it is None.

    Raises UserError where a fold has none or a table is damaged.
    """
    if not (run / "config.json").exists():
        raise UserError(f"{run}: no run of that name; train it, or name one that is there")
    made = read_json(run / "config.json", config=dict, folds=str, folds_sha256=str)
    oof, tests = [], []
    every = numbers(run / "config.json", made["config"])
    unknown = [fold for fold in chosen or () if fold not in every]
    if unknown:
        raise UserError(f"--folds {unknown[0]}: {run.name} has folds 0 to {every[-1]}")
    for fold in every if chosen is None else chosen:
        folder = run / f"fold_{fold}"
        if not (folder / "predictions.json").exists():
            raise UserError(f"{folder}: no predictions; run `python -m pcam_kaggle train` and `predict` for fold {fold} first")
        predictions = read_json(folder / "predictions.json", sources=dict, files=dict)
        best = folder / "best.pt"
        if best.exists() and file_sha256(best) != predictions["sources"].get("best_sha256"):
            raise UserError(f"{folder}: trained again since it was predicted; run `python -m pcam_kaggle predict`")
        for name in PREDICTIONS:
            if not (folder / name).exists() or file_sha256(folder / name) != predictions["files"].get(name):
                raise UserError(
                    f"{folder / name}: missing or changed since it was predicted; run `python -m pcam_kaggle predict`"
                )
        table = read_numbers(folder / "oof.csv", ["label", "probability"]).assign(fold=fold)
        oof.append(check_oof(folder / "oof.csv", table))
        tests.append(read_numbers(folder / "test.csv", ["probability"]).sort_values("id", ignore_index=True))
    table = pd.concat(oof)
    if table["id"].duplicated().any():
        raise UserError(f"{run}: id {table['id'][table['id'].duplicated()].iloc[0]} is out of fold twice; predict again")
    columns = ["id", "label", "fold", "probability"]
    missing = [fold for fold in every if chosen is not None and fold not in chosen]
    table = table.sort_values("id", ignore_index=True)[columns]
    return Member(run.name, table, tests, made["folds_sha256"], missing, made["folds"])


def blend(
    members: list[Member], method: Method, out: Path, slides: pd.DataFrame | None = None, unit: Unit = "slide"
) -> tuple[dict[str, Any], bool]:
    """Blend `members` into folder `out`: `oof.csv`, `test.csv` and `metrics.json`; return these metrics and whether new.

    `mean` averages probabilities, `rank` their ranks within a fold, `climb` weights members by greedy ascent of the OOF AUC
    (Caruana et al. 2004) and is used only where, on folds that its weights did not see, it beats the mean by more than the
    noise. A member's test prediction is the mean over its folds. Intervals, and the test that decides on weights, resample the
    groups called `unit` in `slides` (id, wsi), where it is None patches; `metrics.json` names the unit of each.

    Raises UserError where members do not share folds, patches or test ids, where `out` is the run of something else, and where
    one fold is to be climbed; ValueError where the members' folds have groups and `slides` is None.
    """
    _check(members, out)
    base = members[0].oof
    labels, folds = base["label"].to_numpy(), base["fold"].to_numpy()
    groups = clusters(base["id"], slides, members[0].scheme)
    scaled = rank_within if method == "rank" else _unchanged
    oof = np.stack([scaled(folds, member.oof["probability"].to_numpy()) for member in members])
    tests = np.stack([np.mean([scaled(*_one_group(test)) for test in member.tests], axis=0) for member in members])

    equal = np.full(len(members), 1 / len(members))
    weights, blended, used, gain = equal, equal @ oof, method, None
    if method == "climb":
        if len(np.unique(folds)) < 2:
            raise UserError("--method climb: weights for a fold come from the others, and there is one; use mean")
        crossed, gain = cross_climb(labels, folds, oof, groups, unit)
        # An undefined interval is no gain: its ends are NaN.
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
        **score(result, groups, unit),
        "oof_sha256": sha256(csv_bytes(result)),
        "test_sha256": sha256(csv_bytes(test)),
    }
    file = out / "metrics.json"
    whole = all((out / name).exists() for name in ("oof.csv", "test.csv", "metrics.json"))
    same = whole and (file_sha256(out / "oof.csv"), file_sha256(out / "test.csv")) == (
        metrics["oof_sha256"],
        metrics["test_sha256"],
    )
    if same and read_json(file) == metrics:
        return metrics, False
    write_csv(out / "oof.csv", result)
    write_csv(out / "test.csv", test)
    write_json(file, metrics)
    return metrics, True


def score(oof: pd.DataFrame, groups: NDArray[np.int64] | None = None, unit: Unit = "slide") -> dict[str, Any]:
    """Return the OOF AUC of a table of id, label, fold, probability: per fold, pooled, and pooled after ranking within folds.

    The SD over folds is the sample's, None of one fold. Pooled values come with their 95 % interval: DeLong's, whose unit is
    the patch, or the bootstrap's over `groups` (n,), which are called `unit`. The ends of an undefined one are None.
    """
    folds, labels, values = (oof[column].to_numpy() for column in ("fold", "label", "probability"))
    per_fold = [auc(labels[folds == fold], values[folds == fold]) for fold in np.unique(folds)]
    pooled, ranked = (
        auc_interval(labels, scores) if groups is None else slide_interval(labels, groups, scores, unit=unit)
        for scores in (values, rank_within(folds, values))
    )
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
    """Return weights (members,), summing to one, by greedy ascent of the AUC of their mean of `values` (members, n).

    From the best member on, each of 50 steps adds, with replacement, the member that raises the AUC most; it ends where none
    does.
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
    groups: NDArray[np.int64] | None = None,
    unit: Unit = "slide",
) -> tuple[Floats, Difference]:
    """Return the blend (n,) whose weights for a fold were climbed on the others, and its AUC's gain over the plain mean.

    The gain is tested over `groups` (n,), called `unit`, or over patches where they are None.
    """
    blended = np.empty(len(labels))
    for fold in np.unique(folds):
        inside = folds == fold
        blended[inside] = climb(labels[~inside], values[:, ~inside]) @ values[:, inside]
    return blended, paired_test(labels, values.mean(axis=0), groups, unit)(blended)


def _check(members: list[Member], out: Path) -> None:
    first = members[0]
    if len({member.name for member in members}) < len(members):
        raise UserError(f"{', '.join(member.name for member in members)}: a run stands there twice; name each once")
    for member in members[1:]:
        same = (member.scheme, member.folds) == (first.scheme, first.folds)
        if not same or not member.oof[["id", "label", "fold"]].equals(first.oof[["id", "label", "fold"]]):
            raise UserError(f"{member.name} and {first.name}: trained on other folds or patches; blend runs that share them")
    for member in members:
        for test in member.tests:
            if not test["id"].equals(first.tests[0]["id"]):
                raise UserError(f"{member.name}: its test ids are not those of {first.name}; predict both on the same data")
    alone = len(members) == 1 and out.name == first.name
    if not alone and (out / "config.json").exists():
        raise UserError(f"{out}: is the run of an experiment; name the blend otherwise with --name")


def _unchanged(groups: NDArray[np.int64], values: Floats) -> Floats:
    return values


def _one_group(test: pd.DataFrame) -> tuple[NDArray[np.int64], Floats]:
    return np.zeros(len(test), np.int64), test["probability"].to_numpy()
