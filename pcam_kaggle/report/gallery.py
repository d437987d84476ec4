"""Pictures for notebooks: patches with the labelled centre, augmented patches, the largest errors, and curves by fold."""

import base64
import html
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from pcam_kaggle.core.config import Config
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.training.augment import augmentation

LABELLED_SIDE = 32
# Two figures of this width fit beside each other into the 1,400 px of a usual window.
WIDTH = 5.6
DPI = 100
COLUMNS = 4
PATCHES_PER_LABEL = 8
LABELS = ("Tumour in the centre", "No tumour in the centre")
ERRORS = ("False negatives, with their probabilities", "False positives, with their probabilities")
FOLD_COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
RUN_STYLES = ("-", "--", ":", "-.")

Images = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Gallery:
    """Figures side by side, or one below the other where the window is narrow.

    Notebooks show the HTML, which needs no pyplot backend.

    Attributes:
        figures: Each figure by its text alternative.
    """

    figures: dict[str, Figure]

    def _repr_html_(self) -> str:
        return "\n".join(_image(alternative, figure) for alternative, figure in self.figures.items())


def draw_examples(labels: pd.DataFrame, count: int = PATCHES_PER_LABEL, seed: int = 0) -> pd.DataFrame:
    """Return `count` random rows of `labels` (id, label) of each label, or all if there are fewer; those with tumour first."""
    drawn = [part.sample(min(count, len(part)), random_state=seed) for _, part in labels.groupby("label")]
    return pd.concat(drawn[::-1], ignore_index=True)


def largest_errors(oof: pd.DataFrame, count: int = PATCHES_PER_LABEL) -> pd.DataFrame:
    """Return the `count` lowest-scored rows of `oof` (id, label, probability) with tumour, then the highest-scored without."""
    by_score = oof.sort_values(["probability", "id"])
    negatives, positives = by_score[by_score["label"] == 1].head(count), by_score[by_score["label"] == 0].tail(count)[::-1]
    return pd.concat([negatives, positives], ignore_index=True)


def augmented(patches: Images, config: Config) -> Images:
    """Return `patches` (n, 96, 96, 3) after the random augmentation that training with `config` uses: (n, side, side, 3)."""
    augment = augmentation(config.side, config.stain_jitter, config.color_jitter)
    augment.set_random_seed(config.seed)
    return np.stack([augment(image=patch)["image"] for patch in patches])


def patch_gallery(
    patches: Images,
    labels: pd.Series,
    probabilities: pd.Series | None = None,
    *,
    titles: tuple[str, str] = LABELS,
    marked: bool = True,
) -> Gallery:
    """Return pictures of patches by label.

    Args:
        patches: RGB uint8 (n, side, side, 3).
        labels: 0 or 1, (n,).
        probabilities: Printed above each patch, (n,); None for nothing.
        titles: Titles of the figures of label 1 and of label 0.
        marked: Whether to mark the centre that decides the label.
    """
    texts = [f"{value:.3f}" for value in probabilities] if probabilities is not None else [""] * len(patches)
    figures = {}
    for label, title in zip((1, 0), titles, strict=True):
        chosen = np.flatnonzero(labels == label)
        if len(chosen):
            figures[title] = _patch_figure(patches[chosen], title, [texts[index] for index in chosen], marked)
    return Gallery(figures)


def curves(logs: Mapping[str, Mapping[int, pd.DataFrame]], oof: pd.DataFrame) -> Gallery:
    """Return learning curves and ROC curves, with a colour for each fold.

    Args:
        logs: For each run, the training log (epoch, valid_auc) of each fold; the learning curves are left out if all are empty.
        oof: Columns label, fold, probability.
    """
    roc = _roc_figure(oof)
    learning = {"Learning curves": _learning_figure(logs)} if any(logs.values()) else {}
    return Gallery(learning | {"ROC curves": roc})


def _patch_figure(patches: Images, title: str, texts: Sequence[str], marked: bool) -> Figure:
    rows = -(-len(patches) // COLUMNS)
    heading, each = 0.4, WIDTH / COLUMNS + (0.15 if any(texts) else 0)
    figure = Figure((WIDTH, heading + rows * each), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for ax in axes:
        ax.axis("off")
    for ax, patch, text in zip(axes, patches, texts, strict=False):
        ax.imshow(patch)
        ax.set_title(text, fontsize=10, pad=2)
        if marked:
            corner = (len(patch) - LABELLED_SIDE) / 2 - 0.5
            # White on black is visible on any tissue.
            for colour, width in (("black", 3), ("white", 1)):
                frame = Rectangle((corner, corner), LABELLED_SIDE, LABELLED_SIDE, fill=False, edgecolor=colour, linewidth=width)
                ax.add_patch(frame)
    return figure


def _learning_figure(logs: Mapping[str, Mapping[int, pd.DataFrame]]) -> Figure:
    figure = Figure((WIDTH, 0.8 * WIDTH), layout="constrained")
    ax = figure.add_subplot()
    ax.set(title="Learning curves", xlabel="Epoch", ylabel="Validation AUC")
    for (name, folds), style in zip(logs.items(), itertools.cycle(RUN_STYLES)):
        for fold, log in folds.items():
            label = f"fold {fold}" if len(logs) == 1 else f"{name}, fold {fold}"
            ax.plot(log["epoch"], log["valid_auc"], style, color=_colour(fold), marker=".", label=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=8)
    return figure


def _roc_figure(oof: pd.DataFrame) -> Figure:
    figure = Figure((WIDTH, 0.8 * WIDTH), layout="constrained")
    ax = figure.add_subplot()
    ax.set(title="ROC curves", xlabel="False positive rate", ylabel="True positive rate")
    ax.plot([0, 1], [0, 1], ":", color="grey")
    for fold, part in oof.groupby("fold"):
        labels, scores = part["label"].to_numpy(), part["probability"].to_numpy()
        false, true, _ = roc_curve(labels, scores)
        ax.plot(false, true, color=_colour(int(fold)), label=f"fold {fold}, AUC {auc(labels, scores):.4f}")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", fontsize=8)
    return figure


def _colour(fold: int) -> tuple[float, float, float]:
    return FOLD_COLOURS[fold % len(FOLD_COLOURS)]


def _image(alternative: str, figure: Figure) -> str:
    """Return `figure` as an HTML image that is never wider than the window."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    content = base64.b64encode(buffer.getvalue()).decode()
    style = f"width: {round(DPI * figure.get_figwidth())}px; max-width: 98%; height: auto; display: inline-block; margin: 0 1%"
    return f'<img alt="{html.escape(alternative)}" style="{style}" src="data:image/png;base64,{content}">'
