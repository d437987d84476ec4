"""One row per submission: what it was, what it promised out of fold, and what Kaggle made of it."""

from pathlib import Path

import pandas as pd

from pcam_kaggle.artifacts import csv_bytes, file_sha256, read_json, sha256, write_csv, write_json
from pcam_kaggle.errors import UserError

COLUMNS = ["name", "members", "method", "oof_auc", "oof_low", "oof_high", "public_score", "private_score", "commit"]
NAME = "ledger.csv"


def write_ledger(submissions: Path) -> pd.DataFrame:
    """Write `ledger.csv` from the JSON beside each submission in folder `submissions`, and return it.

    `members` is `name:weight`, joined by spaces; scores are AUCs, empty where unknown. Raises UserError on a damaged JSON.
    """
    rows = []
    for file in sorted(submissions.glob("*.json")):
        made = read_json(file, "members", "method", "oof_auc", "public_score", "private_score", "commit")
        members = " ".join(f"{name}:{weight:.4g}" for name, weight in made["members"].items())
        oof = made["oof_auc"]
        scores = [made["public_score"], made["private_score"]]
        rows.append([file.stem, members, made["method"], oof["value"], oof["low"], oof["high"], *scores, made["commit"]])
    table = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(COLUMNS[3:8], "float64"))
    target = submissions / NAME
    if not target.exists() or file_sha256(target) != sha256(csv_bytes(table)):
        write_csv(target, table)
    return table


def record(submissions: Path, name: str, public: float | None, private: float | None) -> None:
    """Write Kaggle's scores, AUCs in [0, 1], into the JSON of submission `name`; None leaves one as it is.

    Raises UserError where there is no such submission or a score is none.
    """
    file = submissions / f"{name}.json"
    if not file.exists():
        raise UserError(f"{file}: no such submission")
    given = {"public_score": public, "private_score": private}
    scores = {key: score for key, score in given.items() if score is not None}
    for key, score in scores.items():
        if not 0 <= score <= 1:
            raise UserError(f"{key}={score}: an AUC lies in [0, 1]")
    write_json(file, read_json(file) | scores)
