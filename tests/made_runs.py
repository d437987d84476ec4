"""Runs with given out-of-fold predictions for the patches of 18 slides, in memory and as files."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.core.files import csv_bytes, file_sha256, sha256, write_csv
from pcam_kaggle.runs.fold import PREDICTIONS
from pcam_kaggle.runs.records import FoldMetrics, PredictionSources, PredictionsRecord, RunConfig
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.blend import RunPredictions, blend
from pcam_kaggle.scoring.intervals import PATCHES as EACH_PATCH
from pcam_kaggle.scoring.intervals import Clusters, joint_aucs, simultaneous_differences, unit_of
from pcam_kaggle.scoring.metrics import Floats, Labels
from pcam_kaggle.scoring.results import Difference

SLIDES, PATCHES, FOLDS, TESTS = 18, 40, 3, 50
N = SLIDES * PATCHES
SLIDE = np.repeat(np.arange(SLIDES), PATCHES)
FOLD = SLIDE % FOLDS
RNG = np.random.default_rng(0)
LABELS = (RNG.random(N) < RNG.uniform(0.2, 0.8, SLIDES)[SLIDE]).astype(int)
SHARED = RNG.normal(size=N)
IDS = np.array([f"p{n:04d}" for n in range(N)])
SLIDE_MAP = pd.DataFrame({"id": IDS, "wsi": [f"s{slide:02d}" for slide in SLIDE]})


def predictions(name: str, logits: Floats, scheme: str = "stratified_3_42") -> RunPredictions:
    """Return a run whose out-of-fold logits are `logits` (N,); its test predictions depend on its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    oof = pd.DataFrame({"id": IDS, "label": LABELS, "fold": FOLD, "probability": 1 / (1 + np.exp(-logits))})
    ids = [f"t{n:02d}" for n in range(TESTS)]
    tests = [pd.DataFrame({"id": ids, "probability": rng.random(TESTS)}) for _ in range(FOLDS)]
    return RunPredictions(name, oof, tests, scheme, sha256(csv_bytes(fold_table(scheme))), [])


def noisy(name: str, noise: float, seed: int) -> RunPredictions:
    """Return a run whose logits are the label plus independent Gaussian noise of SD `noise`."""
    return predictions(name, LABELS - 0.5 + noise * np.random.default_rng(seed).normal(size=N))


def by_slide(name: str, signal: float, seed: int, scheme: str = "slides_3_42") -> RunPredictions:
    """Return a run whose logits have a `signal` of the label and a random shift on every slide."""
    rng = np.random.default_rng(seed)
    logits = signal * LABELS + SHARED + 0.3 * rng.normal(size=N) + rng.normal(size=SLIDES)[SLIDE]
    return predictions(name, logits, scheme)


def fold_table(scheme: str) -> pd.DataFrame:
    """Return the fold file of `scheme`, with its groups if any."""
    table = pd.DataFrame({"id": IDS, "label": LABELS, "fold": FOLD})
    return table if scheme.startswith(("stratified", "given")) else table.assign(group=SLIDE_MAP["wsi"])


def write_run(
    work: Path, made: RunPredictions, order: Callable[[pd.DataFrame], pd.DataFrame] = pd.DataFrame.copy, **config: object
) -> Run:
    """Write `made` as a run that has predicted the folds in `made.oof`, the rows of its tables reordered by `order`."""
    run = Run(work / "runs" / made.name)
    write_csv(work / "folds" / f"{made.scheme}.csv", fold_table(made.scheme))
    fields = {"n_splits": FOLDS, **config}
    RunConfig(config=fields, folds=made.scheme, folds_sha256=made.folds_sha256).write(run.config_file)
    for number in made.oof["fold"].unique().tolist():
        folder = run.fold(number).folder
        inside = made.oof.loc[made.oof["fold"] == number, ["id", "label", "probability"]]
        for name, table in zip(PREDICTIONS, (inside, made.tests[number]), strict=True):
            write_csv(folder / name, order(table))
        files = {name: file_sha256(folder / name) for name in PREDICTIONS}
        PredictionsRecord(sources=PredictionSources(), files=files).write(folder / "predictions.json")
        metrics = FoldMetrics(fold=number, valid_auc=0.9, parameters=10, seconds=60.0, images_per_second=5.0)
        run.fold(number).write_metrics(metrics)
    return run


def write_blended_run(work: Path, made: RunPredictions, **config: object) -> Run:
    """Write `made` with its blended predictions and their score."""
    run = write_run(work, made, **config)
    unit = unit_of(made.scheme)
    run.write_blend(blend([made], "mean", Clusters.of(made.oof["id"], None if unit == "patch" else SLIDE_MAP, unit)))
    return run


def paired_difference(labels: Labels, scores: Floats, baseline: Floats, clusters: Clusters = EACH_PATCH) -> Difference:
    """Return AUC(scores) - AUC(baseline), tested alone."""
    return simultaneous_differences(joint_aucs(labels, np.stack([scores, baseline]), clusters), [(0, 1)])[0]
