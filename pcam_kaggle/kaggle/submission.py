"""The file that Kaggle takes, and beside it what it was made from."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import csv_bytes, file_sha256, sha256, write_csv, write_json
from pcam_kaggle.data.tables import read_sample
from pcam_kaggle.runs.provenance import commit, versions
from pcam_kaggle.runs.run import Run

SCORE: dict[str, type] = {
    "members": dict,
    "method": str,
    "pooled": dict,
    "ranked": dict,
    "fold_auc": list,
    "missing_folds": list,
}


def write_submission(run: Run, sample: Path, target: Path) -> tuple[pd.DataFrame, bool]:
    """Write the blended test predictions of `run` as a submission, and a JSON file with their provenance beside it.

    Args:
        run: A blended run.
        sample: The competition's sample submission.
        target: The CSV file to write.

    Returns:
        Columns id and label (a probability), with exactly the ids of `sample` in their order, and whether they are new.

    Raises:
        UserError: Ids differ, a value is not in [0, 1], all values are the same, or `target` is another submission.
    """
    test, metrics = run.test(), run.blend_metrics(**SCORE)
    table = submission(test, read_sample(sample)["id"], run.folder, sample)
    digest = sha256(csv_bytes(table))
    beside = target.with_suffix(".json")
    if target.exists() and file_sha256(target) != digest:
        raise UserError(f"{target}: holds another submission, which is not replaced; use --name for a new one, or delete it")
    if target.exists() and beside.exists():
        return table, False
    write_json(beside, {"sha256": digest, **_provenance(run.name, metrics)})
    write_csv(target, table)
    return table, True


def submission(test: pd.DataFrame, ids: pd.Series, source: Path, sample: Path) -> pd.DataFrame:
    """Return the predictions `test` in the form of a submission.

    Args:
        test: Columns id and probability.
        ids: The ids of the sample submission.
        source: Where `test` comes from, for messages.
        sample: Where `ids` come from, for messages.

    Returns:
        Columns id and label, in the order of `ids`.

    Raises:
        UserError: As `write_submission`.
    """
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


def _provenance(name: str, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": name,
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
