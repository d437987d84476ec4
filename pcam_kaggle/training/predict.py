"""Predictions of each fold's net: out of fold for its validation patches, and for the test set."""

import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import file_sha256, locked, write_csv, write_json
from pcam_kaggle.data.csv_io import PREDICTIONS
from pcam_kaggle.data.folds import Folds
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.runs.run import sources
from pcam_kaggle.training import tta
from pcam_kaggle.training.device import Backend, spread
from pcam_kaggle.training.distributed import agreed, in_turn, rank, size
from pcam_kaggle.training.engine import adapt_norms, predict_logits
from pcam_kaggle.training.train import load_best, run_backend


def predict(run: Path, config: Config, store: PatchStore, folds: Folds, chosen: list[int]) -> None:
    """Write `oof.csv` (id, label, probability) and `test.csv` (id, probability) for the trained folds in `chosen`.

    Probabilities are the average over the config's views. `predictions.json` holds the hashes of both tables and of what
    they were made of. Of several processes of one world each takes its share of the folds.

    Raises UserError where another process works in `run`.
    """
    with locked(run) if rank() == 0 else nullcontext():
        with in_turn():
            backend = run_backend(run, config, store)
        spread(partial(_predict_share, run, config, store, folds.table, backend), chosen[rank() :: size()])
        agreed(None)


def _predict_share(
    run: Path, config: Config, store: PatchStore, table: pd.DataFrame, backend: Backend, share: list[int]
) -> None:
    for fold in share:
        folder = run / f"fold_{fold}"
        net = load_best(folder, config, backend)
        valid = table[(table["fold"] == fold) & table["id"].isin(store.ids("train"))]
        start = time.perf_counter()
        oof = _probabilities(net, store, "train", valid["id"].to_numpy(), config, backend)
        test = _probabilities(net, store, "test", store.ids("test"), config, backend)
        write_csv(folder / "oof.csv", oof.merge(valid[["id", "label"]], on="id")[["id", "label", "probability"]])
        write_csv(folder / "test.csv", test)
        files = {name: file_sha256(folder / name) for name in PREDICTIONS}
        seconds = time.perf_counter() - start
        made = {
            "sources": sources(folder, store),
            "files": files,
            "images_per_second": round((len(oof) + len(test)) / seconds, 1),
        }
        write_json(folder / "predictions.json", made)
        print(f"predict: fold {fold}, {len(oof):,} out of fold, {len(test):,} test", flush=True)


def _probabilities(
    net: nn.Module, store: PatchStore, split: str, ids: np.ndarray, config: Config, backend: Backend
) -> pd.DataFrame:
    rows = store.rows(split, ids)
    if config.norm == "test":
        adapt_norms(net, store, rows, config, backend)
    logits = predict_logits(net, store, rows, config, backend, config.tta, f"predict {split}")
    return pd.DataFrame({"id": ids, "probability": tta.average(logits, config.tta_mean).numpy()})
