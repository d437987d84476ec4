"""One row per submission: what it was, what it promised out of fold, and what Kaggle made of it."""

from pathlib import Path

import pandas as pd

from pcam_kaggle import UserError, examples
from pcam_kaggle.data.atomic_io import csv_bytes, file_sha256, read_json, reading, sha256, write_csv, write_json
from pcam_kaggle.data.layout import DEMO_SUFFIX
from pcam_kaggle.scoring.metrics import interval_text

SCORES = ["oof_auc", "oof_low", "oof_high", "public_score", "private_score"]
COLUMNS = ["name", "members", "method", *SCORES, "oof_unit", "commit"]
NAME = "ledger.csv"


def write_ledger(submissions: Path) -> pd.DataFrame:
    """Write `ledger.csv` from the JSON beside each submission in folder `submissions`, and return it.

    `members` is `name:weight`, joined by spaces; scores are AUCs, empty where unknown or undefined; `oof_unit` is what the
    interval from `oof_low` to `oof_high` resamples. Raises UserError on a damaged JSON.
    """
    rows = []
    for file in sorted(submissions.glob("*.json")):
        made = read_json(file, members=dict, method=str, oof_auc=dict)
        with reading(file):
            members = " ".join(f"{name}:{weight:.4g}" for name, weight in made["members"].items())
            numbers = [*(made["oof_auc"][key] for key in ("value", "low", "high")), made["public_score"], made["private_score"]]
            known = [None if number is None else float(number) for number in numbers]
            rows.append([file.stem, members, made["method"], *known, made["oof_auc"].get("unit", "patch"), made["commit"]])
    table = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(SCORES, "float64"))
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


def describe(submissions: Path, name: str) -> tuple[Path, str]:
    """Return the file of submission `name` and the description that goes with it to Kaggle, by which its scores are found.

    Raises UserError where there is no such submission, where it has changed since it was validated, and on the demo's.
    """
    file = submissions / f"{name}.csv"
    if not file.exists():
        others = examples([path.stem for path in sorted(submissions.glob("*.csv")) if path.name != NAME])
        raise UserError(f"{file}: no such submission; {f'there is {others}' if others else 'write it with `make submission`'}")
    made = read_json(file.with_suffix(".json"), sha256=str, oof_auc=dict)
    if name.endswith(DEMO_SUFFIX):
        raise UserError(f"{file}: is the synthetic demo's, which means nothing to Kaggle")
    if file_sha256(file) != made["sha256"]:
        raise UserError(f"{file}: has changed since it was validated; delete it and run `python -m pcam_kaggle submission`")
    with reading(file.with_suffix(".json")):
        area = made["oof_auc"]
        # Before intervals named their unit they were DeLong's.
        interval = f"{interval_text(area['low'], area['high'], area.get('undefined', ''))} (unit: {area.get('unit', 'patch')})"
        promise = f"OOF AUC {area['value']:.4f} {interval}"
        folds = ", ".join(map(str, made.get("missing_folds", [])))
    missing = f", without folds {folds}" if folds else ""
    return file, f"{name}: {promise}{missing}, {made['sha256'][:16]}"


def take_scores(submissions: Path, scored: pd.DataFrame) -> list[str]:
    """Write the scores in `scored` (description, publicScore, privateScore) into the JSON of the submissions they belong to.

    Returns the names of those that have a score.
    """
    taken = []
    for file in sorted(submissions.glob("*.json")):
        mark = read_json(file, sha256=str)["sha256"][:16]
        own = scored[scored["description"].str.endswith(mark) & scored[["publicScore", "privateScore"]].notna().any(axis=1)]
        if len(own):
            public, private = (None if pd.isna(own[key].iloc[0]) else float(own[key].iloc[0]) for key in own.columns[1:3])
            record(submissions, file.stem, public, private)
            taken.append(file.stem)
    return taken
