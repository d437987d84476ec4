"""The file that Kaggle takes, and beside it what it was made of."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle import UserError, examples
from pcam_kaggle.data.atomic_io import csv_bytes, file_sha256, read_json, sha256, write_csv, write_json
from pcam_kaggle.data.csv_io import read_numbers, read_sample
from pcam_kaggle.runs.provenance import commit, versions

PROVENANCE: dict[str, type] = {
    "members": dict,
    "method": str,
    "pooled": dict,
    "ranked": dict,
    "fold_auc": list,
    "missing_folds": list,
}


def submit(run: Path, sample: Path, target: Path) -> tuple[pd.DataFrame, bool]:
    """Write the blend in folder `run` as the submission `target` and a JSON beside it; return it and whether it is new.

    Columns id and label, a probability; exactly the ids of `sample` in its order. Raises UserError where ids differ, where a
    value is not in [0, 1] or all are the same, and where `target` holds another submission.
    """
    metrics = read_json(run / "metrics.json", **PROVENANCE, test_sha256=str)
    if file_sha256(run / "test.csv") != metrics["test_sha256"]:
        raise UserError(f"{run / 'test.csv'}: has changed since it was blended; run `python -m pcam_kaggle blend`")
    table = submission(read_numbers(run / "test.csv", ["probability"]), read_sample(sample)["id"], run / "test.csv", sample)
    digest = sha256(csv_bytes(table))
    beside = target.with_suffix(".json")
    if target.exists() and file_sha256(target) != digest:
        raise UserError(f"{target}: holds another submission, which is kept; use --name for a new one, or delete it")
    if target.exists() and beside.exists():
        return table, False
    write_json(beside, {"sha256": digest, **_provenance(run, metrics)})
    write_csv(target, table)
    return table, True


def submission(test: pd.DataFrame, ids: pd.Series, source: Path, sample: Path) -> pd.DataFrame:
    """Return `test` (id, probability) as id, label in the order of `ids`; raises UserError as `submit` does."""
    values = test.set_index("id")["probability"]
    missing, extra = ids[~ids.isin(values.index)], values.index[~values.index.isin(ids)]
    if len(missing):
        raise UserError(
            f"{sample}: {len(missing):,} of {len(ids):,} ids have no prediction in {source} ({examples(missing)}); "
            "predict again",
            list(missing),
        )
    if len(extra):
        raise UserError(
            f"{source}: {len(extra):,} of {len(values):,} ids are not in {sample} ({examples(extra)}); predict again",
            list(extra),
        )
    table = pd.DataFrame({"id": ids.to_numpy(), "label": values.reindex(ids).to_numpy()})
    label = table["label"].to_numpy()
    if not (np.isfinite(label) & (label >= 0) & (label <= 1)).all():
        raise UserError(f"{source}: holds a value outside of [0, 1]; predict again")
    if len(table) > 1 and np.ptp(label) == 0:
        raise UserError(f"{source}: all predictions are {label[0]}; such a submission scores 0.5, so none is written")
    return table


def _provenance(run: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": run.name,
        "members": metrics["members"],
        "method": metrics["method"],
        "oof_auc": metrics["pooled"],
        "oof_auc_ranked": metrics["ranked"],
        "fold_auc": metrics["fold_auc"],
        "missing_folds": metrics["missing_folds"],
        "public_score": None,
        "private_score": None,
        "commit": commit(),
        "packages": versions(),
    }
