"""Pictures for notebooks: patches with the labelled centre, augmented patches, the worst mistakes, and curves."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from pcam_kaggle.core.config import Config
from pcam_kaggle.report.figures import FOLD_RANGE, STYLE, Plot, learning, roc
from pcam_kaggle.training.augment import augmentation

LABELLED_SIDE = 32
# Two figures of this width fit beside each other into the 1,400 px of a usual window.
WIDTH, DPI = 5.6, 100
COLUMNS, PATCHES_PER_LABEL = 4, 8
LABELS = ("Tumour in the centre", "No tumour in the centre")
ERRORS = ("False negatives, with their probabilities", "False positives, with their probabilities")

Images = NDArray[np.uint8]
Titles = tuple[str, str]


class Gallery(NamedTuple):
    """Figures side by side, or one below the other where the window is narrow; notebooks show the HTML."""

    plots: list[Plot]

    def _repr_html_(self) -> str:
        return "\n".join(_picture(plot) for plot in self.plots)


def draw_examples(labels: pd.DataFrame, count: int = PATCHES_PER_LABEL, seed: int = 0) -> pd.DataFrame:
    """Return `count` random rows of `labels` (id, label) of each label, or all if there are fewer; those with tumour first."""
    drawn = [part.sample(min(count, len(part)), random_state=seed) for _, part in labels.groupby("label")]
    return pd.concat(drawn[::-1], ignore_index=True)


def worst_mistakes(oof: pd.DataFrame, count: int = PATCHES_PER_LABEL) -> pd.DataFrame:
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
    patches: Images, labels: pd.Series, probabilities: pd.Series | None = None, *, titles: Titles = LABELS, marked: bool = True
) -> Gallery:
    """Return a figure of the RGB `patches` (n, side, side, 3) of label 1 and one of those of label 0, with their `titles`.

    The `probabilities` (n,) are printed above the patches; `marked` frames the centre that decides the label.
    """
    texts = [f"{value:.3f}" for value in probabilities] if probabilities is not None else [""] * len(patches)
    plots = []
    for label, title in zip((1, 0), titles, strict=True):
        chosen = np.flatnonzero(labels == label)
        if len(chosen):
            figure = _patch_figure(patches[chosen], title, [texts[index] for index in chosen], marked)
            plots.append(Plot(figure, title, ""))
    return Gallery(plots)


def curves(logs: Mapping[str, Mapping[int, pd.DataFrame]], oof: pd.DataFrame) -> Gallery:
    """Return the learning curves of each run from the `logs` of its folds, and the ROC curve of `oof`; see `figures`."""
    plots = [learning(name, folds) for name, folds in logs.items() if folds]
    plot = roc("Out of fold", oof)
    return Gallery([*plots, Plot(plot.figure, "ROC curves", f"{plot.caption} {FOLD_RANGE}")])


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
        corner = (len(patch) - LABELLED_SIDE) / 2 - 0.5
        # White on black is visible on any tissue.
        for colour, width in (("black", 3), ("white", 1)) if marked else ():
            frame = Rectangle((corner, corner), LABELLED_SIDE, LABELLED_SIDE, fill=False, edgecolor=colour, linewidth=width)
            ax.add_patch(frame)
    return figure


def _picture(plot: Plot) -> str:
    """Return `plot` as an HTML figure that is never wider than the window."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        plot.figure.savefig(buffer, format="png", dpi=DPI)
    content = base64.b64encode(buffer.getvalue()).decode()
    width = round(DPI * plot.figure.get_figwidth())
    style = f"width: {width}px; max-width: 98%; display: inline-block; margin: 0 1%; vertical-align: top"
    image = f'<img alt="{html.escape(plot.title)}" style="width: 100%" src="data:image/png;base64,{content}">'
    return f'<figure style="{style}">{image}<figcaption>{html.escape(plot.caption)}</figcaption></figure>'
