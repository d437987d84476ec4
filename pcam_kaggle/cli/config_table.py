"""The config of an experiment as a table for people: value, allowed values and meaning of each field."""

import dataclasses
import json
import shutil
from itertools import zip_longest
from textwrap import wrap

from pcam_kaggle.core.config import FIELDS, Config, allowed
from pcam_kaggle.core.experiments import Experiment

COLUMNS = ("field", "value", "allowed", "meaning")
# The first field of each group, in the order of the fields.
GROUPS = {"groups": "folds", "model": "model", "stain_jitter": "augmentation", "epochs": "training", "tta": "prediction"}
ALLOWED_WIDTH = 21
LEAST_MEANING_WIDTH = 24


def config_table(config: Config) -> list[tuple[str, str, str, str]]:
    """Return (field, value, allowed values, meaning) of each field of `config`, in the order of the fields."""
    rows = []
    for name, value in dataclasses.asdict(config).items():
        text = value if isinstance(value, str) and value else json.dumps(value)
        rows.append((name, text, allowed(name), " ".join((FIELDS[name].description or "").split())))
    return rows


def render_config(experiment: Experiment, width: int | None = None) -> str:
    """Return the fields of `experiment` as aligned columns under a heading per group; of a blend, those of the folds.

    Lines have `width` characters, by default those of the terminal, or as many as the columns need.
    """
    width = width or shutil.get_terminal_size(fallback=(128, 24)).columns
    rows = config_table(experiment.config)
    widths = [max(len(row[column]) for row in (COLUMNS, *rows)) for column in range(2)]
    widths += [ALLOWED_WIDTH, max(width - sum(widths) - ALLOWED_WIDTH - 8, LEAST_MEANING_WIDTH)]
    lines = wrap(experiment.purpose, width)
    if experiment.members:
        lines += wrap(f"blend of {', '.join(experiment.members)}, each with its own config", width)
    lines.append("")
    for row in (COLUMNS, *rows):
        heading = GROUPS.get(row[0])
        if experiment.members and heading == "model":
            break
        lines += [heading] if heading else []
        cells = [wrap(cell, width) for cell, width in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append("  " + "  ".join(f"{part:{width}}" for part, width in zip(parts, widths, strict=True)).rstrip())
    return "".join(f"{line}\n" for line in lines)
