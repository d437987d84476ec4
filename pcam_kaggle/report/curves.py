"""Curves of a run: ROC and precision-recall with their range over folds, and learning curves."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from pcam_kaggle.report.svg import GREY, HEIGHT, PRIMARY, STYLE, WIDTH, Plot, make_plot, panel
from pcam_kaggle.scoring.metrics import Floats, Labels, auc

POINTS = 200


class Reference(NamedTuple):
    """The name and the OOF table of the baseline, drawn in grey next to another run."""

    name: str
    oof: pd.DataFrame


@mpl.rc_context(STYLE)
def roc(name: str, oof: pd.DataFrame, reference: Reference | None = None) -> Plot:
    """Return the ROC curve of `oof` (label, fold, probability): mean and range over folds of the true positive rate."""
    grid = np.linspace(0, 1, POINTS) ** 2

    def curve(labels: Labels, scores: Floats) -> Floats:
        false, true, _ = roc_curve(labels, scores)
        return np.concatenate([[0.0], np.interp(grid[1:], false, true)])

    area = auc(oof["label"].to_numpy(), oof["probability"].to_numpy())
    caption = f"{name}: pooled AUC {area:.4f}."
    axes = ("False positive rate", "True positive rate")
    return _mean_and_range(f"ROC curve of {name}", caption, grid, curve, axes, oof, reference)


@mpl.rc_context(STYLE)
def precision_recall(name: str, oof: pd.DataFrame, reference: Reference | None = None) -> Plot:
    """Return the precision-recall curve of `oof` (label, fold, probability): mean and range over folds of the precision.

    The precision at a recall is that of the highest threshold that reaches it. Linear interpolation between thresholds would be
    too optimistic (Davis & Goadrich 2006).
    """
    grid = 1 - np.linspace(1, 0, POINTS) ** 2

    def curve(labels: Labels, scores: Floats) -> Floats:
        precision, recall, _ = precision_recall_curve(labels, scores)
        precision, recall = precision[-2::-1], recall[-2::-1]
        return precision[np.searchsorted(recall, grid - 1e-12)]

    average = average_precision_score(oof["label"], oof["probability"])
    caption = f"{name}: pooled average precision {average:.4f}, chance level {oof['label'].mean():.2f}."
    axes = ("Recall", "Precision")
    return _mean_and_range(f"Precision-recall curve of {name}", caption, grid, curve, axes, oof, reference)


@mpl.rc_context(STYLE)
def learning(name: str, logs: Mapping[int, pd.DataFrame]) -> Plot:
    """Return validation AUC and training loss by epoch; `logs` has a table of epoch, train_loss, valid_auc for each fold."""
    figure = Figure((WIDTH, HEIGHT + 0.5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for ax, column, label in zip(axes, ("valid_auc", "train_loss"), ("Validation AUC", "Training loss"), strict=True):
        for log in logs.values():
            ax.plot(log["epoch"], log[column], color=PRIMARY, alpha=0.45, linewidth=1, marker=".", markersize=3)
        mean = pd.concat(logs.values()).groupby("epoch")[column].mean()
        ax.plot(mean.index, mean, color=PRIMARY, linewidth=2)
        ax.set_ylabel(label)
    axes[1].set_xlabel("Epoch")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    best = pd.concat(logs.values()).groupby("epoch")["valid_auc"].mean()
    caption = (
        f"{name}: {len(logs)} fold{'s' if len(logs) > 1 else ''} (thin) and their mean (bold). The mean validation AUC peaks "
        f"({best.max():.4f}) after epoch {best.idxmax():.0f}."
    )
    return make_plot(figure, f"Learning curves of {name}", caption)


def _mean_and_range(
    title: str,
    caption: str,
    grid: Floats,
    curve: Callable[[Labels, Floats], Floats],
    axes: tuple[str, str],
    oof: pd.DataFrame,
    reference: Reference | None,
) -> Plot:
    """Plot `curve` on `grid`: mean and range over the folds of `oof`, and the mean over the folds of `reference`."""

    def folds(table: pd.DataFrame) -> Floats:
        parts = (part for _, part in table.groupby("fold"))
        return np.stack([curve(part["label"].to_numpy(), part["probability"].to_numpy()) for part in parts])

    figure, ax = panel()
    curves = folds(oof)
    ax.fill_between(grid, curves.min(axis=0), curves.max(axis=0), color=PRIMARY, alpha=0.25, linewidth=0)
    ax.plot(grid, curves.mean(axis=0), color=PRIMARY, linewidth=1.5)
    if reference:
        ax.plot(grid, folds(reference.oof).mean(axis=0), color=GREY, linewidth=1.5, linestyle="--")
        caption += f" Grey and dashed: {reference.name}."
    ax.set(xlabel=axes[0], ylabel=axes[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    return make_plot(figure, title, caption)
