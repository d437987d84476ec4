"""The ledger: a row per submission with its members, its OOF AUC and Kaggle's scores."""

from pathlib import Path

import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import csv_bytes, file_sha256, read_json, reading, sha256, write_csv, write_json
from pcam_kaggle.core.paths import DEMO_SUFFIX
from pcam_kaggle.scoring.metrics import interval_text

SCORES = ["oof_auc", "oof_low", "oof_high", "public_score", "private_score"]
COLUMNS = ["name", "members", "method", *SCORES, "oof_unit", "commit"]
LEDGER_FILE = "ledger.csv"


def write_ledger(submissions: Path) -> pd.DataFrame:
    """Write `ledger.csv` from the JSON file beside each submission.

    Args:
        submissions: Folder of the submissions.

    Returns:
        Columns `COLUMNS`: `members` is `name:weight` joined by spaces, scores are AUCs (NaN if unknown or undefined), and
        `oof_unit` is the unit that the interval from `oof_low` to `oof_high` resamples.

    Raises:
        UserError: A JSON file is damaged.
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
    target = submissions / LEDGER_FILE
    if not target.exists() or file_sha256(target) != sha256(csv_bytes(table)):
        write_csv(target, table)
    return table


def record(submissions: Path, name: str, public: float | None, private: float | None) -> None:
    """Record Kaggle's scores of a submission in its JSON file.

    Args:
        submissions: Folder of the submissions.
        name: The submission's name.
        public: Its public score, an AUC in [0, 1]; None leaves it unchanged.
        private: Its private score.

    Raises:
        UserError: There is no such submission, or a score is not an AUC.
    """
    file = submissions / f"{name}.json"
    if not file.exists():
        raise UserError(f"{file}: no such submission")
    given = {"public_score": public, "private_score": private}
    scores = {key: score for key, score in given.items() if score is not None}
    for key, score in scores.items():
        if not 0 <= score <= 1:
            raise UserError(f"{key}={score}: must be in [0, 1]")
    write_json(file, read_json(file) | scores)


def describe(submissions: Path, name: str) -> tuple[Path, str]:
    """Return the file of submission `name` and its description for Kaggle, by which its scores are found later.

    Raises:
        UserError: There is no such submission, it has changed since it was validated, or it is the demo's.
    """
    file = submissions / f"{name}.csv"
    if not file.exists():
        others = examples([path.stem for path in sorted(submissions.glob("*.csv")) if path.name != LEDGER_FILE])
        raise UserError(f"{file}: no such submission; {f'there is {others}' if others else 'write it with `make submission`'}")
    made = read_json(file.with_suffix(".json"), sha256=str, oof_auc=dict)
    if name.endswith(DEMO_SUFFIX):
        raise UserError(f"{file}: is the synthetic demo's, which is meaningless to Kaggle")
    if file_sha256(file) != made["sha256"]:
        raise UserError(f"{file}: has changed since it was validated; delete it and run `python -m pcam_kaggle submission`")
    with reading(file.with_suffix(".json")):
        area = made["oof_auc"]
        # Files without a unit have DeLong's interval over patches.
        interval = f"{interval_text(area['low'], area['high'], area.get('undefined', ''))} (unit: {area.get('unit', 'patch')})"
        score = f"OOF AUC {area['value']:.4f} {interval}"
        folds = ", ".join(map(str, made.get("missing_folds", [])))
    missing = f", without folds {folds}" if folds else ""
    return file, f"{name}: {score}{missing}, {submission_mark(file)}"


def submission_mark(file: Path) -> str:
    """Return the end of the description of the submission `file` on Kaggle, by which it is recognised there."""
    return read_json(file.with_suffix(".json"), sha256=str)["sha256"][:16]


def record_scores(submissions: Path, scored: pd.DataFrame) -> list[str]:
    """Record Kaggle's scores of all submissions in their JSON files.

    Args:
        submissions: Folder of the submissions.
        scored: Columns description, public_score and private_score; a description ends with the submission's hash.

    Returns:
        The names of the submissions that have a score.
    """
    recorded, scores = [], ["public_score", "private_score"]
    for file in sorted(submissions.glob("*.json")):
        own = scored[scored["description"].str.endswith(submission_mark(file)) & scored[scores].notna().any(axis=1)]
        if len(own):
            public, private = (None if pd.isna(own[key].iloc[0]) else float(own[key].iloc[0]) for key in scores)
            record(submissions, file.stem, public, private)
            recorded.append(file.stem)
    return recorded
