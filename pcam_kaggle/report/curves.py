"""The curves of a run: ROC and precision-recall with their range over folds, and what training made of it by epoch."""

from collections.abc import Callable
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from pcam_kaggle.report.svg import FIRST, GREY, HEIGHT, STYLE, WIDTH, Plot, make_plot, panel
from pcam_kaggle.scoring.metrics import auc

Floats = NDArray[np.float64]
Labels = NDArray[np.integer]
POINTS = 200


class Reference(NamedTuple):
    """The baseline's OOF table, drawn in grey behind another run's."""

    name: str
    oof: pd.DataFrame


@mpl.rc_context(STYLE)
def roc(name: str, oof: pd.DataFrame, reference: Reference | None = None) -> Plot:
    """Return the ROC curve of `oof` (label, fold, probability): mean over folds of the true positive rate, and its range."""
    grid = np.linspace(0, 1, POINTS) ** 2

    def curve(labels: Labels, scores: Floats) -> Floats:
        false, true, _ = roc_curve(labels, scores)
        return np.concatenate([[0.0], np.interp(grid[1:], false, true)])

    area = auc(oof["label"].to_numpy(), oof["probability"].to_numpy())
    said = f"{name}: pooled AUC {area:.4f}."
    axis = ("False positive rate", "True positive rate", "lower right")
    return _banded(f"ROC curve of {name}", said, grid, curve, axis, oof, reference)


@mpl.rc_context(STYLE)
def precision_recall(name: str, oof: pd.DataFrame, reference: Reference | None = None) -> Plot:
    """Return the precision-recall curve of `oof` (label, fold, probability): mean over folds of the precision, and its range.

    Precision at a recall is that of the highest threshold which reaches it; between thresholds nothing is interpolated, since
    no classifier lies on such a line (Davis & Goadrich 2006).
    """
    grid = 1 - np.linspace(1, 0, POINTS) ** 2

    def curve(labels: Labels, scores: Floats) -> Floats:
        precision, recall, _ = precision_recall_curve(labels, scores)
        precision, recall = precision[-2::-1], recall[-2::-1]
        return precision[np.searchsorted(recall, grid - 1e-12)]

    average = average_precision_score(oof["label"], oof["probability"])
    said = f"{name}: pooled average precision {average:.4f}, by chance {oof['label'].mean():.2f}."
    return _banded(
        f"Precision-recall curve of {name}", said, grid, curve, ("Recall", "Precision", "lower left"), oof, reference
    )


@mpl.rc_context(STYLE)
def learning(name: str, logs: dict[int, pd.DataFrame]) -> Plot:
    """Return valid AUC and train loss by epoch; `logs` holds per fold a table of epoch, train_loss and valid_auc."""
    figure = Figure((WIDTH, HEIGHT + 0.5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for ax, column, label in zip(axes, ("valid_auc", "train_loss"), ("Valid AUC", "Train loss"), strict=True):
        for log in logs.values():
            ax.plot(log["epoch"], log[column], color=FIRST, alpha=0.45, linewidth=1, marker=".", markersize=3)
        mean = pd.concat(logs.values()).groupby("epoch")[column].mean()
        ax.plot(mean.index, mean, color=FIRST, linewidth=2)
        ax.set_ylabel(label)
    axes[1].set_xlabel("Epoch")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    last = pd.concat(logs.values()).groupby("epoch")["valid_auc"].mean()
    said = (
        f"{name}: {len(logs)} fold{'s' if len(logs) > 1 else ''}, thin, and their mean, bold; mean valid AUC is highest "
        f"({last.max():.4f}) after epoch {last.idxmax():.0f}."
    )
    return make_plot(figure, f"Learning curves of {name}", said)


def _banded(
    title: str,
    caption: str,
    grid: Floats,
    curve: Callable[[Labels, Floats], Floats],
    axis: tuple[str, str, str],
    oof: pd.DataFrame,
    reference: Reference | None,
) -> Plot:
    """Return a figure of `curve` over `grid`: mean and range over the folds of `oof`, and the mean of `reference` in grey."""

    def folds(table: pd.DataFrame) -> Floats:
        parts = (part for _, part in table.groupby("fold"))
        return np.stack([curve(part["label"].to_numpy(), part["probability"].to_numpy()) for part in parts])

    figure, ax = panel()
    curves = folds(oof)
    ax.fill_between(grid, curves.min(axis=0), curves.max(axis=0), color=FIRST, alpha=0.25, linewidth=0)
    ax.plot(grid, curves.mean(axis=0), color=FIRST, linewidth=1.5)
    if reference:
        ax.plot(grid, folds(reference.oof).mean(axis=0), color=GREY, linewidth=1.5, linestyle="--")
        caption += f" Grey, dashed: {reference.name}."
    ax.set(xlabel=axis[0], ylabel=axis[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    return make_plot(figure, title, caption)
