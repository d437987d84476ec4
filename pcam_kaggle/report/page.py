"""A comparison as one self-contained HTML file: conclusions, table, figures, and the worst mistakes of one run."""

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
from pcam_kaggle.runs.submissions import KAGGLE_SCORES, read_submissions
from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.held_out import EvaluationResult
from pcam_kaggle.scoring.intervals import unit_of
from pcam_kaggle.scoring.tables import caption, conclusions, display_table, evaluation_sentences, evaluation_table

TEMPLATE = Path(__file__).with_name("page.html")

# The runs that can be scored, with their OOF tables.
Scored = list[tuple[ComparedRun, pd.DataFrame]]


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
    """Write `comparison` to the HTML file `target`; a section whose input is missing gives the reason instead."""
    reference, shown = comparison.reference, display_table(comparison)
    oof, _ = reference.scored()
    by_name = {run.name: run for run in comparison.runs}
    runs = [by_name[name] for name in shown["run"]]
    scored = [(run, run.scored()[0]) for run in runs if not run.problem]
    sections = [
        *_predictions(scored, reference.name, oof),
        _learning(runs, workspace),
        _slide_aucs(scored, comparison, workspace),
        _held_out(workspace),
        _mistakes(reference, oof, workspace),
        _correlation(scored, reference),
        _leaderboard(workspace),
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        heading=f"Run {reference.name}" if len(runs) == 1 else f"{len(runs)} runs compared",
        about=f"{len(oof):,} patches, {oof['label'].mean():.1%} with tumour, in {oof['fold'].nunique()} folds",
        caption=caption(comparison),
        sentences=conclusions(comparison),
        columns=shown.columns[:-1].tolist(),
        cells=shown.to_numpy().tolist(),
        sections=sections,
    )
    write(target, lambda file: file.write(text.encode()))


def _predictions(scored: Scored, name: str, oof: pd.DataFrame) -> list[Section]:
    """Return the figures of each run's predictions; curves have those of the reference `name` beside runs paired with it."""
    drawn = [(run.name, table, (name, oof) if run.pooled else None) for run, table in scored]
    reliability = [figures.reliability(run.name, table) for run, table in scored]
    histograms = [figures.histogram(run.name, table) for run, table in scored]
    text = "The points of a calibrated model are on the diagonal. Calibration affects thresholds, not the AUC."
    return [
        Section("roc", "ROC curves", FOLD_RANGE, [figures.roc(*each) for each in drawn]),
        Section("precision-recall", "Precision-recall curves", FOLD_RANGE, [figures.precision_recall(*each) for each in drawn]),
        Section("histogram", "OOF probabilities by label", "Errors are where the two distributions overlap.", histograms),
        Section("reliability", "Calibration", text, reliability),
    ]


def _learning(runs: list[ComparedRun], workspace: Workspace) -> Section:
    logs = {run.name: Run(workspace.run(run.name)).logs() for run in runs}
    plots = [figures.learning(name, folds) for name, folds in logs.items() if folds]
    none = "None of these runs has a log: blends and probes have no epochs."
    return Section("learning", "Learning curves", "Per epoch, from each fold's log." if plots else none, plots)


def _slide_aucs(scored: Scored, comparison: Comparison, workspace: Workspace) -> Section:
    section = Section(
        "slides", "AUC by slide", "Out of fold, within each slide or stain group that has patches of both labels."
    )
    for run, oof in scored:
        slides, unit = comparison.groups, comparison.unit
        if run.unpaired_reason:
            slides, unit = read_groups(workspace.folds / f"{run.scheme}.csv"), unit_of(run.scheme)
        plot = None if slides is None else figures.slide_aucs(run.name, oof, slides, unit)
        section.plots += [plot] if plot else []
    if not section.plots:
        section.text = "Not available: the fold files of these runs have no slides with patches of both labels."
    return section


def _held_out(workspace: Workspace) -> Section:
    captions, tables = [], {}
    for folder in sorted(workspace.evaluations.glob("*/")):
        try:
            result = EvaluationResult.read(Evaluation(folder).result_file)
        except UserError as error:
            captions.append(_left_out(error))
        else:
            captions.append(f"{folder.name}: {' '.join(evaluation_sentences(result))}")
            tables[f"Scores on {folder.name}"] = evaluation_table(result)
    none = "Not available: no run was evaluated on held-out slides (`python -m pcam_kaggle evaluate`)."
    return Section("evaluations", "Held-out slides", " ".join(captions) or none, tables=tables)


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
            raise UserError(f"{base.name} is a blend or imported, and has no model of its own")
        store = PatchStore(workspace.store_of(base.config["subset"]))
        section.mistakes = explained_mistakes(oof, base.config, Run(workspace.run(base.name)), store)
    except (UserError, OSError, RuntimeError) as error:
        # An old checkpoint, or a model without feature maps, must not prevent the rest of the report.
        section.text = _left_out(error)
    return section


def _correlation(scored: Scored, reference: ComparedRun) -> Section:
    section = Section("correlation", "Correlation between runs", "A blend gains most from runs that are accurate and differ.")
    paired = {run.name: oof["probability"] for run, oof in scored if run is reference or run.pooled}
    if len(paired) > 1:
        section.plots = [figures.correlation([*paired], np.stack([*paired.values()]))]
    else:
        section.text = "Not available: needs two runs that are scored on the same patches and folds."
    return section


def _leaderboard(workspace: Workspace) -> Section:
    section = Section("leaderboard", "CV versus LB", "Does a better OOF AUC mean a better score on Kaggle?")
    records = read_submissions(workspace.submissions).values()
    scores = [(made.oof_auc.value, made.public_score, made.private_score) for made in records]
    table = pd.DataFrame(scores, columns=["oof_auc", *KAGGLE_SCORES], dtype=float)
    if table[[*KAGGLE_SCORES]].notna().any(axis=None):
        section.plots = [figures.cv_versus_lb(table)]
    else:
        section.text = "Not available: no submission has a score of Kaggle."
    return section


def _left_out(error: Exception) -> str:
    return f"Left out: {' '.join(str(error).split())[:300]}."
