"""What OOF probabilities look like: by label, calibrated or not, by slide, between runs, and against Kaggle's scores."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray
from scipy import stats

from pcam_kaggle.report.svg import FIRST, GREY, HEIGHT, SECOND, STYLE, WIDTH, Plot, make_plot, panel
from pcam_kaggle.scoring.metrics import Unit, auc, midranks

Floats = NDArray[np.float64]
Labels = NDArray[np.integer]
BINS = 15
SLIDES_NAMED = 30
LEAST_RANKED = 4


@mpl.rc_context(STYLE)
def histogram(name: str, oof: pd.DataFrame) -> Plot:
    """Return the histogram of OOF probabilities by label, counts on a logarithmic axis."""
    figure, ax = panel()
    edges = np.linspace(0, 1, 41)
    for label, colour, style, word in ((0, FIRST, "-", "no tumour"), (1, SECOND, "--", "tumour")):
        counts, _ = np.histogram(oof.loc[oof["label"] == label, "probability"], edges)
        ax.stairs(counts, edges, color=colour, linewidth=1.5, linestyle=style, label=word)
        ax.stairs(counts, edges, color=colour, fill=True, alpha=0.15)
    ax.set_yscale("log")
    ax.set(xlabel="OOF probability of tumour", ylabel="Patches", xlim=(0, 1), ylim=(0.7, None))
    ax.legend(loc="upper center", ncols=2)
    missed = ((oof["label"] == 1) & (oof["probability"] < 0.5)).mean()
    raised = ((oof["label"] == 0) & (oof["probability"] >= 0.5)).mean()
    said = f"{name}: at 0.5, {missed:.1%} of all patches are tumour missed and {raised:.1%} are false alarms."
    return make_plot(figure, f"Histogram of OOF probabilities of {name} by label", said)


def calibration_error(labels: Labels, probabilities: Floats) -> float:
    """Return the expected calibration error of `probabilities` (n,) in 15 bins of equal width (Guo et al. 2017, equation 3)."""
    bins = _calibration(labels, probabilities)
    return float((bins["size"] * (bins["label"] - bins["probability"]).abs()).sum() / bins["size"].sum())


@mpl.rc_context(STYLE)
def reliability(name: str, oof: pd.DataFrame) -> Plot:
    """Return the reliability diagram: share of tumour against mean probability in 15 bins of equal width."""
    figure, ax = panel()
    labels, values = oof["label"].to_numpy(), oof["probability"].to_numpy()
    bins = _calibration(labels, values)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":")
    # 95 % of a share's draws, were the mean probability true: what lies outside is more than noise.
    mean = bins["probability"]
    half = 1.96 * np.sqrt(mean * (1 - mean) / bins["size"])
    ax.fill_between(mean, (mean - half).clip(0), (mean + half).clip(upper=1), color=GREY, alpha=0.25, linewidth=0)
    ax.plot(mean, bins["label"], color=FIRST, linewidth=1.5, marker="o", markersize=4)
    ax.set(xlabel="Mean OOF probability", ylabel="Share of tumour", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    error = calibration_error(labels, values)
    said = f"{name}: expected calibration error {error:.4f}; grey: 95 % of calibrated draws (unit: patch)."
    return make_plot(figure, f"Reliability diagram of {name}", said)


@mpl.rc_context(STYLE)
def slide_aucs(name: str, oof: pd.DataFrame, slides: pd.DataFrame, unit: Unit = "slide") -> Plot | None:
    """Return the AUC within each of `slides` (id, wsi), called `unit`, sorted; None where none has patches of both labels."""
    table = oof.merge(slides, on="id")
    both = table.groupby("wsi").filter(lambda part: part["label"].nunique() == 2)
    areas = pd.Series(
        {wsi: auc(part["label"].to_numpy(), part["probability"].to_numpy()) for wsi, part in both.groupby("wsi")}, dtype=float
    ).sort_values()
    if areas.empty:
        return None
    named = len(areas) <= SLIDES_NAMED
    figure, ax = panel(height=max(HEIGHT, 0.6 + 0.17 * len(areas)) if named else HEIGHT + 1)
    ax.scatter(areas, range(len(areas)), color=FIRST, s=14 if named else 7)
    ax.axvline(areas.median(), color=GREY, linewidth=1, linestyle=":")
    ax.set(xlabel=f"AUC within the {unit}", ylabel="" if named else f"{unit.capitalize()}s, sorted")
    ax.set_yticks(range(len(areas)) if named else [], areas.index if named else [])
    omitted = slides.loc[slides["id"].isin(oof["id"]), "wsi"].nunique() - len(areas)
    said = f"{name}: {len(areas)} {unit}s, median {areas.median():.4f} (dotted), lowest {areas.iloc[0]:.4f} ({areas.index[0]})"
    return make_plot(figure, f"AUC of {name} by {unit}", f"{said}; left out for having one label only: {omitted}.")


@mpl.rc_context(STYLE)
def correlation(names: list[str], probabilities: Floats) -> Plot:
    """Return Spearman's correlation between the rows of `probabilities` (runs, n) as a heat map with its numbers.

    That of a run whose predictions are all equal is undefined, n/a.
    """
    with np.errstate(invalid="ignore"):
        matrix = np.corrcoef([midranks(row) for row in probabilities])
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
    said = f"Spearman's, of OOF probabilities: {ends}; the lower, the more a blend can gain."
    if len(defined) < len(pairs):
        said += " n/a: all predictions of a run are equal."
    return make_plot(figure, "Heat map of the correlation between runs", said)


@mpl.rc_context(STYLE)
def cv_against_lb(ledger: pd.DataFrame) -> Plot:
    """Return Kaggle's scores against the OOF AUC; `ledger` has name, oof_auc, public_score, private_score, NaN if unknown."""
    figure, ax = panel()
    said = []
    for column, colour, marker, word in (("public_score", FIRST, "o", "public"), ("private_score", SECOND, "^", "private")):
        known = ledger.dropna(subset=["oof_auc", column])
        if known.empty:
            continue
        ax.scatter(known["oof_auc"], known[column], color=colour, marker=marker, s=24, label=word)
        text = f"{word}: {len(known)} submission{'s' if len(known) > 1 else ''}"
        if len(known) >= LEAST_RANKED:
            varied = known[["oof_auc", column]].nunique().min() > 1
            ranked = f"{stats.spearmanr(known['oof_auc'], known[column]).statistic:.2f}" if varied else "n/a (all scores equal)"
            text += f", Spearman's rank correlation {ranked}"
        said.append(text)
    ax.set(xlabel="OOF AUC (CV)", ylabel="Kaggle's score (LB)")
    ax.legend(loc="best")
    caption = "; ".join(said)
    return make_plot(figure, "Kaggle's scores against the OOF AUC", f"{caption[:1].upper()}{caption[1:]}.")


def _number(value: float) -> str:
    return "n/a" if np.isnan(value) else f"{value:.3f}"


def _calibration(labels: Labels, probabilities: Floats) -> pd.DataFrame:
    table = pd.DataFrame({"label": labels, "probability": probabilities})
    bins = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    return table.groupby(bins).agg(label=("label", "mean"), probability=("probability", "mean"), size=("label", "size"))
