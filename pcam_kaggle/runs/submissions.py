"""Submissions: the file that Kaggle takes, beside it what it was made from, the ledger of all, and Kaggle's scores."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.core.errors import UserError, examples, program
from pcam_kaggle.core.files import csv_bytes, file_sha256, locked, sha256, write_csv
from pcam_kaggle.core.paths import DEMO_SUFFIX, Workspace
from pcam_kaggle.core.records import Record
from pcam_kaggle.data.tables import read_sample
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.provenance import commit, versions
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.held_out import Ensemble, ensemble_mean
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.scoring.results import Estimate

log = logging.getLogger(__name__)

Records = dict[Path, "SubmissionRecord"]
LEDGER_FILE = "ledger.csv"
SCORES = ["oof_auc", "oof_low", "oof_high", "public_score", "private_score"]
COLUMNS = ["name", "members", "method", *SCORES, "oof_unit", "commit"]
KAGGLE_SCORES = {"public_score": "public", "private_score": "private"}


class SubmissionRecord(Record):
    """`<name>.json` beside a submission: its hash, the blended run with the weights of its members, scores, and the code.

    `oof_auc` is pooled, `oof_auc_ranked` after ranking within folds. Kaggle's scores are AUCs; None until they are known.
    """

    sha256: str
    run: str
    members: dict[str, float]
    method: str
    oof_auc: Estimate
    oof_auc_ranked: Estimate | None = None
    fold_auc: list[float] = []
    missing_folds: list[int] = []
    public_score: float | None = None
    private_score: float | None = None
    commit: str | None = None
    packages: dict[str, str | None] = {}

    @property
    def mark(self) -> str:
        """End of the submission's description on Kaggle, by which it is recognised there."""
        return self.sha256[:16]


def write_submission(run: Run, sample: Path, target: Path) -> tuple[pd.DataFrame, bool]:
    """Write the blended test predictions of `run` as the submission `target`, and its record beside it.

    Return the table (see `submission_table`), and whether it is new; raise UserError if `target` is another submission.
    """
    metrics = run.blend_metrics()
    table = submission_table(run.test(), read_sample(sample)["id"], run.folder, sample)
    digest = sha256(csv_bytes(table))
    if target.exists() and file_sha256(target) != digest:
        raise UserError(f"{target}: holds another submission, which is not replaced; use --name for a new one, or delete it")
    if target.exists() and target.with_suffix(".json").exists():
        return table, False
    made = metrics.model_dump(include={"members", "method", "fold_auc", "missing_folds"})
    made |= {"oof_auc": metrics.pooled, "oof_auc_ranked": metrics.ranked, "commit": commit(), "packages": versions()}
    SubmissionRecord(sha256=digest, run=run.name, **made).write(target.with_suffix(".json"))
    write_csv(target, table)
    return table, True


def submission_table(test: pd.DataFrame, ids: pd.Series, source: Path, sample: Path) -> pd.DataFrame:
    """Return the predictions `test` (id, probability) from `source` as id and label, in the order of the `ids` in `sample`.

    Raises:
        UserError: Ids differ, a value is not in [0, 1], or all values are the same.
    """
    values = test.set_index("id")["probability"]
    if others := sorted({*ids} ^ {*values.index}):
        shown = f"{len(others):,} are only in one of the two ({examples(others)})"
        raise UserError(f"{source}: its ids are not those of {sample}, {shown}; predict again", others)
    label = values.reindex(ids).to_numpy()
    if not ((label >= 0) & (label <= 1)).all():
        raise UserError(f"{source}: holds a value outside of [0, 1]; predict again")
    if len(label) > 1 and np.ptp(label) == 0:
        raise UserError(f"{source}: all predictions are {label[0]}; such a submission scores 0.5, so none is written")
    return pd.DataFrame({"id": ids.to_numpy(), "label": label})


def read_submissions(folder: Path) -> Records:
    """Return the record of each submission in `folder` by its CSV file; damaged ones are left out with a warning."""
    records = {}
    for file in sorted(folder.glob("*.json")):
        try:
            records[file.with_suffix(".csv")] = SubmissionRecord.read(file)
        except UserError as error:
            log.warning("left out: %s", error)
    return records


def write_ledger(folder: Path, records: Records | None = None) -> pd.DataFrame:
    """Write `ledger.csv` in the folder of submissions from their `records`, which are read if None, and return it.

    `members` is `name:weight` joined by spaces, scores are AUCs (float64, NaN if unknown or undefined), and `oof_unit` is what
    the interval from `oof_low` to `oof_high` resamples.
    """
    rows = []
    for file, made in (read_submissions(folder) if records is None else records).items():
        members = " ".join(f"{name}:{weight:.4g}" for name, weight in made.members.items())
        scores = [made.oof_auc.value, made.oof_auc.low, made.oof_auc.high, made.public_score, made.private_score]
        rows.append([file.stem, members, made.method, *scores, made.oof_auc.unit, made.commit])
    table = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(SCORES, "float64"))
    target = folder / LEDGER_FILE
    if not target.exists() or file_sha256(target) != sha256(csv_bytes(table)):
        write_csv(target, table)
    return table


def record_score(file: Path, **scores: float | None) -> SubmissionRecord:
    """Record `public_score` and `private_score` of the submission `file`, in [0, 1] or UserError; None leaves one as it is."""
    known = {key: float(score) for key, score in scores.items() if score is not None}
    for key, score in known.items():
        if not 0 <= score <= 1:
            raise UserError(f"{key}={score}: must be in [0, 1]")
    made = SubmissionRecord.read(file.with_suffix(".json")).model_copy(update=known)
    made.write(file.with_suffix(".json"))
    return made


def describe(folder: Path, name: str) -> tuple[Path, str]:
    """Return the file of submission `name` and its description on Kaggle; UserError if missing, changed or the demo's."""
    file = folder / f"{name}.csv"
    if not file.exists():
        others = examples([path.stem for path in sorted(folder.glob("*.csv")) if path.name != LEDGER_FILE])
        raise UserError(f"{file}: no such submission; {f'there is {others}' if others else 'the command pipeline writes one'}")
    made = SubmissionRecord.read(file.with_suffix(".json"))
    if name.endswith(DEMO_SUFFIX):
        raise UserError(f"{file}: is the synthetic demo's, which is meaningless to Kaggle")
    if file_sha256(file) != made.sha256:
        raise UserError(f"{file}: has changed since it was validated; delete it and run `{program()} submission`")
    missing = f", without folds {', '.join(map(str, made.missing_folds))}" if made.missing_folds else ""
    return file, f"{name}: OOF AUC {made.oof_auc.text()} (unit: {made.oof_auc.unit}){missing}, {made.mark}"


def print_scores(workspace: Workspace, scored: pd.DataFrame | None = None) -> None:
    """Print all submissions with their local scores and Kaggle's, after recording those in `scored`.

    `scored` has the columns description, public_score and private_score; the first row of a submission that has one counts.
    """
    with locked(workspace.submissions):
        records, recorded, columns = read_submissions(workspace.submissions), {}, [*KAGGLE_SCORES]
        if scored is not None:
            rated = scored[scored[columns].notna().any(axis=1)]
            for file, made in records.items():
                if len(own := rated[rated["description"].str.endswith(made.mark)]):
                    recorded[file] = record_score(file, **own.iloc[0][columns].dropna())
        table = score_table(workspace, records | recorded)
    print("no submissions yet" if table.empty else table.to_string(index=False))
    if scored is not None:
        names = ", ".join(file.stem for file in recorded) or "none"
        log.info("scores: of %s recorded in %s", names, workspace.submissions / LEDGER_FILE)


def score_table(workspace: Workspace, records: Records) -> pd.DataFrame:
    """Return a row of text per submission in `workspace`, the best private score first, then public score and OOF AUC.

    Each held-out set is a column: the AUC of the run's models there, and their number. The ledger is written, too.
    """
    ledger = write_ledger(workspace.submissions, records)
    ledger = ledger.sort_values(["private_score", "public_score", "oof_auc"], ascending=False, ignore_index=True)
    made = [records[workspace.submissions / f"{name}.csv"] for name in ledger["name"]]
    shown = pd.DataFrame({"submission": ledger["name"], "OOF AUC": [each.oof_auc.text() for each in made]})
    runs = [Run(workspace.run(name)) for name in dict.fromkeys(name for each in made for name in each.members)]
    for folder in sorted(path for path in workspace.evaluations.glob("*") if path.is_dir()):
        found = {run.name: table for run in runs if (table := Evaluation(folder).current(run)) is not None}
        shown[folder.name] = [_held_out_text(found, each) for each in made]
    for column, word in KAGGLE_SCORES.items():
        shown[word] = ["" if pd.isna(value) else f"{value:.4f}" for value in ledger[column]]
    return shown


def _held_out_text(tables: dict[str, pd.DataFrame], made: SubmissionRecord) -> str:
    members = {name: table for name, table in tables.items() if name in made.members}
    labels, mean, models = ensemble_mean(Ensemble(made.run, made.members, made.method == "rank"), members)
    return f"{auc(labels, mean):.4f} ({models} model{'s' if models > 1 else ''})" if models else ""
