"""The leaderboard of the user's own submissions: local scores beside Kaggle's, and how well they agree."""

import logging

import pandas as pd
from scipy import stats

from pcam_kaggle.core.files import locked
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.kaggle.ledger import LEDGER_FILE, record_scores, write_ledger
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.held_out import Mixture, recorded_auc
from pcam_kaggle.scoring.metrics import interval_text

log = logging.getLogger(__name__)

# With fewer submissions a correlation says nothing.
MIN_RANKED_SUBMISSIONS = 4
KAGGLE_SCORES = {"public_score": "public", "private_score": "private"}


def print_leaderboard(workspace: Workspace, scored: pd.DataFrame) -> None:
    """Record Kaggle's scores in `scored` (see `record_scores`), and print all submissions with them."""
    with locked(workspace.submissions):
        recorded = record_scores(workspace.submissions, scored)
        table = leaderboard(workspace)
    print(render_leaderboard(table))
    log.info("leaderboard: scores of %s recorded in %s", ", ".join(recorded) or "none", workspace.submissions / LEDGER_FILE)


def leaderboard(workspace: Workspace) -> pd.DataFrame:
    """Return one row per submission in `workspace`, the best private score first, then public score and OOF AUC.

    Returns:
        Columns `name`; `oof_auc` with `oof_low`, `oof_high` and `oof_unit`; `<set>` for each set of other labelled patches, the
        AUC of the run's nets there, and `<set>_nets`, their number; `public_score`, `private_score`. AUCs are float64 and NaN
        where unknown. `write_ledger` updates `ledger.csv` from the same files.
    """
    table = write_ledger(workspace.submissions)
    sets = sorted(path for path in workspace.evaluations.glob("*") if path.is_dir())
    for folder in sets:
        found = [
            _other_auc(workspace, Evaluation(folder), row.name, row.members, row.method)
            for row in table.itertuples(index=False)
        ]
        table[folder.name] = pd.Series([area for area, _ in found], dtype="float64")
        table[f"{folder.name}_nets"] = [nets for _, nets in found]
    columns = ["name", "oof_auc", "oof_low", "oof_high", "oof_unit"]
    columns += [column for folder in sets for column in (folder.name, f"{folder.name}_nets")]
    order = ["private_score", "public_score", "oof_auc"]
    return table[[*columns, *KAGGLE_SCORES]].sort_values(order, ascending=False, ignore_index=True)


def render_leaderboard(table: pd.DataFrame) -> str:
    """Return `table` as text, and below it the correlation of each local score with each of Kaggle's."""
    if table.empty:
        return "no submissions yet"
    sets = [name.removesuffix("_nets") for name in table.columns if name.endswith("_nets")]
    shown = pd.DataFrame({"submission": table["name"]})
    shown["OOF AUC"] = [
        f"{row.oof_auc:.4f} {interval_text(row.oof_low, row.oof_high, '')}" if pd.notna(row.oof_low) else _score(row.oof_auc)
        for row in table.itertuples(index=False)
    ]
    for name in sets:
        nets = table[f"{name}_nets"]
        counts = [f" ({count} net{'s' if count > 1 else ''})" if count else "" for count in nets]
        shown[name] = [f"{_score(area)}{count}" for area, count in zip(table[name], counts, strict=True)]
    for column, word in KAGGLE_SCORES.items():
        shown[word] = table[column].map(_score)
    return "\n".join([shown.to_string(index=False), *correlations(table, ["oof_auc", *sets])])


def correlations(table: pd.DataFrame, local: list[str]) -> list[str]:
    """Return a sentence on the correlation of each of the columns `local` with each of Kaggle's scores, from four rows on."""
    sentences = []
    for column in local:
        name = "OOF AUC" if column == "oof_auc" else f"AUC on {column}"
        for score, word in KAGGLE_SCORES.items():
            known = table.dropna(subset=[column, score])
            if len(known) < MIN_RANKED_SUBMISSIONS:
                continue
            ranked = rank_correlation(known[column], known[score])
            sentences.append(f"{name} and {word} score of {len(known)} submissions: Spearman's rank correlation {ranked}")
    return sentences


def rank_correlation(first: pd.Series, second: pd.Series) -> str:
    """Return Spearman's rank correlation of two series of the same length as text."""
    if min(first.nunique(), second.nunique()) < 2:
        return "n/a (all scores equal)"
    return f"{stats.spearmanr(first, second).statistic:.2f}"


def _other_auc(workspace: Workspace, evaluation: Evaluation, name: str, members: str, method: str) -> tuple[float, int]:
    weights = {member: float(weight) for member, _, weight in (each.rpartition(":") for each in members.split())}
    runs = {member: Run(workspace.run(member)) for member in weights}
    return recorded_auc(evaluation, Mixture(name, weights, method == "rank"), runs)


def _score(value: float) -> str:
    return "" if pd.isna(value) else f"{value:.4f}"
