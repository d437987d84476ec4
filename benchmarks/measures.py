"""The measured processes of `benchmarks.bench`: `python -m benchmarks.measures NAME …` prints values as JSON.

Each measure is a process of its own, so that none inherits the allocator or the number of threads of another.
"""

import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import Pool
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold

from benchmarks.loop import WORKERS, Patches, Peer
from benchmarks.synthetic import SIZES
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.experiments import experiment
from pcam_kaggle.core.files import write_csv
from pcam_kaggle.core.paths import Data
from pcam_kaggle.core.process import tune_malloc
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_text
from pcam_kaggle.models.factory import create
from pcam_kaggle.training import tta
from pcam_kaggle.training.cuda_graph import fastest_step
from pcam_kaggle.training.device import choose_backend, configure_torch
from pcam_kaggle.training.engine import PREDICT_BATCH, predict_logits, train_epoch
from pcam_kaggle.training.gpus import loader_processes
from pcam_kaggle.training.learner import Learner
from pcam_kaggle.training.loader import Batch, TrainBatches, batches

# Steps before the clock starts.
WARM_UP = 8
ENDLESS = 1000
# Patches and views of a prediction.
PREDICTED, VIEWS = 1024, 8


def report(values: dict[str, Any]) -> NoReturn:
    """Print the `values` and exit."""
    # Standard output is redirected, because frameworks print too.
    print(json.dumps(values), file=sys.__stdout__, flush=True)
    sys.exit()


@dataclass(frozen=True, slots=True)
class Source:
    """The competition's folder, a store of its patches, and the seconds to time a training."""

    data: Data
    store: Path
    seconds: float

    def train_labels(self) -> pd.DataFrame:
        """Return four fifths of the labelled ids, the share that one of five folds trains on."""
        labels = read_text(self.data.labels).astype({"label": np.int64})
        return labels[: len(labels) * 4 // 5]


def training(given: Source, name: str) -> None:
    """Report our images/s, the backend, and the limit: images/s of the same steps on one batch in memory."""
    config = experiment(name).config
    learner, source = new_learner(given, config)
    learner.replay = fastest_step(learner)
    limit = images_per_second(learner, resident(learner, source), config, given.seconds)
    augmented = batches(source, 0, loader_processes(1))
    rate = images_per_second(learner, augmented, config, given.seconds)
    report({"rate": rate, "limit": limit, "backend": str(learner.backend)})


def new_learner(given: Source, config: Config) -> tuple[Learner, TrainBatches]:
    """Prepare this process; return a learner of `config` with random weights, and its train batches."""
    labels, store = given.train_labels(), PatchStore(given.store)
    tune_malloc()
    configure_torch()
    backend = choose_backend(config.precision)
    rows, targets = store.rows("train", labels["id"].to_numpy()), labels["label"].to_numpy(np.float64)
    source = TrainBatches(store, rows, targets, replace(config, epochs=ENDLESS), 0)
    return Learner(backend.place(create(config, weights=False)), config, backend, source.count), source


def resident(learner: Learner, source: TrainBatches) -> Iterator[Batch]:
    """Yield the first batch of `source` for ever, in the memory of the device."""
    return itertools.repeat(tuple(part.to(learner.backend.kind) for part in source[0]))


def images_per_second(learner: Learner, stream: Iterator[Batch], config: Config, seconds: float) -> float:
    """Return the speed of steps on the batches of `stream`, timed for about so many seconds."""
    train_epoch(learner, stream, WARM_UP, 0, config)
    # A second warm-up empties the queue that the loader filled during the first steps, and gives the pace.
    pace = _rate(lambda: train_epoch(learner, stream, WARM_UP, 0, config), WARM_UP)
    steps = math.ceil(seconds * pace)
    return _rate(lambda: train_epoch(learner, stream, steps, 0, config), steps * config.batch_size)


def loop_training(given: Source, name: str, **settings: Any) -> None:
    """Report the images/s of the loop's training."""
    config, labels = experiment(name).config, given.train_labels()
    # Patches are repeated to the length of the competition's epoch, so that the loop does not restart its loader.
    ids, targets = (np.resize(labels[column], SIZES["train"]) for column in ("id", "label"))
    moments: list[float] = []

    def on_step() -> None:
        moments.append(time.perf_counter())
        timed = moments[2 * WARM_UP - 1 :]
        if timed and timed[-1] - timed[0] >= given.seconds:
            report({"rate": (len(timed) - 1) * config.batch_size / (timed[-1] - timed[0])})

    Peer(given.data, config, **settings).train(ids, targets.astype(np.float32), ENDLESS, on_step)


def loop_pipeline(given: Source, name: str, epochs: int, n_splits: int, **settings: Any) -> None:
    """Train, predict and average all folds by the loop, as a single-file kernel would; report the OOF AUC."""
    peer = Peer(given.data, experiment(name).config, **settings)
    labels, sample = (read_text(table).astype({"label": np.float64}) for table in (given.data.labels, given.data.sample))
    ids, targets = labels["id"].to_numpy(object), labels["label"].to_numpy(np.float32)
    oof, test = np.zeros(len(labels)), np.zeros(len(sample))
    for train, valid in StratifiedKFold(n_splits, shuffle=True, random_state=42).split(ids, targets):
        net = peer.train(ids[train], targets[train], epochs)
        oof[valid] = peer.predict(net, "train", ids[valid])
        test += peer.predict(net, "test", sample["id"].to_numpy(object)) / n_splits
    with tempfile.TemporaryDirectory() as target:
        write_csv(Path(target) / "oof.csv", labels.assign(probability=oof))
        write_csv(Path(target) / "submission.csv", sample[["id"]].assign(label=test))
    report({"auc": float(roc_auc_score(targets, oof))})


def prediction(given: Source, name: str) -> None:
    """Report the patches/s of our prediction, and the limit: those of the model alone on one batch in memory."""
    # ttach has no shifted views.
    config, store = replace(experiment(name).config, tta_shift=0), PatchStore(given.store)
    tune_malloc()
    configure_torch()
    backend = choose_backend(config.precision)
    net = backend.place(create(config, weights=False)).eval()
    rows = store.rows("train", store.ids("train")[:PREDICTED])
    views = tta.views(backend.images(torch.from_numpy(store.images(rows[:PREDICT_BATCH]))), VIEWS, config.tta_shift)

    def limit() -> None:
        with torch.inference_mode(), backend.autocast():
            for view in views:
                net(view)

    rate = _warm_rate(lambda: predict_logits(net, store, rows, config, backend, VIEWS, "predict"), len(rows))
    report({"rate": rate, "limit": _warm_rate(limit, len(views[0]))})


def ttach_prediction(given: Source, name: str, **settings: Any) -> None:
    """Report the patches/s of ttach's wrapper under the same eight views, over TIFs read by cv2 in two loader processes."""
    import ttach

    peer = Peer(given.data, experiment(name).config, **settings)
    patches = Patches(peer.data, "train", given.train_labels()["id"].to_numpy(object)[:PREDICTED], peer.config)
    column = torch.nn.Sequential(peer.net().eval(), torch.nn.Unflatten(0, (-1, 1)))
    wrapper = ttach.ClassificationTTAWrapper(column, ttach.aliases.d4_transform(), merge_mode="mean")
    loader = torch.utils.data.DataLoader(patches, batch_size=64, num_workers=WORKERS, persistent_workers=True)

    def run() -> None:
        with torch.inference_mode(), peer.autocast():
            for images in loader:
                wrapper(peer.placed(images))

    report({"rate": _warm_rate(run, len(patches))})


def preparation(given: Source, kind: str) -> None:
    """Report the patches/s of our `prepare` (kind `ours`), or of cv2, which writes the pixels, `flushed` to the disk."""
    files = [file for split in ("train", "test") for file in sorted(given.data.patches(split).iterdir())]

    def ours(target: Path) -> None:
        prepare(given.data, target / "store")

    def peer(target: Path) -> None:
        halves = [(files[half::WORKERS], target / str(half), kind == "flushed") for half in range(WORKERS)]
        with Pool(WORKERS) as pool:
            pool.starmap(_decode, halves)

    def work() -> None:
        with tempfile.TemporaryDirectory() as target:
            (ours if kind == "ours" else peer)(Path(target))

    report({"rate": _warm_rate(work, len(files))})


def _decode(files: list[Path], target: Path, is_flushed: bool) -> None:
    cv2.setNumThreads(0)
    with target.open("wb") as out:
        for file in files:
            out.write(cv2.imread(str(file), cv2.IMREAD_COLOR_RGB).data)
        if is_flushed:
            os.fsync(out.fileno())


def _warm_rate(work: Callable[[], object], count: int) -> float:
    """Return the median of three rates of `work`, after a first call that is slower."""
    work()
    return float(np.median([_rate(work, count) for _ in range(3)]))


def _rate(work: Callable[[], object], count: int) -> float:
    """Return `count` over the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


MEASURES: dict[str, Callable[..., None]] = {
    work.__name__: work for work in (training, loop_training, loop_pipeline, prediction, ttach_prediction, preparation)
}

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        name, folder, work, seconds, arguments = sys.argv[1:]
        MEASURES[name](Source(Data(Path(folder)), Path(work) / "store", float(seconds)), **json.loads(arguments))
