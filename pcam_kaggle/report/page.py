"""A comparison as one HTML file that opens by double click: words, table, figures, and the patches it is most wrong about."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from pcam_kaggle import UserError
from pcam_kaggle.data.atomic_io import write
from pcam_kaggle.data.folds import groups
from pcam_kaggle.data.layout import Workspace
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.kaggle.ledger import NAME as LEDGER
from pcam_kaggle.report import curves, figures
from pcam_kaggle.report.mistakes import LABELLED_SIDE, Mistake, most_wrong
from pcam_kaggle.report.svg import Plot
from pcam_kaggle.scoring.compare import Comparison, Entry
from pcam_kaggle.scoring.render import caption, shown_columns, table, verdicts
from pcam_kaggle.scoring.resampling import unit_of

TEMPLATE = Path(__file__).with_name("page.html")
SCORES = ["public_score", "private_score"]


@dataclass(slots=True)
class Section:
    """A headed part of the report; `text` says what is seen, or why nothing is."""

    name: str
    title: str
    text: str
    plots: list[Plot] = field(default_factory=list)
    mistakes: list[Mistake] = field(default_factory=list)


def write_report(comparison: Comparison, workspace: Workspace, target: Path) -> None:
    """Write `comparison` to `target`, one HTML file without a link to any other, whole or not at all.

    What is lacking, a store, a checkpoint, slides or Kaggle's scores, is said in its section.
    """
    base, rows = comparison.base, table(comparison)
    assert base.oof is not None
    by_name = {entry.name: entry for entry in comparison.entries}
    ordered = [by_name[name] for name in rows["run"]]
    shown = shown_columns(rows)
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    text = page.render(
        base=base.name,
        alone=len(ordered) == 1,
        about=f"{len(base.oof):,} patches, {base.oof['label'].mean():.1%} with tumour, in {base.oof['fold'].nunique()} folds",
        caption=caption(comparison),
        sentences=verdicts(comparison),
        columns=shown.columns[:-1].tolist(),
        cells=shown.to_numpy().tolist(),
        sections=[
            *_curves(ordered, base),
            _learning(ordered, workspace),
            *_probabilities(ordered),
            _slides(ordered, comparison, workspace),
            _mistakes(base, workspace),
            _correlation(ordered, base),
            _ledger(workspace),
        ],
    )
    write(target, lambda file: file.write(text.encode()))


def _curves(entries: list[Entry], base: Entry) -> list[Section]:
    roc = Section("roc", "ROC curves", "The line is the mean over folds, the band spans the lowest to the highest.")
    recall = Section("precision-recall", "Precision-recall curves", roc.text)
    assert base.oof is not None
    for entry in entries:
        if entry.oof is not None and not entry.problem:
            reference = curves.Reference(base.name, base.oof) if entry.pooled else None
            roc.plots.append(curves.roc(entry.name, entry.oof, reference))
            recall.plots.append(curves.precision_recall(entry.name, entry.oof, reference))
    return [roc, recall]


def _learning(entries: list[Entry], workspace: Workspace) -> Section:
    section = Section("learning", "Learning curves", "Per epoch, as each fold's log.csv holds them.")
    for entry in entries:
        logs = {}
        for file in sorted(workspace.run(entry.name).glob("fold_*/log.csv")):
            try:
                log = pd.read_csv(file)[["epoch", "train_loss", "valid_auc"]].astype(float)
            except (OSError, ValueError, KeyError):
                continue
            logs[file.parent.name] = log
        if logs:
            section.plots.append(curves.learning(entry.name, logs))
    if not section.plots:
        section.text = "None of these runs has a log: a blend trains nothing."
    return section


def _probabilities(entries: list[Entry]) -> list[Section]:
    histograms = Section("histogram", "OOF probabilities by label", "Where the two overlap, patches are mistaken.")
    reliability = Section(
        "reliability",
        "Reliability",
        "A calibrated net's points lie on the diagonal; the AUC does not depend on it, a threshold does.",
    )
    for entry in entries:
        if entry.oof is not None and not entry.problem:
            histograms.plots.append(figures.histogram(entry.name, entry.oof))
            reliability.plots.append(figures.reliability(entry.name, entry.oof))
    return [histograms, reliability]


def _slides(entries: list[Entry], comparison: Comparison, workspace: Workspace) -> Section:
    section = Section(
        "slides", "AUC by slide", "Out of fold, within each slide, or stain group, that has patches of both labels."
    )
    for entry in entries:
        if entry.oof is None or entry.problem:
            continue
        if entry.apart:
            slides, unit = groups(workspace.folds / f"{entry.scheme}.csv"), unit_of(entry.scheme)
        else:
            slides, unit = comparison.slides, comparison.unit
        plot = None if slides is None else figures.slide_aucs(entry.name, entry.oof, slides, unit)
        section.plots += [plot] if plot else []
    if not section.plots:
        section.text = "Left out: no fold file of these runs knows slides that have patches of both labels."
    return section


def _correlation(entries: list[Entry], base: Entry) -> Section:
    section = Section("correlation", "Correlation between runs", "What blending lives on: runs that are good and differ.")
    paired = [entry for entry in entries if entry is base or entry.pooled]
    if len(paired) < 2:
        section.text = "Left out: it takes two runs that are scored on the same patches and folds."
        return section
    probabilities = np.stack([entry.oof["probability"].to_numpy() for entry in paired if entry.oof is not None])
    section.plots.append(figures.correlation([entry.name for entry in paired], probabilities))
    return section


def _ledger(workspace: Workspace) -> Section:
    section = Section("ledger", "CV against LB", "Whether a better OOF AUC is a better score on Kaggle.")
    file = workspace.submissions / LEDGER
    try:
        ledger = pd.read_csv(file, dtype={"name": str}).astype(dict.fromkeys(["oof_auc", *SCORES], float))
        if ledger[SCORES].notna().any(axis=None):
            section.plots.append(figures.cv_against_lb(ledger))
        else:
            section.text = "Left out: no score of Kaggle is known yet."
    except FileNotFoundError:
        section.text = "Left out: no submission has been written yet."
    except (OSError, ValueError, KeyError):
        section.text = f"Left out: {file.name} can't be read; write it again."
    return section


def _mistakes(base: Entry, workspace: Workspace) -> Section:
    section = Section(
        "mistakes",
        "Where it is most wrong",
        f"{base.name}: the patches with tumour that it scores lowest, and those without that it scores highest. The square "
        f"is the centre of {LABELLED_SIDE} px that the label speaks of. Beside each, by Grad-CAM, what spoke for the answer of "
        "the net that did not train on it, the brighter the more.",
    )
    assert base.oof is not None
    try:
        if not base.config:
            raise UserError(f"{base.name} is a blend, which has no net of its own")
        section.mistakes = most_wrong(base.oof, base.config, workspace.run(base.name), PatchStore(workspace.store))
    except (UserError, OSError, TypeError, ValueError, RuntimeError) as error:
        # Whatever an old checkpoint or a net without maps fails with, the rest of the report stands without it.
        section.text = f"Left out: {' '.join(str(error).split())[:300]}."
    return section
