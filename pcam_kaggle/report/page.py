"""A comparison as one self-contained HTML file: conclusions, table, figures, and the worst mistakes of the baseline."""

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
from pcam_kaggle.report import figures
from pcam_kaggle.report.figures import FOLD_RANGE, Plot
from pcam_kaggle.report.gallery import LABELLED_SIDE
from pcam_kaggle.report.mistakes import Mistake, explained_mistakes
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import KAGGLE_SCORES, LEDGER_FILE
from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.held_out import EvaluationResult
from pcam_kaggle.scoring.intervals import unit_of
from pcam_kaggle.scoring.tables import caption, conclusions, display_table, evaluation_caption, evaluation_table

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(slots=True)
class Section:
    """A section of the report; `text` describes its content, or gives the reason why there is none."""

    anchor: str
    title: str
    text: str
    plots: list[Plot] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


def write_report(comparison: Comparison, workspace: Workspace, target: Path) -> None:
    """Write `comparison` to the HTML file `target`, atomically and without references to other files.

    A section whose input is missing (patch store, checkpoints, slides, Kaggle scores) gives the reason instead.
    """
    baseline, shown = comparison.baseline, display_table(comparison)
    assert baseline.oof is not None
    by_name = {run.name: run for run in comparison.runs}
    entries = [by_name[name] for name in shown["run"]]
    scored = [(entry, entry.oof) for entry in entries if entry.oof is not None and not entry.problem]
    sections = [
        *_curves(scored, baseline.name, baseline.oof),
        _learning(entries, workspace),
        *_probabilities(scored),
        _slide_aucs(scored, comparison, workspace),
        _held_out(workspace),
        _mistakes(baseline, baseline.oof, workspace),
        _correlation(scored, baseline),
        _leaderboard(workspace),
    ]
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
        sections=sections,
    )
    write(target, lambda file: file.write(text.encode()))


def _curves(scored: list[tuple[ComparedRun, pd.DataFrame]], name: str, oof: pd.DataFrame) -> list[Section]:
    """Return the ROC and precision-recall curves, with those of the baseline `name` beside the runs paired with it."""
    drawn = [(entry.name, table, (name, oof) if entry.pooled else None) for entry, table in scored]
    return [
        Section("roc", "ROC curves", FOLD_RANGE, [figures.roc(*each) for each in drawn]),
        Section("precision-recall", "Precision-recall curves", FOLD_RANGE, [figures.precision_recall(*each) for each in drawn]),
    ]


def _learning(entries: list[ComparedRun], workspace: Workspace) -> Section:
    section = Section("learning", "Learning curves", "Per epoch, from each fold's log.")
    logs = {entry.name: Run(workspace.run(entry.name)).logs() for entry in entries}
    section.plots = [figures.learning(name, folds) for name, folds in logs.items() if folds]
    if not section.plots:
        section.text = "None of these runs has a log: blends and probes have no epochs."
    return section


def _probabilities(scored: list[tuple[ComparedRun, pd.DataFrame]]) -> list[Section]:
    histograms = [figures.histogram(entry.name, oof) for entry, oof in scored]
    reliability = [figures.reliability(entry.name, oof) for entry, oof in scored]
    text = "The points of a calibrated model are on the diagonal. Calibration affects thresholds, not the AUC."
    return [
        Section("histogram", "OOF probabilities by label", "Errors are where the two distributions overlap.", histograms),
        Section("reliability", "Calibration", text, reliability),
    ]


def _slide_aucs(scored: list[tuple[ComparedRun, pd.DataFrame]], comparison: Comparison, workspace: Workspace) -> Section:
    text = "Out of fold, within each slide or stain group that has patches of both labels."
    section = Section("slides", "AUC by slide", text)
    for entry, oof in scored:
        slides, unit = comparison.groups, comparison.unit
        if entry.unpaired_reason:
            slides, unit = read_groups(workspace.folds / f"{entry.scheme}.csv"), unit_of(entry.scheme)
        plot = None if slides is None else figures.slide_aucs(entry.name, oof, slides, unit)
        section.plots += [plot] if plot else []
    if not section.plots:
        section.text = "Not available: the fold files of these runs have no slides with patches of both labels."
    return section


def _held_out(workspace: Workspace) -> Section:
    section = Section("evaluations", "Held-out slides", "")
    captions = []
    for folder in sorted(workspace.evaluations.glob("*/")):
        try:
            result = EvaluationResult.read(Evaluation(folder).result_file)
        except UserError as error:
            captions.append(_left_out(error))
        else:
            captions.append(f"{folder.name}: {evaluation_caption(result)}")
            section.tables[f"Scores on {folder.name}"] = evaluation_table(result)
    section.text = (
        " ".join(captions) or "Not available: no run was evaluated on held-out slides (`python -m pcam_kaggle evaluate`)."
    )
    return section


def _mistakes(base: ComparedRun, oof: pd.DataFrame, workspace: Workspace) -> Section:
    section = Section(
        "mistakes",
        "Worst mistakes",
        f"{base.name}: the patches with tumour with the lowest probabilities, and those without tumour with the highest. The "
        f"square marks the centre of {LABELLED_SIDE} px that decides the label. Next to each patch is its Grad-CAM map, from "
        "the model that was not trained on the patch: bright regions contributed most to the prediction.",
    )
    try:
        if not base.config:
            raise UserError(f"{base.name} is a blend, which has no model of its own")
        section.mistakes = explained_mistakes(oof, base.config, Run(workspace.run(base.name)), PatchStore(workspace.store))
    except (UserError, OSError, RuntimeError) as error:
        # An old checkpoint, or a model without feature maps, must not prevent the rest of the report.
        section.text = _left_out(error)
    return section


def _correlation(scored: list[tuple[ComparedRun, pd.DataFrame]], baseline: ComparedRun) -> Section:
    section = Section("correlation", "Correlation between runs", "A blend gains most from runs that are accurate and differ.")
    paired = {entry.name: oof["probability"] for entry, oof in scored if entry is baseline or entry.pooled}
    if len(paired) < 2:
        section.text = "Not available: needs two runs that are scored on the same patches and folds."
    else:
        section.plots.append(figures.correlation([*paired], np.stack([*paired.values()])))
    return section


def _leaderboard(workspace: Workspace) -> Section:
    section = Section("leaderboard", "CV versus LB", "Does a better OOF AUC mean a better score on Kaggle?")
    file = workspace.submissions / LEDGER_FILE
    try:
        ledger = pd.read_csv(file, dtype={"name": str}).astype(dict.fromkeys(["oof_auc", *KAGGLE_SCORES], float))
    except FileNotFoundError:
        section.text = "Not available: there are no submissions."
    except (OSError, ValueError, KeyError):
        section.text = f"Not available: {file.name} can't be read; write it again with `python -m pcam_kaggle kaggle scores`."
    else:
        if ledger[[*KAGGLE_SCORES]].notna().any(axis=None):
            section.plots.append(figures.cv_versus_lb(ledger))
        else:
            section.text = "Not available: no Kaggle scores are recorded."
    return section


def _left_out(error: Exception) -> str:
    return f"Left out: {' '.join(str(error).split())[:300]}."
