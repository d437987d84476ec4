"""Features of all patches under a frozen model, computed once and kept on the disk beside the patch store."""

import inspect
import itertools
import json
import logging
import time
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked, sha256, write
from pcam_kaggle.core.logs import progress
from pcam_kaggle.data.labelled import Patches
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models import backbone, cnn, factory, timm_model, weights
from pcam_kaggle.runs.provenance import versions
from pcam_kaggle.training import augment, device, engine, tta
from pcam_kaggle.training.budget import ENDLESS, Budget
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.gpus import round_robin, run_on_gpus

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
# Patches whose features are written together; an interrupted embedding continues after the last of them.
CHUNK = 16 * engine.PREDICT_BATCH
# The fields and modules that features depend on.
FEATURE_FIELDS = ("model", "model_args", "weights", "side", "resize", "pool", "tta", "tta_shift", "chroma_blur", "norm")
CODE: tuple[ModuleType, ...] = (backbone, cnn, factory, timm_model, weights, augment, device, engine, tta)
# For train and test, the features of the patches: float32 (n, features), in the order of `store.ids`.
Features = dict[str, NDArray[np.float32]]


class Chunk(NamedTuple):
    """The patches of a split at positions `start` to `stop` of its ids; `file` has their features and the seconds of these."""

    split: str
    start: int
    stop: int
    file: Path


def embed(config: Config, store: PatchStore, backend: Backend, budget: Budget = ENDLESS) -> tuple[Features, float] | None:
    """Return the features of all patches, means over the config's views, and the patches per second of a device.

    None if `budget` ends. The folder `embeddings` beside the store has them, named after the hash of what they depend on.
    """
    folder = store.folder.with_name("embeddings") / _key(config, store, backend)
    chunks = [
        Chunk(split, start, min(start + CHUNK, len(store.ids(split))), folder / f"{split}_{start:07d}.npz")
        for split in SPLITS
        for start in range(0, len(store.ids(split)), CHUNK)
    ]
    with locked(folder):
        todo = [chunk for chunk in chunks if not chunk.file.exists()]
        if todo:
            log.info("embed: %d of %d parts of the patches into %s", len(todo), len(chunks), folder)
            run_on_gpus(partial(_embed_chunks, config, store, backend, budget), round_robin(todo))
        if not all(chunk.file.exists() for chunk in chunks):
            return None
        parts = {split: [dict(np.load(chunk.file)) for chunk in chunks if chunk.split == split] for split in SPLITS}
    features = {split: np.concatenate([part["features"] for part in loaded]) for split, loaded in parts.items()}
    seconds = sum(float(part["seconds"]) for loaded in parts.values() for part in loaded)
    return features, sum(map(len, features.values())) / seconds


def _embed_chunks(config: Config, store: PatchStore, backend: Backend, budget: Budget, assigned: list[Chunk]) -> None:
    with device.memory_errors(f"model={config.model}"):
        model = backend.place(factory.create(config)).eval()
    for split, chunks in itertools.groupby(assigned, key=lambda chunk: chunk.split):
        rows = store.rows(split, store.ids(split))
        if config.norm == "test":
            engine.adapt_norms(model, store, rows, config, backend)
        for chunk in progress(list(chunks), f"embed {split}"):
            if budget.left() <= 0:
                return
            begun = time.perf_counter()
            features = mean_features(model, store, rows[chunk.start : chunk.stop], config, backend)
            if not np.isfinite(features).all():
                raise UserError(f"{config.model}: a feature is not finite; use precision=fp32, another pool or model")
            write(chunk.file, partial(np.savez, features=features, seconds=time.perf_counter() - begun))


def mean_features(
    model: nn.Module, patches: Patches, rows: NDArray[np.int64], config: Config, backend: Backend
) -> NDArray[np.float32]:
    """Return the features (n, features) of the patches in `rows` (n,) under `model`, a `Backbone`, means over views."""
    assert isinstance(model, backbone.Backbone)

    def embed_parts(parts: list[engine.Rows]) -> list[Tensor]:
        views = (engine.net_views(patches, part, config, backend, config.tta) for part in parts)
        return [torch.stack([model.features(view).float() for view in each]).mean(0).cpu() for each in views]

    features = []
    with torch.inference_mode(), backend.autocast():
        for start in range(0, len(rows), engine.PREDICT_BATCH):
            features += engine.in_parts(embed_parts, rows[start : start + engine.PREDICT_BATCH], config)
    return torch.cat(features).numpy()


def _key(config: Config, store: PatchStore, backend: Backend) -> str:
    content = {
        "patches": [getattr(store.manifest, f"{split}_sha256") for split in SPLITS],
        "weights": weights.weights_sha256(config),
        "config": {name: getattr(config, name) for name in FEATURE_FIELDS},
        "precision": backend.precision,
        "code": [inspect.getsource(module) for module in CODE],
        "versions": {name: versions()[name] for name in ("torch", "timm")},
    }
    return sha256(json.dumps(content, sort_keys=True).encode())[:16]
