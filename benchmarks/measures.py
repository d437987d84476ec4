"""What `benchmarks.bench` measures, each in a process of its own: `python -m benchmarks.measures NAME '{"argument": …}'`.

A process prints one JSON object. What one side sets for its process, an allocator or a number of threads, the other does not
inherit.
"""

import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.artifacts import write_csv
from pcam_kaggle.experiments import experiment
from pcam_kaggle.paths import Data

WARM_UP = 6


def training(data: str, work: str, name: str, steps: int, turns: int) -> dict[str, float]:
    """Return the images/s of our training, and of the same steps on one batch that stays in memory, by turns.

    The latter is the limit: nothing is read, augmented or handed over.
    """
    import torch

    from pcam_kaggle.backbones import create, create_optimizer
    from pcam_kaggle.device import choose, hold_memory
    from pcam_kaggle.engine import Learner, TrainBatches, batches, train_epoch
    from pcam_kaggle.store import PatchStore

    hold_memory()
    config = experiment(name).config
    backend = choose(
        lambda: create(config, weights=False), config.side, config.batch_size, config.precision, config.memory_format
    )
    labels = _fold(Data(Path(data)))[0]
    store = PatchStore(Path(work) / "store")
    source = TrainBatches(store, store.rows("train", labels["id"].to_numpy()), labels["label"].to_numpy(np.float64), config, 0)
    net = backend.place(create(config, weights=False))
    learner = Learner(net, deepcopy(net), create_optimizer(net, config), backend.scaler(), backend)

    def images_per_second(given: Iterator[tuple[torch.Tensor, torch.Tensor]], count: int) -> float:
        start = time.perf_counter()
        train_epoch(learner, given, count, 0, config)
        return count * config.batch_size / (time.perf_counter() - start)

    seen: dict[str, list[float]] = {"limit": [], "ours": []}
    for _ in range(turns):
        for kind, given in (("limit", itertools.repeat(source[0])), ("ours", batches(source, 0))):
            images_per_second(given, WARM_UP)
            seen[kind].append(images_per_second(given, steps))
    ratios = np.array(seen["ours"]) / np.array(seen["limit"])
    return {
        "limit": float(np.median(seen["limit"])),
        "ours": float(np.median(seen["ours"])),
        "ratio": float(np.median(ratios)),
        "backend": str(backend),
    }


def peer_training(data: str, name: str, peer: str, precision: str, channels_last: bool, steps: int) -> dict[str, float]:
    """Return the images/s of `peer`'s training after its first steps."""
    from benchmarks.peers import PEERS, Task

    config = experiment(name).config
    labels = _fold(Data(Path(data)))[0]
    task = Task(
        Data(Path(data)),
        config,
        labels["id"].to_numpy(object),
        labels["label"].to_numpy(np.float32),
        1,
        WARM_UP + steps,
        precision,
        channels_last,
    )
    moments: list[float] = []
    PEERS[peer](task, lambda: moments.append(time.perf_counter()))
    return {"images_per_second": steps * config.batch_size / (moments[WARM_UP + steps - 1] - moments[WARM_UP - 1])}


def peer_pipeline(
    data: str, name: str, peer: str, precision: str, channels_last: bool, epochs: int, n_splits: int
) -> dict[str, float]:
    """Train, predict and average all folds by `peer`, as a kernel of one file would; return the OOF AUC."""
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
        task = Task(folder, config, ids[train], targets[train], epochs, None, precision, channels_last)
        predict = PEERS[peer](task, lambda: None)
        oof[valid] = predict("train", ids[valid])
        test += predict("test", sample["id"].to_numpy(object)) / n_splits
    with tempfile.TemporaryDirectory() as target:
        write_csv(Path(target) / "oof.csv", labels.assign(probability=oof))
        write_csv(Path(target) / "submission.csv", sample[["id"]].assign(label=test))
    return {"auc": float(roc_auc_score(labels["label"], oof))}


def prediction(data: str, work: str, name: str, views: int, count: int) -> dict[str, list[float]]:
    """Return the patches/s of our prediction under `views` views, and of the net alone on one batch that stays in memory."""
    import torch

    from pcam_kaggle import tta
    from pcam_kaggle.backbones import create
    from pcam_kaggle.device import choose, hold_memory
    from pcam_kaggle.engine import PREDICT_BATCH, predict_logits
    from pcam_kaggle.store import PatchStore

    hold_memory()
    config = experiment(name).config
    backend = choose(
        lambda: create(config, weights=False), config.side, config.batch_size, config.precision, config.memory_format
    )
    net = backend.place(create(config, weights=False)).eval()
    store = PatchStore(Path(work) / "store")
    rows = store.rows("train", store.ids("train")[:count])
    resident = backend.images(torch.from_numpy(store.images(rows[:PREDICT_BATCH])))

    def ours() -> object:
        return predict_logits(net, store, rows, config, backend, views, "predict")

    def limit() -> None:
        with torch.inference_mode(), backend.autocast():
            for _ in range(count // PREDICT_BATCH):
                for view in tta.views(resident, views):
                    net(view)

    return _rates({"ours": ours, "limit": limit}, count, turns=1)


def ttach_prediction(data: str, name: str, precision: str, channels_last: bool, count: int) -> dict[str, list[float]]:
    """Return the patches/s of ttach's wrapper under its eight views of the same symmetries, over TIFs read by cv2."""
    import torch
    import ttach

    from benchmarks.peers import Patches
    from pcam_kaggle.backbones import create

    config, folder = experiment(name).config, Data(Path(data))
    ids = pd.read_csv(folder.labels, dtype={"id": str})["id"].to_numpy(object)[:count]
    net = create(config, weights=False).eval()
    net = net.to(memory_format=torch.channels_last) if channels_last else net
    column = torch.nn.Sequential(net, torch.nn.Unflatten(0, (-1, 1)))
    wrapper = ttach.ClassificationTTAWrapper(column, ttach.aliases.d4_transform(), merge_mode="mean")
    form = torch.channels_last if channels_last else torch.contiguous_format
    loader = torch.utils.data.DataLoader(
        Patches(folder, "train", ids, config), batch_size=256, num_workers=2, persistent_workers=True
    )

    def run() -> None:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for images in loader:
                wrapper(images.contiguous(memory_format=form))

    return _rates({"ttach": run}, count, turns=1)


def preparation(data: str, turns: int) -> dict[str, list[float]]:
    """Return the patches/s of `prepare`, of reading every byte, and of cv2's decoding alone in two processes, by turns."""
    from pcam_kaggle.patches import prepare

    folder = Data(Path(data))
    files = sorted(folder.patches("train").iterdir()) + sorted(folder.patches("test").iterdir())
    halves = [files[half::2] for half in range(2)]

    def ours() -> None:
        prepare(folder, Path(target) / "store")

    def bytes_alone() -> None:
        for file in files:
            file.read_bytes()

    def decoding() -> None:
        with Pool(2) as pool:
            pool.map(_decode, halves)

    with tempfile.TemporaryDirectory() as target:
        works = {"ours": ours, "bytes": bytes_alone, "cv2": decoding}
        return _rates(works, len(files), turns, lambda: shutil.rmtree(Path(target) / "store", ignore_errors=True))


def _decode(files: list[Path]) -> None:
    import cv2

    cv2.setNumThreads(0)
    for file in files:
        cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)


def _rates(
    works: dict[str, Callable[[], object]], count: int, turns: int, between: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Return `count` over the seconds that each of `works` took in each turn but the first, `between` called before each."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        between()
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def _fold(data: Data) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return four fifths of the labelled ids to train on, and the rest."""
    labels = pd.read_csv(data.labels, dtype={"id": str})
    cut = len(labels) * 4 // 5
    return labels[:cut], labels[cut:]


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    work.__name__: work for work in (training, peer_training, peer_pipeline, prediction, ttach_prediction, preparation)
}

if __name__ == "__main__":
    print(json.dumps(MEASURES[sys.argv[1]](**json.loads(sys.argv[2]))))
