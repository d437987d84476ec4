"""What a training step costs: kernels, bytes and operations, and how long a full run can take on Kaggle's two T4.

`python -m benchmarks.roofline`, with PCAM_DATA naming the competition's folder. The counts are those of a step on a CPU in
bf16, whose tensors have the sizes of those on a GPU in fp16; no GPU is measured. One loader process is timed on this machine.
"""

import copy
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.results import RESULTS, markdown, provenance, replace_block
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import experiment
from pcam_kaggle.core.paths import find_data, find_workspace
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.models.factory import create
from pcam_kaggle.training.capacity import OPERATIONS
from pcam_kaggle.training.device import Backend
from pcam_kaggle.training.loader import TrainBatches
from pcam_kaggle.training.optim import create_optimizer
from pcam_kaggle.training.step import Learner, TrainStep

NETS = ("bottleneck", "quick", "plain", "best")
TRAIN_PATCHES, FOLDS = 220_025, 5
GPUS = 2
# A Kaggle machine has four logical CPUs, which may be two cores: each GPU has one core at least, and two at most.
LEAST_CORES, MOST_CORES = 1, 2
# Of a T4, from its data sheet, in bytes per second.
BANDWIDTH = 320e9
# Assumptions for the slow end of the range: shares of the data sheet's rates that are reached, and seconds between two kernels
# of a graph.
REACHED_BANDWIDTH, REACHED_OPERATIONS, KERNEL_GAP = 0.5, 0.2, 3e-6
TIMED_BATCHES = 40


class Counter(TorchDispatchMode):
    """Counts the kernels that are launched, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes = 0, 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry the operation out and count it, unless it only makes a view."""
        result = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            self.kernels += 1
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor))
        return result


def counted(config: Config) -> tuple[int, int, int]:
    """Return the kernels of a step, and the bytes and floating point operations per image."""
    backend = Backend("cpu", "bf16", "channels_last")
    net = backend.place(create(config, weights=False)).train()
    learner = Learner(net, copy.deepcopy(net), create_optimizer(net, config), backend.scaler(), backend)
    step = TrainStep(learner, config, config.batch_size)
    step.compute()
    with Counter() as counter, FlopCounterMode(display=False) as operations:
        step.compute()
    return counter.kernels, counter.bytes // config.batch_size, operations.get_total_flops() // config.batch_size


def loader_rate(config: Config, store: PatchStore) -> float:
    """Return the images/s of one loader process, by the median of its batches."""
    rows = store.rows("train", store.ids("train"))
    data = TrainBatches(store, rows, np.zeros(len(rows)), config, 0)
    cv2.setNumThreads(0)
    seconds = []
    for index in range(min(TIMED_BATCHES, len(data))):
        start = time.perf_counter()
        data[index]
        seconds.append(time.perf_counter() - start)
    return data.count / float(np.median(seconds))


def hours(config: Config, rate: float) -> float:
    """Return the hours that all folds take on both GPUs, each with `rate` images/s."""
    images = TRAIN_PATCHES * (FOLDS - 1) / FOLDS * config.epochs * FOLDS
    return images / rate / GPUS / 3600


def table(store: PatchStore) -> str:
    """Return the counts and the range of hours of each net as a Markdown table."""
    lines = []
    loaded = loader_rate(experiment(NETS[0]).config, store)
    for name in NETS:
        config = experiment(name).config
        kernels, size, operations = counted(config)
        memory, arithmetic = size / BANDWIDTH, operations / OPERATIONS["T4"]
        slow_step = memory / REACHED_BANDWIDTH + arithmetic / REACHED_OPERATIONS + kernels * KERNEL_GAP / config.batch_size
        slow, fast = min(1 / slow_step, LEAST_CORES * loaded), min(1 / max(memory, arithmetic), MOST_CORES * loaded)
        counts = (f"`{name}`", f"{kernels:,}", f"{size / 1e6:.0f} MB", f"{operations / 1e9:.2f} G")
        lines.append((*counts, f"{slow:,.0f} to {fast:,.0f}", f"{hours(config, fast):.1f} to {hours(config, slow):.1f}"))
    head = ("net", "kernels of a step", "bytes per image", "FLOPs per image", "images/s of a T4", "hours, five folds on two")
    return f"A loader process makes {loaded:,.0f} images/s.\n\n{markdown(head, lines)}"


def main() -> None:
    """Write the table of RESULTS.md.

    Raises:
        UserError: There are no patches.
    """
    data = find_data(os.environ.get("PCAM_DATA"), find_workspace(None).root)
    if data is None:
        raise UserError("the benchmark needs the competition's patches; set PCAM_DATA")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        prepare(data, Path(folder) / "store")
        text = f"{provenance()}\n\n{table(PatchStore(Path(folder) / 'store'))}"
    replace_block(RESULTS, "t4", text)
    print(text)


if __name__ == "__main__":
    main()
