"""The page of what was measured: figures are kept in speeds/, RESULTS.md is written from them."""

import math
import os
import re
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from pcam_kaggle.config.experiments import experiment
from pcam_kaggle.data.atomic_io import read_json, write, write_json
from pcam_kaggle.runs.provenance import versions
from pcam_kaggle.training.device import device_name, find_device

HERE = Path(__file__).parent
SEEN = HERE / "speeds"
TEXT = SEEN / "text.md"
PAGE = HERE / "RESULTS.md"
TRAIN_PATCHES, TEST_PATCHES = 220_025, 57_458
# GB/s of a GPU's memory, by NVIDIA's data sheets.
PEAKS = {"NVIDIA H200": 4800, "NVIDIA H100 80GB HBM3": 3350, "Tesla T4": 320}

PEERS = ("loop", "lightning", "fastai", "timm")
# Patterns of kinds of work: peers as people use them, and with every switch on.
AS_USED, SWITCHED = "|".join(PEERS), ".+, every switch"
# What is compared across machines: section, keys of its rows, and the kinds of work of which the one nearest to ours counts.
COMPARED = {
    "training `bottleneck`, the limit": ("training", ("bottleneck", "rows"), "limit"),
    "`bottleneck`, the best peer as used": ("training", ("bottleneck", "rows"), AS_USED),
    "`bottleneck`, the best with every switch": ("training", ("bottleneck", "rows"), SWITCHED),
    "training `plain`, the limit": ("training", ("plain", "rows"), "limit"),
    "`plain`, the best peer as used": ("training", ("plain", "rows"), AS_USED),
    "`plain`, the best with every switch": ("training", ("plain", "rows"), SWITCHED),
    "TIFs to submission, the fastest peer as used": ("pipeline", ("rows",), AS_USED),
    "TIFs to submission, a loop with every switch": ("pipeline", ("rows",), SWITCHED),
    "prediction with eight views, ttach as used": ("prediction", (), "ttach"),
    "prediction, ttach with every switch": ("prediction", (), "ttach, every switch"),
    "prepare, `cv2.imread` alone": ("prepare", ("rows",), "cv2"),
}

# By kind of work: `rates`, how many a second in each turn, and `ratios`, ours as a multiple of it.
Rows = dict[str, dict[str, list[float]]]


def keep(section: str, seen: dict[str, Any]) -> None:
    """Keep what was `seen` in `section`, with the machine that it was seen on."""
    write_json(SEEN / f"{section}.json", {"machine": machine(), "seen": seen})


def machine() -> str:
    """Return the machine in words."""
    model = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ""
    )
    packages = versions()
    kind = find_device()
    return f"{os.cpu_count()} cores of {model}; {device_name(kind)}; torch {packages['torch']}"


def training_table(seen: dict[str, Any]) -> str:
    """Return the images/s of training each net, and ours as a multiple of each."""
    return "\n\n".join(f"`{name}`, ours in {each['backend']}:\n\n{rates_table(each['rows'])}" for name, each in seen.items())


def pipeline_table(seen: dict[str, Any]) -> str:
    """Return the seconds end to end, and theirs as a multiple of ours."""
    lines = [
        (kind, f"{1 / middle(row['rates']):.0f}", f"{middle(row['ratios']):.2f}", f"{seen['auc'][kind]:.4f}")
        for kind, row in seen["rows"].items()
    ]
    return markdown(("by", "seconds", "times ours", "OOF AUC"), lines)


def rates_table(rows: Rows) -> str:
    """Return how much each kind of work does a second, and ours as a multiple of each."""
    lines = [
        (kind, f"{middle(row['rates']):,.0f}", spread(row["ratios"]) if kind != "ours" else "") for kind, row in rows.items()
    ]
    return markdown(("by", "a second", "ours is times that (quartiles of the turns)"), lines)


def contention_table(seen: dict[str, dict[str, list[float]]]) -> str:
    """Return the images/s of our training and of a plain loop beside other programs, median and range over rounds."""
    lines = []
    for situation, rates in seen.items():
        shown = [f"{np.median(each):.0f} ({min(each):.0f} to {max(each):.0f})" for each in rates.values()]
        ratios = np.divide(rates["ours"], rates["loop"])
        lines.append((situation, *shown, f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"))
    return markdown(("beside it", "ours", "plain loop, fully tuned", "ratio"), lines)


def memory_table(seen: dict[str, Any]) -> str:
    """Return the peak memory of each stage's largest process."""
    lines = [(stage, f"{held / 1e9:.2f}") for stage, held in seen.items()]
    return markdown(("stage", "peak memory, GB"), lines)


def machines_table() -> str:
    """Return ours as a multiple of what it is compared with, here and, the least and the most, in the runs kept by machine."""
    runs = {"here": [nearest(SEEN)]}
    for file in sorted(SEEN.glob("*/*/training.json")):
        runs.setdefault(file.parts[-3], []).append(nearest(file.parent))
    lines = [(what, *(extent([run[what] for run in each if what in run]) for each in runs.values())) for what in COMPARED]
    return markdown(("against", *(f"{name} ({len(each)})" for name, each in runs.items())), lines)


def nearest(run: Path) -> dict[str, float]:
    """Return what a `run` gave for each comparison across machines; it may lack a section."""
    found = {}
    for what, (section, keys, kinds) in COMPARED.items():
        if (file := run / f"{section}.json").exists():
            rows: Rows = reduce(dict.__getitem__, keys, read_json(file)["seen"])
            found[what] = min(middle(row["ratios"]) for kind, row in rows.items() if re.fullmatch(kinds, kind))
    return found


def extent(ratios: list[float]) -> str:
    """Return the least and the most of `ratios`, once where they do not differ."""
    ordered = sorted(ratios)
    return " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in ordered[:1] + ordered[-1:]))


def gpu_table(seen: dict[str, Any]) -> str:
    """Return the images/s on the GPU, and a rough estimate of the hours that the whole competition takes two T4.

    A forward pass counts as a third of a step, kernels take longer as memory is slower, and one T4 has one fold more.
    """
    lines, sums = [], []
    for name, each in seen.items():
        config, rows, busy = experiment(name).config, each["rows"], each["busy"]
        gpu, computed = each["backend"].split(", ", 1)
        ours, limit = (middle(rows[kind]["rates"]) for kind in ("ours", "limit"))
        lines.append((f"`{name}`", computed, f"{limit:,.0f}", f"{ours:,.0f}", spread(rows["limit"]["ratios"]), f"{busy:.0%}"))
        trained = config.epochs * (config.n_splits - 1) * TRAIN_PATCHES
        validated = config.epochs * TRAIN_PATCHES
        predicted = config.tta * (TRAIN_PATCHES + config.n_splits * TEST_PATCHES)
        steps = trained + (validated + predicted) / 3
        # The GPU was watched while both ran.
        both = 2 / (1 / ours + 1 / limit)
        slower = PEAKS.get(gpu, math.nan) / PEAKS["Tesla T4"]
        rate = both / busy / slower
        larger = math.ceil(config.n_splits / 2)
        sums.append(
            (
                f"`{name}`",
                f"{config.epochs} x {config.n_splits - 1} x {TRAIN_PATCHES:,} + ({config.epochs} x {TRAIN_PATCHES:,} + "
                f"{config.tta} x ({TRAIN_PATCHES:,} + {config.n_splits} x {TEST_PATCHES:,})) / 3 = {steps / 1e6:.1f} million",
                f"{both:,.0f} / {busy:.3f} / {slower:.1f} = {rate:,.0f}",
                f"{larger} / {config.n_splits} x {steps / 1e6:.1f} million / {rate:,.0f} = "
                f"{larger / config.n_splits * steps / rate / 3600:.1f} h",
            )
        )
    measured = markdown(("net", "in", "limit, images/s", "ours, images/s", "ours of the limit", "the GPU is busy"), lines)
    head = ("net", "images that are trained on, a forward pass as a third", "images/s of a T4", "the larger half of the folds")
    return f"{measured}\n\n{markdown(head, sums)}"


def middle(values: list[float]) -> float:
    """Return the mean of the middle half of `values`: steadier than the median, as blind to a moment of other work."""
    return float(trim_mean(values, 0.25))


def spread(ratios: list[float]) -> str:
    """Return the mean of the middle half of `ratios`, and their quartiles."""
    low, high = np.quantile(ratios, (0.25, 0.75))
    return f"{middle(ratios):.2f} ({low:.2f} to {high:.2f})"


def markdown(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *lines])


def growth_table(seen: dict[str, Any]) -> str:
    """Return seconds and peak memory of each stage at both sizes."""
    lines = []
    for stage, (seconds, memory) in seen["full"].items():
        tenth, less = seen["tenth"][stage]
        lines.append(
            (stage, f"{tenth:.1f}", f"{seconds:.1f}", f"{seconds / tenth:.1f}", f"{less / 1e9:.2f}", f"{memory / 1e9:.2f}")
        )
    return markdown(("stage", "s, a tenth", "s, full size", "grows by", "GB, a tenth", "GB, full size"), lines)


def page() -> str:
    """Write RESULTS.md from what was measured last and return it."""
    files = {file.stem: read_json(file) for file in SEEN.glob("*.json")}
    tables: dict[str, Callable[[dict[str, Any]], str]] = {
        "training": training_table,
        "pipeline": pipeline_table,
        "prediction": rates_table,
        "contention": contention_table,
        "prepare": lambda seen: rates_table(seen["rows"]),
        "memory": lambda seen: memory_table(seen["memory"]),
        "gpu": gpu_table,
        "full": growth_table,
    }
    made = {"machines": machines_table()}
    for name, table in tables.items():
        source = files.get("prepare" if name == "memory" else name)
        made[name] = f"On {source['machine']}.\n\n{table(source['seen'])}" if source else "Not measured yet."
    text = TEXT.read_text().format(**made)
    write(PAGE, lambda file: file.write(text.encode()))
    return text
