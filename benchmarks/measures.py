"""What `benchmarks.bench` measures, each in a process of its own: `python -m benchmarks.measures NAME '{"argument": …}'`.

A process takes a turn for each line that it is given, and prints what it saw as a line of JSON. So many processes can take
turns on one machine; and what one side sets for its process, an allocator or a number of threads, the other does not inherit.
"""

import contextlib
import itertools
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pcam_kaggle.config.experiments import experiment
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import write_csv
from pcam_kaggle.data.layout import Data

if TYPE_CHECKING:
    from pcam_kaggle.training.device import Backend

# Steps before the clock runs, and for how long it then does.
WARM_UP, SECONDS = 8, 2
# Epochs enough for any number of turns.
ENDLESS = 1000


def report(seen: dict[str, Any]) -> None:
    """Print what this turn has `seen`, and wait for the next one; ends the process where there is none."""
    # Frameworks print too.
    print(json.dumps(seen), file=sys.__stdout__, flush=True)
    wait()


def wait() -> None:
    """Wait for the turn that is next; ends the process where there is none."""
    if not sys.stdin.readline():
        sys.exit()


def training(data: str, work: str, name: str, with_limit: bool = True) -> None:
    """Report the backend of our training, then images/s: `rate`, and `limit`, of the same steps on one batch in memory.

    That is the limit since nothing is read, augmented or handed over.
    """
    import torch

    from pcam_kaggle.data.store import PatchStore
    from pcam_kaggle.models.factory import create, create_optimizer
    from pcam_kaggle.training.device import loader_processes
    from pcam_kaggle.training.engine import Learner, TrainBatches, batches, train_epoch

    config = experiment(name).config
    backend = _backend(config)
    report({"backend": str(backend)})
    labels = _fold(Data(Path(data)))[0]
    store = PatchStore(Path(work) / "store")
    endless = replace(config, epochs=ENDLESS)
    source = TrainBatches(store, store.rows("train", labels["id"].to_numpy()), labels["label"].to_numpy(np.float64), endless, 0)
    net = backend.place(create(config, weights=False))
    learner = Learner(net, deepcopy(net), create_optimizer(net, config), backend.scaler(), backend)

    def images_per_second(given: Iterator[tuple[torch.Tensor, torch.Tensor]], warm_up: int) -> float:
        pace = _rate(lambda: train_epoch(learner, given, warm_up, 0, config), warm_up)
        steps = math.ceil(SECONDS * pace)
        return _rate(lambda: train_epoch(learner, given, steps, 0, config), steps * config.batch_size)

    resident = itertools.repeat(tuple(part.to(backend.kind) for part in source[0]))
    augmented = batches(source, 0, loader_processes(1))
    while True:
        # Two steps are enough to tell the pace where no loader has a stock.
        limit = {"limit": images_per_second(resident, 2)} if with_limit else {}
        # While the others took their turns the loader filled its stock; after twice as many batches it is as at any time.
        report({"rate": images_per_second(augmented, 2 * WARM_UP), **limit})


def peer_training(data: str, name: str, peer: str, precision: str, channels_last: bool) -> None:
    """Report the images/s of `peer`'s training."""
    from benchmarks.peers import PEERS, Task
    from benchmarks.results import TRAIN_PATCHES

    config = experiment(name).config
    labels = _fold(Data(Path(data)))[0]
    # An epoch as long as the competition's, by repeating: else fastai would start its loader's processes every few turns.
    ids, targets = (np.resize(labels[column], TRAIN_PATCHES) for column in ("id", "label"))
    moments: list[float] = []

    def on_step() -> None:
        moments.append(time.perf_counter())
        timed = moments[WARM_UP - 1 :]
        if timed and timed[-1] - timed[0] >= SECONDS:
            report({"rate": (len(timed) - 1) * config.batch_size / (timed[-1] - timed[0])})
            moments.clear()

    PEERS[peer](Task(Data(Path(data)), config, ids, targets.astype(np.float32), ENDLESS, precision, channels_last), on_step)


def peer_pipeline(data: str, name: str, peer: str, precision: str, channels_last: bool, epochs: int, n_splits: int) -> None:
    """Train, predict and average all folds by `peer`, as a kernel of one file would; report the OOF AUC."""
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    from benchmarks.peers import PEERS, Task

    folder, config = Data(Path(data)), experiment(name).config
    labels = pd.read_csv(folder.labels, dtype={"id": str})
    sample = pd.read_csv(folder.sample, dtype={"id": str})
    oof, test = np.zeros(len(labels)), np.zeros(len(sample))
    splits = StratifiedKFold(n_splits, shuffle=True, random_state=42).split(labels, labels["label"])
    for train, valid in splits:
        ids, targets = labels["id"].to_numpy(object), labels["label"].to_numpy(np.float32)
        task = Task(folder, config, ids[train], targets[train], epochs, precision, channels_last)
        predict = PEERS[peer](task, lambda: None)
        oof[valid] = predict("train", ids[valid])
        test += predict("test", sample["id"].to_numpy(object)) / n_splits
    with tempfile.TemporaryDirectory() as target:
        write_csv(Path(target) / "oof.csv", labels.assign(probability=oof))
        write_csv(Path(target) / "submission.csv", sample[["id"]].assign(label=test))
    report({"auc": float(roc_auc_score(labels["label"], oof))})


def prediction(data: str, work: str, name: str, views: int, count: int) -> None:
    """Report the patches/s of our prediction under `views` views, and of the net alone on one batch in memory, the `limit`."""
    import torch

    from pcam_kaggle.data.store import PatchStore
    from pcam_kaggle.models.factory import create
    from pcam_kaggle.training import tta
    from pcam_kaggle.training.engine import PREDICT_BATCH, predict_logits

    config = experiment(name).config
    backend = _backend(config)
    net = backend.place(create(config, weights=False)).eval()
    store = PatchStore(Path(work) / "store")
    rows = store.rows("train", store.ids("train")[:count])
    resident = backend.images(torch.from_numpy(store.images(rows[:PREDICT_BATCH])))

    def limit() -> None:
        with torch.inference_mode(), backend.autocast():
            for _ in range(count // PREDICT_BATCH):
                for view in tta.views(resident, views):
                    net(view)

    while True:
        bare = _rate(limit, count)
        ours = _rate(lambda: predict_logits(net, store, rows, config, backend, views, "predict"), count)
        report({"rate": ours, "limit": bare})


def ttach_prediction(data: str, name: str, precision: str, channels_last: bool, count: int) -> None:
    """Report the patches/s of ttach's wrapper under its eight views of the same symmetries, over TIFs read by cv2."""
    import torch
    import ttach

    from benchmarks.peers import FORMATS, Patches
    from pcam_kaggle.models.factory import create

    config, folder = experiment(name).config, Data(Path(data))
    ids = pd.read_csv(folder.labels, dtype={"id": str})["id"].to_numpy(object)[:count]
    net = create(config, weights=False).eval().to(memory_format=FORMATS[channels_last])
    column = torch.nn.Sequential(net, torch.nn.Unflatten(0, (-1, 1)))
    wrapper = ttach.ClassificationTTAWrapper(column, ttach.aliases.d4_transform(), merge_mode="mean")
    loader = torch.utils.data.DataLoader(
        Patches(folder, "train", ids, config), batch_size=64, num_workers=2, persistent_workers=True
    )

    def run() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for images in loader:
                wrapper(images.contiguous(memory_format=FORMATS[channels_last]))

    while True:
        report({"rate": _rate(run, count)})


def preparation(data: str, kind: str) -> None:
    """Report the patches/s of our `prepare` (kind `ours`), of reading every byte, or of cv2's decoding in two processes."""
    from pcam_kaggle.data.prepare import prepare

    folder = Data(Path(data))
    files = sorted(folder.patches("train").iterdir()) + sorted(folder.patches("test").iterdir())

    def reading() -> None:
        for file in files:
            file.read_bytes()

    def decoding() -> None:
        with Pool(2) as pool:
            pool.map(_decode, [files[half::2] for half in range(2)])

    with tempfile.TemporaryDirectory() as target:
        works = {"ours": lambda: prepare(folder, Path(target) / "store"), "bytes": reading, "cv2": decoding}
        while True:
            shutil.rmtree(Path(target) / "store", ignore_errors=True)
            report({"rate": _rate(works[kind], len(files))})


def _decode(files: list[Path]) -> None:
    import cv2

    cv2.setNumThreads(0)
    for file in files:
        cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)


def _rate(work: Callable[[], object], count: int) -> float:
    """Return `count` over the seconds that `work` takes."""
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def _backend(config: Config) -> "Backend":
    """Return what our command line computes on."""
    from pcam_kaggle.config.process import hold_memory
    from pcam_kaggle.models.factory import create
    from pcam_kaggle.training.device import choose, spare_cores

    hold_memory()
    spare_cores()
    net = partial(create, config, weights=False)
    return choose(net, config.side, config.batch_size, config.precision, config.memory_format)


def _fold(data: Data) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return four fifths of the labelled ids to train on, and the rest."""
    labels = pd.read_csv(data.labels, dtype={"id": str})
    cut = len(labels) * 4 // 5
    return labels[:cut], labels[cut:]


MEASURES: dict[str, Callable[..., None]] = {
    work.__name__: work for work in (training, peer_training, peer_pipeline, prediction, ttach_prediction, preparation)
}

if __name__ == "__main__":
    wait()
    with contextlib.redirect_stdout(sys.stderr):
        MEASURES[sys.argv[1]](**json.loads(sys.argv[2]))
