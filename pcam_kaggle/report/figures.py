"""Figures of runs: ROC, precision-recall and learning curves, histograms, calibration, AUC by slide, correlation, CV versus LB.

Tables named `oof` have the columns id, label, fold and probability. A `reference` is the name and the OOF table of a baseline.
"""

import html
import io
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import ks_2samp, rankdata
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.scoring.metrics import Floats, Labels, auc, calibration_bins, calibration_error
from pcam_kaggle.scoring.results import Unit

# The SVG of a figure has the text colour and the CSS variables of the page instead, in light and dark mode.
TEXT, PRIMARY, SECONDARY, GREY = "#010203", "#0072b2", "#d55e00", "#7f7f7f"
PAGE_COLOURS = {TEXT: "currentColor", PRIMARY: f"var(--primary, {PRIMARY})", SECONDARY: f"var(--secondary, {SECONDARY})"}
PAGE_COLOURS |= {GREY: f"var(--grey, {GREY})"}
GROUP_COLOURS = [PRIMARY, SECONDARY, "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#e7ba52", "#bcbd22", "#17becf"]
# Inches of 96 px. A panel fits a phone without scaling its text.
WIDTH, HEIGHT = 3.7, 3.1
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "legend.fontsize": 8.0,
    **dict.fromkeys(["axes.spines.top", "axes.spines.right", "legend.frameon"], False),
    **dict.fromkeys(["axes.linewidth", "xtick.major.width", "ytick.major.width"], 0.6),
    **dict.fromkeys(["xtick.minor.size", "ytick.minor.size"], 0),
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"], TEXT),
}
POINTS, MAX_NAMED_SLIDES = 200, 30
# Side of the corner that the inset of a curve enlarges.
CORNER = 0.2
# At some threshold, the fractions of positives then differ by more.
DIFFERENT = 0.1
FOLD_RANGE = "Line: mean over folds. Band: range over folds."
LOSSES = (
    "Compare the shapes of both losses, not their values: training is on augmented patches and, with a teacher, on its "
    "probabilities; validation is of the EMA model."
)

Curve = Callable[[Labels, Floats], Floats]
Reference = tuple[str, pd.DataFrame] | None


class Html(str):
    """HTML, which jinja2 and notebooks do not escape."""

    def __html__(self) -> str:
        return self

    _repr_html_ = __html__


def html_figure(content: str, width: int, caption: str) -> Html:
    """Return the HTML `content`, `width` px wide, with a `caption` as a figure beside others, never wider than the window."""
    style = f"display: inline-block; vertical-align: top; width: {width}px; max-width: 100%; margin: 0 14px 14px 0"
    return Html(f'<figure style="{style}">{content}<figcaption>{html.escape(caption)}</figcaption></figure>')


class Plot(NamedTuple):
    """A figure, its text alternative and the caption below it."""

    figure: Figure
    title: str
    caption: str

    @property
    def html(self) -> Html:
        """The figure with its caption."""
        return html_figure(self.svg, round(96 * self.figure.get_figwidth()), self.caption)

    @property
    def svg(self) -> str:
        """The figure as an `<svg>` element; `title` must be unique in the page, since the ids derive from it."""
        buffer = io.StringIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": self.title}):
            self.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        svg = "<svg" + buffer.getvalue().partition("<svg")[2]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg).replace("xlink:href", "href")
        svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
        # Two decimals of a point are enough for any screen and reduce the size by two thirds.
        svg = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), svg)
        for colour, variable in PAGE_COLOURS.items():
            svg = svg.replace(colour, variable)
        width, height = (round(96 * inches) for inches in self.figure.get_size_inches())
        alternative = html.escape(f"{self.title}. {self.caption}")
        head = f'<svg role="img" aria-label="{alternative}" width="{width}" height="{height}"'
        return re.sub(r'<svg xmlns:xlink="[^"]*" width="[^"]*" height="[^"]*"', lambda _: head, svg, count=1)


@mpl.rc_context(STYLE)
def roc(name: str, oof: pd.DataFrame, reference: Reference = None) -> Plot:
    """Return the ROC curve: mean and range over folds of the true positive rate, and the mean of `reference` in grey."""
    grid = np.linspace(0, 1, POINTS) ** 2

    def curve(labels: Labels, scores: Floats) -> Floats:
        false, true, _ = roc_curve(labels, scores)
        return np.concatenate([[0.0], np.interp(grid[1:], false, true)])

    figure, text = _mean_and_range(grid, curve, ("False positive rate", "True positive rate"), oof, reference, corner=0)
    area = auc(oof["label"].to_numpy(), oof["probability"].to_numpy())
    return Plot(figure, f"ROC curve of {name}", f"{name}: pooled AUC {area:.4f}.{text}")


@mpl.rc_context(STYLE)
def precision_recall(name: str, oof: pd.DataFrame, reference: Reference = None) -> Plot:
    """Return the precision-recall curve: mean and range over folds of the precision, and the mean of `reference` in grey.

    The precision at a recall is that of the highest threshold that reaches it (Davis & Goadrich 2006).
    """
    grid = 1 - np.linspace(1, 0, POINTS) ** 2

    def curve(labels: Labels, scores: Floats) -> Floats:
        precision, recall, _ = precision_recall_curve(labels, scores)
        precision, recall = precision[-2::-1], recall[-2::-1]
        return precision[np.searchsorted(recall, grid - 1e-12)]

    figure, text = _mean_and_range(grid, curve, ("Recall", "Precision"), oof, reference, corner=1)
    average = average_precision_score(oof["label"], oof["probability"])
    caption = f"{name}: pooled average precision {average:.4f}, chance level {oof['label'].mean():.2f}.{text}"
    return Plot(figure, f"Precision-recall curve of {name}", caption)


@mpl.rc_context(STYLE)
def learning(name: str, logs: Mapping[int, pd.DataFrame]) -> Plot:
    """Return validation AUC and losses by epoch; `logs` has a table of `LOG_COLUMNS` for each fold.

    The validation loss is left out if all logs lack it.
    """
    figure = Figure((WIDTH, HEIGHT + 0.5), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    means = pd.concat(logs.values()).groupby("epoch").mean()
    curves = {"valid_auc": (axes[0], PRIMARY, "-", ""), "train_loss": (axes[1], SECONDARY, "--", "training")}
    has_valid_loss = "valid_loss" in means.dropna(axis=1, how="all")
    if has_valid_loss:
        curves["valid_loss"] = (axes[1], PRIMARY, "-", "validation")
    for column, (ax, colour, style, word) in curves.items():
        for log in logs.values():
            ax.plot(log["epoch"], log[column], color=colour, alpha=0.45, linewidth=1, marker=".", markersize=3)
        ax.plot(means.index, means[column], color=colour, linewidth=2, linestyle=style, label=word)
    axes[0].set_ylabel("Validation AUC")
    axes[1].set(xlabel="Epoch", ylabel="Loss")
    axes[1].legend(loc="upper right")
    axes[1].xaxis.get_major_locator().set_params(integer=True)
    best = means["valid_auc"]
    caption = (
        f"{name}: {len(logs)} fold{'s' if len(logs) > 1 else ''} (thin) and their mean (bold). The mean validation AUC peaks "
        f"({best.max():.4f}) after epoch {best.idxmax():.0f}."
    )
    if has_valid_loss:
        caption += f" {LOSSES}"
    return Plot(figure, f"Learning curves of {name}", caption)


@mpl.rc_context(STYLE)
def histogram(name: str, oof: pd.DataFrame) -> Plot:
    """Return the histogram of the OOF probabilities by label, with logarithmic counts."""
    without, with_tumour = (oof.loc[oof["label"] == label, "probability"].to_numpy() for label in (0, 1))
    figure = _histograms({"no tumour": (without, 1), "tumour": (with_tumour, 1)}, ("OOF probability of tumour", "Patches"))
    negatives = ((oof["label"] == 1) & (oof["probability"] < 0.5)).mean()
    positives = ((oof["label"] == 0) & (oof["probability"] >= 0.5)).mean()
    caption = f"{name}: at 0.5, {negatives:.1%} of all patches are false negatives and {positives:.1%} are false positives."
    return Plot(figure, f"Histogram of OOF probabilities of {name} by label", caption)


@mpl.rc_context(STYLE)
def oof_and_test(name: str, oof: pd.DataFrame, test: Floats) -> Plot:
    """Return the histograms of the probabilities of `oof` and `test` (n,) as fractions; the caption says if they differ."""
    trained = oof["probability"].to_numpy()
    parts = {"out of fold": (trained, len(trained)), "test": (test, len(test))}
    figure = _histograms(parts, ("Probability of tumour", "Fraction of patches"))
    distance = ks_2samp(trained, test, method="asymp").statistic
    caption = (
        f"{name}: mean probability {trained.mean():.3f} out of fold, {test.mean():.3f} on the test set; D = {distance:.3f}."
    )
    if distance > DIFFERENT:
        caption += f" They differ: at some threshold, the shares of positives are {100 * distance:.0f} percentage points apart."
    return Plot(figure, f"OOF and test probabilities of {name}", caption)


@mpl.rc_context(STYLE)
def reliability(name: str, oof: pd.DataFrame) -> Plot:
    """Return the reliability diagram: fraction of positives by mean probability, in 15 bins."""
    figure, ax = _panel()
    labels, values = oof["label"].to_numpy(), oof["probability"].to_numpy()
    bins = calibration_bins(labels, values)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    # 95 % range of the fraction of positives of a calibrated model, by the normal approximation.
    mean = bins["probability"]
    half = 1.96 * np.sqrt(mean * (1 - mean) / bins["size"])
    ax.fill_between(mean, (mean - half).clip(0), (mean + half).clip(upper=1), color=GREY, alpha=0.25, linewidth=0)
    ax.plot(mean, bins["label"], color=PRIMARY, linewidth=1.5, marker="o", markersize=4)
    ax.set(xlabel="Mean OOF probability", ylabel="Fraction with tumour", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    error = calibration_error(labels, values)
    caption = f"{name}: expected calibration error {error:.4f}. Grey: 95 % range of a calibrated model (unit: patch)."
    return Plot(figure, f"Reliability diagram of {name}", caption)


@mpl.rc_context(STYLE)
def slide_aucs(name: str, oof: pd.DataFrame, slides: pd.DataFrame, unit: Unit = "slide") -> Plot:
    """Return the AUC within each of the `slides` (id, wsi), sorted; raises UserError if none has patches of both labels."""
    table = oof.merge(slides, on="id")
    both = table.groupby("wsi").filter(lambda part: part["label"].nunique() == 2)
    if both.empty:
        raise UserError(f"{name}: no {unit} has patches of both labels")
    areas = both.groupby("wsi")[["label", "probability"]].apply(lambda part: auc(*part.to_numpy().T)).sort_values()
    named = len(areas) <= MAX_NAMED_SLIDES
    figure, ax = _panel(height=max(HEIGHT, 0.6 + 0.17 * len(areas)) if named else HEIGHT + 1)
    ax.scatter(areas, range(len(areas)), color=PRIMARY, s=14 if named else 7)
    ax.axvline(areas.median(), color=GREY, linewidth=1, linestyle=":")
    ax.locator_params(axis="x", nbins=4)
    ax.set(xlabel=f"AUC within the {unit}", ylabel="" if named else f"{unit.capitalize()}s, sorted")
    ax.set_yticks(range(len(areas)) if named else [], areas.index if named else [])
    omitted = table["wsi"].nunique() - len(areas)
    caption = (
        f"{name}: {len(areas)} {unit}s, median {areas.median():.4f} (dotted), lowest {areas.iloc[0]:.4f} ({areas.index[0]}); "
        f"excluded, with one label only: {omitted}."
    )
    return Plot(figure, f"AUC of {name} by {unit}", caption)


@mpl.rc_context(STYLE)
def embedding(name: str, table: pd.DataFrame, keys: pd.Series, kind: str, mistakes: pd.DataFrame | None = None) -> Plot:
    """Return the points of `table` (x, y) by their `keys` (n,), labels or groups as `kind` says, with crosses on `mistakes`.

    The 10 most frequent keys are coloured, the others grey.
    """
    counts = keys.value_counts()
    coloured = sorted(counts.index[: len(GROUP_COLOURS)])
    layers = [("others", ~keys.isin(coloured), GREY)]
    layers += [(f"{key} ({counts[key]:,})", keys == key, colour) for key, colour in zip(coloured, GROUP_COLOURS, strict=False)]
    figure, ax = _panel(height=HEIGHT + 0.09 * len(layers))
    for text, inside, colour in layers:
        if inside.any():
            ax.plot(table["x"][inside], table["y"][inside], "o", color=colour, markersize=3, label=text)
    if mistakes is not None:
        ax.plot(mistakes["x"], mistakes["y"], "x", color=TEXT, markersize=5, label=f"mistake ({len(mistakes):,})")
    ax.set(xlabel="First principal component", ylabel="Second principal component", xticks=[], yticks=[])
    figure.legend(loc="outside lower center", ncols=2)
    return Plot(figure, f"Embedding of {name} by {kind}", f"{name}: {len(table):,} patches, {len(counts)} {kind}s.")


@mpl.rc_context(STYLE)
def correlation(names: list[str], probabilities: Floats) -> Plot:
    """Return Spearman's correlation between the rows of `probabilities` (runs, n) as an annotated heat map."""
    matrix = np.corrcoef(rankdata(probabilities, axis=1))
    count = len(names)
    size = max(WIDTH, 1.2 + 0.48 * count)
    figure, ax = _panel(size, size * 0.85)
    low = float(matrix.min())
    ax.pcolormesh(matrix, cmap="cividis", vmin=low, vmax=1)
    for row, column in np.ndindex(count, count):
        colour = "#000000" if matrix[row, column] > (low + 1) / 2 else "#ffffff"
        ax.text(column + 0.5, row + 0.5, f"{matrix[row, column]:.3f}", color=colour, ha="center", va="center")
    ticks = np.arange(count) + 0.5
    ax.set_xticks(ticks, names, rotation=30, ha="right")
    ax.set_yticks(ticks, names)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    pairs = matrix[np.triu_indices(count, 1)]
    ends = f"{pairs.min():.3f} to {pairs.max():.3f}"
    caption = f"Spearman's correlation of OOF probabilities: {ends}; the lower, the more a blend can gain."
    return Plot(figure, "Correlation between runs", caption)


@mpl.rc_context(STYLE)
def cv_versus_lb(ledger: pd.DataFrame) -> Plot:
    """Plot the scores of `ledger` (oof_auc, public_score, private_score; NaN where unknown); raises UserError without any."""
    figure, ax = _panel()
    counts = []
    for word, colour, marker in (("public", PRIMARY, "o"), ("private", SECONDARY, "^")):
        known = ledger.dropna(subset=["oof_auc", f"{word}_score"])
        if len(known):
            ax.scatter(known["oof_auc"], known[f"{word}_score"], color=colour, marker=marker, s=24, label=word)
            counts.append(f"{len(known)} with a {word} score")
    if not counts:
        raise UserError("no submission has a score of Kaggle")
    ax.set(xlabel="OOF AUC (CV)", ylabel="Kaggle score (LB)")
    ax.legend(loc="best")
    return Plot(figure, "Kaggle scores versus OOF AUC", f"Submissions: {', '.join(counts)}.")


def _mean_and_range(
    grid: Floats, curve: Curve, axes: tuple[str, str], oof: pd.DataFrame, reference: Reference, corner: Literal[0, 1]
) -> tuple[Figure, str]:
    """Return the figure of `curve` on `grid` over the folds of `oof`, and what its caption says about reference and inset.

    An inset enlarges the upper corner at x = `corner` if the mean enters it.
    """

    def folds(table: pd.DataFrame) -> Floats:
        parts = (part for _, part in table.groupby("fold"))
        return np.stack([curve(part["label"].to_numpy(), part["probability"].to_numpy()) for part in parts])

    figure, ax = _panel()
    curves = folds(oof)
    ax.set(xlabel=axes[0], ylabel=axes[1], xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    drawn, text = [ax], f" Grey and dashed: {reference[0]}." if reference else ""
    if (curves.mean(axis=0)[abs(grid - corner) <= CORNER] >= 1 - CORNER).any():
        start = corner * (1 - CORNER)
        inset = ax.inset_axes((0.36 - 0.22 * corner, 0.14, 0.6, 0.6), xlim=(start, start + CORNER), ylim=(1 - CORNER, 1))
        ax.indicate_inset((start, 1 - CORNER, CORNER, CORNER), edgecolor=GREY)
        drawn, text = [ax, inset], f"{text} Inset: the corner, enlarged."
    for each in drawn:
        each.fill_between(grid, curves.min(axis=0), curves.max(axis=0), color=PRIMARY, alpha=0.25, linewidth=0)
        each.plot(grid, curves.mean(axis=0), color=PRIMARY, linewidth=1.5)
        if reference:
            each.plot(grid, folds(reference[1]).mean(axis=0), color=GREY, linewidth=1.5, linestyle="--")
    return figure, text


def _histograms(parts: Mapping[str, tuple[Floats, int]], axes: tuple[str, str]) -> Figure:
    """Return the histograms of two arrays of probabilities, the counts of each divided by a number, on a logarithmic scale."""
    figure, ax = _panel()
    edges = np.linspace(0, 1, 41)
    for (word, (values, divisor)), colour, style in zip(parts.items(), (PRIMARY, SECONDARY), ("-", "--"), strict=True):
        heights = np.histogram(values, edges)[0] / divisor
        ax.stairs(heights, edges, color=colour, linewidth=1.5, linestyle=style, label=word)
        ax.stairs(heights, edges, color=colour, fill=True, alpha=0.15)
    ax.set_yscale("log")
    ax.set(xlabel=axes[0], ylabel=axes[1], xlim=(0, 1), ylim=(0.7 / max(divisor for _, divisor in parts.values()), None))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def _panel(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()
