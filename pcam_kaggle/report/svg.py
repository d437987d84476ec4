"""Matplotlib figures as inline `<svg>` elements with the fonts and colours of the page, in light and dark mode."""

import hashlib
import html
import io
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Placeholders, which `make_plot` replaces with the text colour and the CSS variables of the page.
TEXT, PRIMARY, SECONDARY, GREY = "#010203", "#0072b2", "#d55e00", "#7f7f7f"
PAGE_COLOURS = {TEXT: "currentColor", PRIMARY: "var(--primary)", SECONDARY: "var(--secondary)", GREY: "var(--grey)"}
# Inches of 96 px. A panel fits a phone without scaling its text.
WIDTH, HEIGHT = 3.7, 3.1
STYLE: "dict[RcKeyType, Any]" = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


class Plot(NamedTuple):
    """An `<svg>` element with a text alternative, and the caption below it."""

    svg: str
    caption: str


def panel(width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """Return a figure of `width` by `height` inches and its only axes."""
    figure = Figure((width, height), layout="constrained")
    return figure, figure.add_subplot()


def make_plot(figure: Figure, title: str, caption: str) -> Plot:
    """Return `figure`, drawn with `STYLE`, as a plot; `title` must be unique in the page, since the ids derive from it."""
    prefix = f"f{hashlib.sha256(title.encode()).hexdigest()[:8]}-"
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g) id="[^"]*"', r"\1", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="|\bhref="#|\burl\(#', lambda found: found.group() + prefix, svg)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    # Two decimals of a point are enough for any screen and reduce the size by two thirds.
    svg = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), svg)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    alternative = html.escape(f"{title}. {caption}")
    head = f'<svg role="img" aria-label="{alternative}" width="{width}" height="{height}"'
    svg = re.sub(r'<svg xmlns:xlink="[^"]*" width="[^"]*" height="[^"]*"', lambda _: head, svg, count=1)
    opening, _, rest = svg.partition(">\n")
    return Plot(f"{opening}><title>{html.escape(title)}</title>{rest}", caption)
