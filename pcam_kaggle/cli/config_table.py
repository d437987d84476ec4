"""The config of an experiment as a table for people: value, allowed values and meaning of each field."""

import dataclasses
import json
import shutil
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from pcam_kaggle.core.config import FIELDS, Config, allowed
from pcam_kaggle.core.experiments import Experiment

COLUMNS = ("field", "value", "allowed", "meaning")
# The first field of each group, in the order of the fields.
GROUPS = {"groups": "folds", "model": "model", "stain_jitter": "augmentation", "epochs": "training", "tta": "prediction"}
ALLOWED_WIDTH = 21
LEAST_MEANING_WIDTH = 24

Row = tuple[str, str, str, str]


def config_table(config: Config) -> list[Row]:
    """Return (field, value, allowed values, meaning) of each field of `config`, in the order of the fields."""
    return [
        (name, _text(value), allowed(name), " ".join((FIELDS[name].description or "").split()))
        for name, value in dataclasses.asdict(config).items()
    ]


def render_config(experiment: Experiment, width: int | None = None) -> str:
    """Return the fields of `experiment` as aligned columns under a heading per group.

    Args:
        experiment: The experiment. Of a blend, only the fields of the folds are shown: the others are those of its members.
        width: Characters per line, at least what the columns need; by default the width of the terminal.
    """
    width = width or shutil.get_terminal_size(fallback=(128, 24)).columns
    rows = config_table(experiment.config)
    widths = [max(len(row[column]) for row in (COLUMNS, *rows)) for column in range(2)]
    widths += [ALLOWED_WIDTH, max(width - sum(widths) - ALLOWED_WIDTH - 8, LEAST_MEANING_WIDTH)]
    lines = wrap(experiment.purpose, width)
    if experiment.members:
        lines += wrap(f"blend of {', '.join(experiment.members)}, each with its own config", width)
    lines += ["", *_lines(COLUMNS, widths)]
    for row in rows:
        heading = GROUPS.get(row[0])
        if experiment.members and heading == "model":
            break
        lines += ([heading] if heading else []) + _lines(row, widths)
    return "".join(f"{line}\n" for line in lines)


def _lines(row: Row, widths: list[int]) -> list[str]:
    cells = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
    return [
        "  " + "  ".join(f"{part:{width}}" for part, width in zip(parts, widths, strict=True)).rstrip()
        for parts in zip_longest(*cells, fillvalue="")
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
