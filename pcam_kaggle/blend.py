"""Many predictions of a patch made one: the folds of an experiment, or several experiments, averaged by id and scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pcam_kaggle.artifacts import csv_bytes, file_sha256, read_json, sha256, write_csv, write_json
from pcam_kaggle.errors import UserError
from pcam_kaggle.folds import numbers
from pcam_kaggle.metrics import Difference, auc, auc_difference, auc_interval, rank_within
from pcam_kaggle.tables import PREDICTIONS, read_numbers

Method = Literal["mean", "rank", "climb"]
CLIMB_STEPS = 50
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Member:
    """The predictions of one experiment: `oof` has id, label, fold, probability, sorted by id; `tests` id, probability.

    `missing` are the folds that were left out.
    """

    name: str
    oof: pd.DataFrame
    tests: list[pd.DataFrame]
    folds: str
    missing: list[int]


def read_member(run: Path, chosen: Sequence[int] | None = None) -> Member:
    """Return the predictions in folder `run` of the folds in `chosen`, of all where it is None.

    Raises UserError where a fold has none or a table is damaged.
    """
    if not (run / "config.json").exists():
        raise UserError(f"{run}: no run of that name; train it, or name one that is there")
    made = read_json(run / "config.json", config=dict, folds_sha256=str)
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
        oof.append(read_numbers(folder / "oof.csv", ["label", "probability"]).assign(fold=fold))
        tests.append(read_numbers(folder / "test.csv", ["probability"]).sort_values("id", ignore_index=True))
    table = pd.concat(oof).astype({"label": np.int64})
    if table["id"].duplicated().any():
        raise UserError(f"{run}: id {table['id'][table['id'].duplicated()].iloc[0]} is out of fold twice; predict again")
    columns = ["id", "label", "fold", "probability"]
    missing = [fold for fold in every if chosen is not None and fold not in chosen]
    return Member(run.name, table.sort_values("id", ignore_index=True)[columns], tests, made["folds_sha256"], missing)


def blend(members: list[Member], method: Method, out: Path) -> tuple[dict[str, Any], bool]:
    """Blend `members` into folder `out`: `oof.csv`, `test.csv` and `metrics.json`; return these metrics and whether new.

    `mean` averages probabilities, `rank` their ranks within a fold, `climb` weights members by greedy ascent of the OOF AUC
    (Caruana et al. 2004) and is used only where, on folds that its weights did not see, it beats the mean by more than the
    noise. A member's test prediction is the mean over its folds.

    Raises UserError where members do not share folds, patches or test ids, where `out` is the run of something else, and where
    one fold is to be climbed.
    """
    _check(members, out)
    base = members[0].oof
    labels, folds = base["label"].to_numpy(), base["fold"].to_numpy()
    scaled = rank_within if method == "rank" else _unchanged
    oof = np.stack([scaled(folds, member.oof["probability"].to_numpy()) for member in members])
    tests = np.stack([np.mean([scaled(*_one_group(test)) for test in member.tests], axis=0) for member in members])

    equal = np.full(len(members), 1 / len(members))
    weights, blended, used, gain = equal, equal @ oof, method, None
    if method == "climb":
        if len(np.unique(folds)) < 2:
            raise UserError("--method climb: weights for a fold come from the others, and there is one; use mean")
        crossed, gain = cross_climb(labels, folds, oof)
        used = "climb" if gain.low > 0 else "mean"
        if used == "climb":
            weights, blended = climb(labels, oof), crossed
    result = base[["id", "label", "fold"]].assign(probability=blended)
    test = pd.DataFrame({"id": members[0].tests[0]["id"], "probability": weights @ tests})
    metrics = {
        "members": {member.name: float(weight) for member, weight in zip(members, weights, strict=True)},
        "method": used,
        "asked": method,
        "gain_of_weights": gain._asdict() if gain else None,
        "folds_sha256": members[0].folds,
        "missing_folds": members[0].missing,
        **score(result),
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


def score(oof: pd.DataFrame) -> dict[str, Any]:
    """Return the OOF AUC of a table of id, label, fold, probability: per fold, pooled, and pooled after ranking within folds.

    The SD over folds is the sample's, None of one fold; pooled values come with DeLong's 95 % interval.
    """
    folds, labels, values = (oof[column].to_numpy() for column in ("fold", "label", "probability"))
    per_fold = [auc(labels[folds == fold], values[folds == fold]) for fold in np.unique(folds)]
    return {
        "folds": np.unique(folds).tolist(),
        "patches": [int((folds == fold).sum()) for fold in np.unique(folds)],
        "fold_auc": per_fold,
        "mean": float(np.mean(per_fold)),
        "sd": float(np.std(per_fold, ddof=1)) if len(per_fold) > 1 else None,
        "pooled": auc_interval(labels, values)._asdict(),
        "ranked": auc_interval(labels, rank_within(folds, values))._asdict(),
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


def cross_climb(labels: NDArray[np.int64], folds: NDArray[np.int64], values: Floats) -> tuple[Floats, Difference]:
    """Return the blend (n,) whose weights for a fold were climbed on the others, and its AUC's gain over the plain mean."""
    blended = np.empty(len(labels))
    for fold in np.unique(folds):
        inside = folds == fold
        blended[inside] = climb(labels[~inside], values[:, ~inside]) @ values[:, inside]
    return blended, auc_difference(labels, blended, values.mean(axis=0))


def _check(members: list[Member], out: Path) -> None:
    first = members[0]
    if len({member.name for member in members}) < len(members):
        raise UserError(f"{', '.join(member.name for member in members)}: a run stands there twice; name each once")
    for member in members[1:]:
        if member.folds != first.folds or not member.oof[["id", "label", "fold"]].equals(first.oof[["id", "label", "fold"]]):
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
