"""A comparison as one self-contained HTML file: conclusions, table, figures, and the largest errors of the baseline."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import write
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.folds import read_groups
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report import curves, figures
from pcam_kaggle.report.gallery import LABELLED_SIDE
from pcam_kaggle.report.mistakes import Mistake, most_wrong
from pcam_kaggle.report.svg import Plot
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import LEDGER_FILE
from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.intervals import unit_of
from pcam_kaggle.scoring.tables import caption, conclusions, display_table, evaluation_caption, evaluation_table

TEMPLATE = Path(__file__).with_name("page.html")
SCORES = ["public_score", "private_score"]
FOLD_RANGE = "Line: mean over folds. Band: range over folds."


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the report: its title, the names of its columns, and its cells by row, all as text."""

    title: str
    columns: list[str]
    cells: list[list[str]]


@dataclass(slots=True)
class Section:
    """A section of the report; `text` describes its content, or gives the reason why there is none."""

    anchor: str
    title: str
    text: str
    plots: list[Plot] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def write_report(comparison: Comparison, workspace: Workspace, target: Path) -> None:
    """Write `comparison` to the HTML file `target`, atomically and without references to other files.

    A section whose input is missing (patch store, checkpoints, slides, Kaggle scores) gives the reason instead.
    """
    baseline, shown = comparison.baseline, display_table(comparison)
    assert baseline.oof is not None
    by_name = {entry.name: entry for entry in comparison.runs}
    entries = [by_name[name] for name in shown["run"]]
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    patches = f"{len(baseline.oof):,} patches, {baseline.oof['label'].mean():.1%} with tumour"
    text = page.render(
        heading=f"Run {baseline.name}" if len(entries) == 1 else f"Runs compared with {baseline.name}",
        baseline=baseline.name,
        about=f"{patches}, in {baseline.oof['fold'].nunique()} folds",
        caption=caption(comparison),
        sentences=conclusions(comparison),
        columns=shown.columns[:-1].tolist(),
        cells=shown.to_numpy().tolist(),
        sections=[
            _roc(entries, baseline),
            _precision_recall(entries, baseline),
            _learning(entries, workspace),
            _histograms(entries),
            _reliability(entries),
            _slide_aucs(entries, comparison, workspace),
            _evaluations(workspace),
            _mistakes(baseline, workspace),
            _correlation(entries, baseline),
            _leaderboard(workspace),
        ],
    )
    write(target, lambda file: file.write(text.encode()))


def _scored(entries: list[ComparedRun]) -> list[tuple[ComparedRun, pd.DataFrame]]:
    """Return the entries that can be scored, with their OOF tables."""
    return [(entry, entry.oof) for entry in entries if entry.oof is not None and not entry.problem]


def _reference(entry: ComparedRun, baseline: ComparedRun) -> curves.Reference | None:
    """Return the baseline as a reference curve for `entry`, or None where the two are not paired."""
    assert baseline.oof is not None
    return curves.Reference(baseline.name, baseline.oof) if entry.pooled else None


def _roc(entries: list[ComparedRun], baseline: ComparedRun) -> Section:
    plots = [curves.roc(entry.name, oof, _reference(entry, baseline)) for entry, oof in _scored(entries)]
    return Section("roc", "ROC curves", FOLD_RANGE, plots)


def _precision_recall(entries: list[ComparedRun], baseline: ComparedRun) -> Section:
    plots = [curves.precision_recall(entry.name, oof, _reference(entry, baseline)) for entry, oof in _scored(entries)]
    return Section("precision-recall", "Precision-recall curves", FOLD_RANGE, plots)


def _learning(entries: list[ComparedRun], workspace: Workspace) -> Section:
    section = Section("learning", "Learning curves", "Per epoch, from each fold's log.")
    for entry in entries:
        logs = Run(workspace.run(entry.name)).logs()
        if logs:
            section.plots.append(curves.learning(entry.name, logs))
    if not section.plots:
        section.text = "None of these runs has a log: blends and probes have no epochs."
    return section


def _histograms(entries: list[ComparedRun]) -> Section:
    plots = [figures.histogram(entry.name, oof) for entry, oof in _scored(entries)]
    return Section("histogram", "OOF probabilities by label", "Errors are where the two distributions overlap.", plots)


def _reliability(entries: list[ComparedRun]) -> Section:
    text = "The points of a calibrated model are on the diagonal. Calibration affects thresholds, not the AUC."
    plots = [figures.reliability(entry.name, oof) for entry, oof in _scored(entries)]
    return Section("reliability", "Calibration", text, plots)


def _slide_aucs(entries: list[ComparedRun], comparison: Comparison, workspace: Workspace) -> Section:
    text = "Out of fold, within each slide or stain group that has patches of both labels."
    section = Section("slides", "AUC by slide", text)
    for entry, oof in _scored(entries):
        if entry.unpaired_reason:
            slides, unit = read_groups(workspace.folds / f"{entry.scheme}.csv"), unit_of(entry.scheme)
        else:
            slides, unit = comparison.groups, comparison.unit
        plot = None if slides is None else figures.slide_aucs(entry.name, oof, slides, unit)
        section.plots += [plot] if plot else []
    if not section.plots:
        section.text = "Not available: the fold files of these runs have no slides with patches of both labels."
    return section


def _evaluations(workspace: Workspace) -> Section:
    section = Section("evaluations", "Other labelled patches", "")
    captions = []
    for folder in sorted(workspace.evaluations.glob("*/")):
        try:
            result = Evaluation(folder).result()
        except UserError as error:
            captions.append(f"Left out: {' '.join(str(error).split())[:300]}.")
            continue
        captions.append(f"{folder.name}: {evaluation_caption(result)}")
        table = evaluation_table(result)
        section.tables.append(Table(f"Scores on {folder.name}", table.columns.tolist(), table.to_numpy().tolist()))
    section.text = (
        " ".join(captions)
        or "Not available: no run was evaluated on other labelled patches (`python -m pcam_kaggle evaluate`)."
    )
    return section


def _correlation(entries: list[ComparedRun], baseline: ComparedRun) -> Section:
    section = Section("correlation", "Correlation between runs", "A blend gains most from runs that are accurate and differ.")
    paired = [entry for entry in entries if entry is baseline or entry.pooled]
    if len(paired) < 2:
        section.text = "Not available: needs two runs that are scored on the same patches and folds."
        return section
    probabilities = np.stack([entry.oof["probability"].to_numpy() for entry in paired if entry.oof is not None])
    section.plots.append(figures.correlation([entry.name for entry in paired], probabilities))
    return section


def _leaderboard(workspace: Workspace) -> Section:
    section = Section("leaderboard", "CV versus LB", "Does a better OOF AUC mean a better score on Kaggle?")
    file = workspace.submissions / LEDGER_FILE
    try:
        ledger = pd.read_csv(file, dtype={"name": str}).astype(dict.fromkeys(["oof_auc", *SCORES], float))
        if ledger[SCORES].notna().any(axis=None):
            section.plots.append(figures.cv_versus_lb(ledger))
        else:
            section.text = "Not available: no Kaggle scores are recorded."
    except FileNotFoundError:
        section.text = "Not available: there are no submissions."
    except (OSError, ValueError, KeyError):
        section.text = f"Not available: {file.name} can't be read; write it again with `python -m pcam_kaggle kaggle ledger`."
    return section


def _mistakes(base: ComparedRun, workspace: Workspace) -> Section:
    section = Section(
        "mistakes",
        "Where it is most wrong",
        f"{base.name}: the patches with tumour with the lowest probabilities, and those without tumour with the highest. The "
        f"square marks the centre of {LABELLED_SIDE} px that decides the label. Next to each patch is its Grad-CAM map, from "
        "the net that was not trained on the patch: bright regions contributed most to the prediction.",
    )
    assert base.oof is not None
    try:
        if not base.config:
            raise UserError(f"{base.name} is a blend, which has no net of its own")
        section.mistakes = most_wrong(base.oof, base.config, Run(workspace.run(base.name)), PatchStore(workspace.store))
    except (UserError, OSError, TypeError, ValueError, RuntimeError) as error:
        # An old checkpoint, or a net without feature maps, must not prevent the rest of the report.
        section.text = f"Left out: {' '.join(str(error).split())[:300]}."
    return section
