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
from torch import nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked, read_json, reading, sha256, write, write_json
from pcam_kaggle.core.logs import progress
from pcam_kaggle.data.labelled import Patches
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models import backbone, cnn, factory, timm_model, weights
from pcam_kaggle.models.backbone import Backbone
from pcam_kaggle.models.weights import weights_sha256
from pcam_kaggle.runs.provenance import versions
from pcam_kaggle.training import augment, device, engine, tta
from pcam_kaggle.training.budget import ENDLESS, Budget
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.engine import PREDICT_BATCH, adapt_norms, net_input
from pcam_kaggle.training.gpus import round_robin, run_on_gpus

log = logging.getLogger(__name__)

SPLITS = ("train", "test")
RATE = "rate.json"
# Patches whose features are written together; an interrupted embedding continues after the last of them.
CHUNK = 16 * PREDICT_BATCH
# The fields and modules that features depend on.
FEATURE_FIELDS = (
    *("model", "model_args", "weights", "side", "resize", "pool"),
    *("tta", "tta_shift", "chroma_blur", "norm"),
)
CODE: tuple[ModuleType, ...] = (backbone, cnn, factory, timm_model, weights, augment, device, engine, tta)

# For train and test, the features of the patches: float16 (n, features), memory-mapped, in the order of `store.ids`.
Features = dict[str, NDArray[np.float16]]


class Chunk(NamedTuple):
    """The patches of a split at positions `start` to `stop` of its ids, whose features are written together."""

    split: str
    start: int
    stop: int

    def file(self, folder: Path) -> Path:
        """Return the file of their features."""
        return folder / f"{self.split}_{self.start:07d}.npy"


def embed(config: Config, store: PatchStore, backend: Backend, budget: Budget = ENDLESS) -> tuple[Features, float] | None:
    """Return the features of all patches, means over the config's views, computed unless they are on the disk.

    They are in the folder `embeddings` beside the store, named after the hash of what they depend on. Each GPU embeds patches
    with a model of its own.

    Returns:
        The features, and the patches per second of the last session that computed some. None if `budget` has ended; the next
        call continues.

    Raises:
        UserError: The model cannot be created, another process computes features, or a feature is not a number of float16.
    """
    folder = store.folder.with_name("embeddings") / _key(config, store, backend)
    with locked(folder):
        if not _complete(config, store, backend, budget, folder):
            return None
        with reading(folder / RATE):
            rate = float(read_json(folder / RATE)["images_per_second"])
        return {split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in SPLITS}, rate


def _complete(config: Config, store: PatchStore, backend: Backend, budget: Budget, folder: Path) -> bool:
    """Write the features that `folder` lacks, unless the budget ends; return whether it has all."""
    sizes = {split: len(store.ids(split)) for split in SPLITS}
    chunks = [Chunk(split, start, min(start + CHUNK, size)) for split, size in sizes.items() for start in range(0, size, CHUNK)]
    files = {split: folder / f"{split}.npy" for split in SPLITS}
    lacking = [chunk for chunk in chunks if not files[chunk.split].exists()]
    todo = [chunk for chunk in lacking if not chunk.file(folder).exists()]
    if todo:
        log.info("embed: %d of %d parts of the patches into %s", len(todo), len(chunks), folder)
        start = time.perf_counter()
        run_on_gpus(partial(_embed_chunks, config, store, backend, budget, folder), round_robin(todo))
        made = [chunk for chunk in todo if chunk.file(folder).exists()]
        if made:
            count = sum(chunk.stop - chunk.start for chunk in made)
            write_json(folder / RATE, {"images_per_second": count / (time.perf_counter() - start)})
        if len(made) < len(todo):
            return False
    for split, file in files.items():
        if not file.exists():
            _join([chunk.file(folder) for chunk in lacking if chunk.split == split], file)
    return True


def _embed_chunks(
    config: Config, store: PatchStore, backend: Backend, budget: Budget, folder: Path, assigned: list[Chunk]
) -> None:
    """Write the features of the `assigned` chunks, until the budget ends."""
    model = backend.place(factory.create(config)).eval()
    for split, chunks in itertools.groupby(assigned, key=lambda chunk: chunk.split):
        rows = store.rows(split, store.ids(split))
        if config.norm == "test":
            adapt_norms(model, store, rows, config, backend)
            model.eval()
        for chunk in progress(list(chunks), f"embed {split}"):
            if budget.left() <= 0:
                return
            features = mean_features(model, store, rows[chunk.start : chunk.stop], config, backend)
            if not np.isfinite(features).all():
                raise UserError(f"{config.model}: a feature is not a number; use precision=fp32")
            if np.abs(features).max() > np.finfo(np.float16).max:
                raise UserError(f"{config.model}: a feature is too large to be stored in 16 bits; use another pool or net")
            write(chunk.file(folder), partial(np.save, arr=features.astype(np.float16)))


def mean_features(
    model: nn.Module, patches: Patches, rows: NDArray[np.int64], config: Config, backend: Backend
) -> NDArray[np.float32]:
    """Return the features of the patches in `rows` (n,) under `model`, a `Backbone`, as means over views: (n, features)."""
    assert isinstance(model, Backbone)
    parts = []
    with torch.inference_mode(), backend.autocast():
        for start in range(0, len(rows), PREDICT_BATCH):
            images = net_input(patches.images(rows[start : start + PREDICT_BATCH]), config, backend)
            views = tta.views(images, config.tta, config.tta_shift)
            parts.append(torch.stack([model.features(view).float() for view in views]).mean(0).cpu())
    return torch.cat(parts).numpy()


def _join(chunks: list[Path], target: Path) -> None:
    """Write the arrays in `chunks` one after the other into `target`, and delete the chunks."""
    write(target, partial(np.save, arr=np.concatenate([np.load(chunk) for chunk in chunks])))
    for chunk in chunks:
        chunk.unlink()


def _key(config: Config, store: PatchStore, backend: Backend) -> str:
    """Return the hash of what the features depend on: patches, weights, settings, precision, code and versions."""
    content = {
        "patches": [getattr(store.manifest, f"{split}_sha256") for split in SPLITS],
        "weights": weights_sha256(config),
        "config": {name: getattr(config, name) for name in FEATURE_FIELDS},
        "precision": backend.precision,
        "code": [inspect.getsource(module) for module in CODE],
        "versions": {name: versions()[name] for name in ("torch", "timm")},
    }
    return sha256(json.dumps(content, sort_keys=True).encode())[:16]
