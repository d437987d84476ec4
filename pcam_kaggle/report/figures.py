"""Figures of OOF probabilities: histogram, calibration, AUC by slide, correlation of runs, and CV versus LB."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import colormaps
from scipy.stats import rankdata

from pcam_kaggle.report.svg import GREY, HEIGHT, PRIMARY, SECONDARY, STYLE, WIDTH, Plot, make_plot, panel
from pcam_kaggle.scoring.metrics import Floats, auc, calibration_bins, calibration_error
from pcam_kaggle.scoring.results import Unit

MAX_NAMED_SLIDES = 30


@mpl.rc_context(STYLE)
def histogram(name: str, oof: pd.DataFrame) -> Plot:
    """Return the histogram of the OOF probabilities of `oof` (label, probability) by label, with logarithmic counts."""
    figure, ax = panel()
    edges = np.linspace(0, 1, 41)
    for label, colour, style, word in ((0, PRIMARY, "-", "no tumour"), (1, SECONDARY, "--", "tumour")):
        counts, _ = np.histogram(oof.loc[oof["label"] == label, "probability"], edges)
        ax.stairs(counts, edges, color=colour, linewidth=1.5, linestyle=style, label=word)
        ax.stairs(counts, edges, color=colour, fill=True, alpha=0.15)
    ax.set_yscale("log")
    ax.set(xlabel="OOF probability of tumour", ylabel="Patches", xlim=(0, 1), ylim=(0.7, None))
    ax.legend(loc="upper center", ncols=2)
    negatives = ((oof["label"] == 1) & (oof["probability"] < 0.5)).mean()
    positives = ((oof["label"] == 0) & (oof["probability"] >= 0.5)).mean()
    caption = f"{name}: at 0.5, {negatives:.1%} of all patches are false negatives and {positives:.1%} are false positives."
    return make_plot(figure, f"Histogram of OOF probabilities of {name} by label", caption)


@mpl.rc_context(STYLE)
def reliability(name: str, oof: pd.DataFrame) -> Plot:
    """Return the reliability diagram of `oof` (label, probability): fraction of positives by mean probability, in 15 bins."""
    figure, ax = panel()
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
    return make_plot(figure, f"Reliability diagram of {name}", caption)


@mpl.rc_context(STYLE)
def slide_aucs(name: str, oof: pd.DataFrame, slides: pd.DataFrame, unit: Unit = "slide") -> Plot | None:
    """Return the AUC within each slide, sorted.

    Args:
        name: The name of the run.
        oof: Columns id, label, probability.
        slides: The slide of each patch (id, wsi).
        unit: What a slide is called.

    Returns:
        The plot, or None where no slide has patches of both labels.
    """
    table = oof.merge(slides, on="id")
    both = table.groupby("wsi").filter(lambda part: part["label"].nunique() == 2)
    areas = pd.Series(
        {wsi: auc(part["label"].to_numpy(), part["probability"].to_numpy()) for wsi, part in both.groupby("wsi")}, dtype=float
    ).sort_values()
    if areas.empty:
        return None
    named = len(areas) <= MAX_NAMED_SLIDES
    figure, ax = panel(height=max(HEIGHT, 0.6 + 0.17 * len(areas)) if named else HEIGHT + 1)
    ax.scatter(areas, range(len(areas)), color=PRIMARY, s=14 if named else 7)
    ax.axvline(areas.median(), color=GREY, linewidth=1, linestyle=":")
    ax.set(xlabel=f"AUC within the {unit}", ylabel="" if named else f"{unit.capitalize()}s, sorted")
    ax.set_yticks(range(len(areas)) if named else [], areas.index if named else [])
    omitted = slides.loc[slides["id"].isin(oof["id"]), "wsi"].nunique() - len(areas)
    caption = (
        f"{name}: {len(areas)} {unit}s, median {areas.median():.4f} (dotted), lowest {areas.iloc[0]:.4f} ({areas.index[0]}); "
        f"excluded, with one label only: {omitted}."
    )
    return make_plot(figure, f"AUC of {name} by {unit}", caption)


@mpl.rc_context(STYLE)
def correlation(names: list[str], probabilities: Floats) -> Plot:
    """Return Spearman's correlation between the rows of `probabilities` (runs, n) as an annotated heat map.

    It is undefined (n/a) for a run whose predictions are all equal.
    """
    with np.errstate(invalid="ignore"):
        matrix = np.corrcoef([rankdata(row) for row in probabilities])
    count = len(names)
    size = max(WIDTH, 1.2 + 0.48 * count)
    figure, ax = panel(size, size * 0.85)
    low = float(np.nanmin(matrix, initial=1))
    colours = colormaps["cividis"]((matrix - low) / max(1e-9, 1 - low))
    ax.pcolormesh(matrix, cmap="cividis", vmin=low, vmax=1)
    for row in range(count):
        for column in range(count):
            bright = colours[row, column, :3] @ (0.299, 0.587, 0.114) > 0.5
            colour = "#000000" if bright else "#ffffff"
            ax.text(column + 0.5, row + 0.5, _number(matrix[row, column]), color=colour, ha="center", va="center")
    ticks = np.arange(count) + 0.5
    ax.set_xticks(ticks, names, rotation=30, ha="right")
    ax.set_yticks(ticks, names)
    ax.tick_params(length=0)
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    pairs = matrix[np.triu_indices(count, 1)]
    defined = pairs[~np.isnan(pairs)]
    ends = " to ".join(_number(pair) for pair in (np.sort(defined)[[0, -1]] if len(defined) else [np.nan]))
    caption = f"Spearman's correlation of OOF probabilities: {ends}; the lower, the more a blend can gain."
    if len(defined) < len(pairs):
        caption += " n/a: all predictions of a run are equal."
    return make_plot(figure, "Correlation between runs", caption)


@mpl.rc_context(STYLE)
def cv_versus_lb(ledger: pd.DataFrame) -> Plot:
    """Plot Kaggle scores over OOF AUC; `ledger` has oof_auc, public_score, private_score, NaN where unknown."""
    figure, ax = panel()
    parts = []
    for column, colour, marker, word in (
        ("public_score", PRIMARY, "o", "public"),
        ("private_score", SECONDARY, "^", "private"),
    ):
        known = ledger.dropna(subset=["oof_auc", column])
        if known.empty:
            continue
        ax.scatter(known["oof_auc"], known[column], color=colour, marker=marker, s=24, label=word)
        text = f"{word}: {len(known)} submission{'s' if len(known) > 1 else ''}"
        parts.append(text)
    ax.set(xlabel="OOF AUC (CV)", ylabel="Kaggle score (LB)")
    ax.legend(loc="best")
    caption = "; ".join(parts)
    return make_plot(figure, "Kaggle scores versus OOF AUC", f"{caption[:1].upper()}{caption[1:]}.")


def _number(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{value:.3f}"
