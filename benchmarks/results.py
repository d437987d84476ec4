"""Markdown tables of measurements, written between markers into RESULTS.md and SCORES.md."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import write
from pcam_kaggle.runs.provenance import commit, versions
from pcam_kaggle.training.device import device_name, find_device

RESULTS = Path(__file__).parent / "RESULTS.md"

# By implementation: the value of each round.
Values = dict[str, list[float]]


def replace_block(page: Path, name: str, text: str) -> None:
    """Replace the text of `page` between the markers `<!-- name -->` and `<!-- end -->`.

    Raises:
        UserError: If the page has no such markers.
    """
    block = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    written, count = block.subn(lambda found: f"{found[1]}{text}\n{found[2]}", page.read_text())
    if count != 1:
        raise UserError(f"{page}: has no lines <!-- {name} --> and <!-- end --> around its table; restore them")
    write(page, lambda file: file.write(written.encode()))


def markdown(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *lines])


def spread(values: list[float], form: str) -> str:
    """Return the median and the range of `values`, formatted by `form`; a single value has no range."""
    low, middle, high = (format(value, form) for value in np.quantile(values, (0, 0.5, 1)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def comparison(unit: str, values: Values) -> str:
    """Return a table of rates, or of seconds where that is the `unit`, and of how many times as fast `ours` is, by round."""
    lines = []
    for name, each in values.items():
        pair = (each, values["ours"]) if unit == "seconds" else (values["ours"], each)
        ratio = "" if name == "ours" else spread(list(np.divide(*pair)), ".2f")
        lines.append((name, spread(each, ",.0f"), ratio))
    return markdown(("implementation", unit, "ours is faster by a factor of"), lines)


def provenance() -> str:
    """Return the commit and the machine that figures are measured on."""
    processor = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text())
    cores = f"{os.cpu_count()} cores" + (f" of {processor[1]}" if processor else "")
    machine = f"{cores}; {device_name(find_device())}; torch {versions()['torch']}"
    made = commit() or "unknown"
    return f"Commit `{made[:7]}{'+' if made.endswith('+') else ''}`, {machine}."
