"""The page of what was measured: figures are kept in speeds/, RESULTS.md is written from them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pcam_kaggle.artifacts import read_json, write, write_json
from pcam_kaggle.device import device_name, find_device
from pcam_kaggle.experiments import experiment
from pcam_kaggle.provenance import versions

HERE = Path(__file__).parent
SEEN = HERE / "speeds"
TEXT = SEEN / "text.md"
PAGE = HERE / "RESULTS.md"
TRAIN_PATCHES = 220_025


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
    """Return the images/s of training, and ours as a multiple of each."""
    lines = []
    for name in (key for key in seen if " " not in key):
        for kind, speeds in seen[name].items():
            if kind == "ratio":
                continue
            ratios = seen[name]["ratio"] if kind == "limit" else np.array(seen[name]["ours"]) / np.array(speeds)
            lines.append((f"`{name}`", kind, f"{np.median(speeds):.0f}", spread(ratios) if kind != "ours" else ""))
    return markdown(("net", "trained by", "images/s", "ours is times that (least to most of the rounds)"), lines)


def pipeline_table(seen: dict[str, Any]) -> str:
    """Return the seconds end to end, and theirs as a multiple of ours."""
    ours = seen["ours"]["seconds"]
    lines = [
        (kind, f"{each['seconds']:.0f}", f"{each['seconds'] / ours:.2f}", f"{each['auc']:.4f}") for kind, each in seen.items()
    ]
    return markdown(("by", "seconds", "times ours", "OOF AUC"), lines)


def rates_table(rates: dict[str, list[float]]) -> str:
    """Return the patches/s of each kind of work, and ours as a multiple of each."""
    lines = [
        (kind, f"{np.median(each):,.0f}", spread(np.array(rates["ours"]) / np.array(each)) if kind != "ours" else "")
        for kind, each in rates.items()
    ]
    return markdown(("by", "patches/s", "ours is times that (least to most of the rounds)"), lines)


def memory_table(seen: dict[str, Any]) -> str:
    """Return the peak memory of each stage's first process."""
    lines = [(kind, f"{seen[kind] / 1e9:.2f}") for kind in seen if kind not in ("rates", "store")]
    return markdown(("stage", "peak memory, GB"), lines)


def gpu_table(seen: dict[str, Any]) -> str:
    """Return the images/s on the GPU, and the hours that training all folds of the whole competition takes two of them."""
    lines = []
    for name, rates in seen.items():
        config = experiment(name).config
        images = config.epochs * (config.n_splits - 1) * TRAIN_PATCHES
        hours = images / (2 * rates["ours"]) / 3600
        sum_of_it = (
            f"{config.epochs} epochs x {config.n_splits - 1} x {TRAIN_PATCHES:,} / (2 x {rates['ours']:,.0f}) s = {hours:.1f} h"
        )
        lines.append((f"`{name}`", f"{rates['limit']:,.0f}", f"{rates['ours']:,.0f}", f"{rates['ratio']:.2f}", sum_of_it))
    return markdown(("net", "limit, images/s", "ours, images/s", "the GPU is busy", "training on two of them"), lines)


def spread(ratios: Any) -> str:
    """Return the median of `ratios` and their range."""
    return f"{np.median(ratios):.2f} ({np.min(ratios):.2f} to {np.max(ratios):.2f})"


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
        "prepare": lambda seen: rates_table(seen["rates"]),
        "memory": memory_table,
        "gpu": gpu_table,
        "full": growth_table,
    }
    made = {}
    for name, table in tables.items():
        source = files.get("prepare" if name == "memory" else name)
        made[name] = f"On {source['machine']}.\n\n{table(source['seen'])}" if source else "Not measured yet."
    text = TEXT.read_text().format(**made)
    write(PAGE, lambda file: file.write(text.encode()))
    return text
