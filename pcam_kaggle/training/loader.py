"""Train batches: drawn, augmented in loader processes and handed over in shared memory."""

import functools
import itertools
import logging
import os
from collections.abc import Iterator
from contextlib import suppress

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.process import rank, release_memory
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.training.augment import augmentation
from pcam_kaggle.training.distributed import world_size

log = logging.getLogger(__name__)

Batch = tuple[Tensor, ...]
# Batches that a loader process prepares ahead, and its priority.
PREFETCH, LOADER_NICE = 3, 5


class TrainBatches(Dataset):
    """All train batches of one fold, in one sequence over the epochs: item i is batch i modulo `steps` of epoch i // steps.

    An item is uint8 patches (count, side, side, 3) and float32 targets (count,), of the patches in `rows` (n,) of the store,
    with `labels` (n,) in [0, 1]. Order and augmentation depend on (seed, fold, epoch, batch) alone. Each rank has an equal part
    of the batch; up to `world_size` - 1 patches are left out.
    """

    def __init__(
        self, store: PatchStore, rows: NDArray[np.int64], labels: NDArray[np.float64], config: Config, fold: int
    ) -> None:
        self.store, self.rows, self.config, self.fold = store, rows, config, fold
        self.targets = labels.astype(np.float32)
        self.steps = max(1, len(rows) // config.batch_size)
        self.count = min(config.batch_size, len(rows)) // world_size()
        self.augment = augmentation(config.side, config.stain_jitter, config.color_jitter)

    def __len__(self) -> int:
        return self.steps * self.config.epochs

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        epoch, batch = divmod(index, self.steps)
        order = _order(self.config.seed, self.fold, epoch, len(self.rows))
        chosen = order[batch * self.config.batch_size + rank() * self.count :][: self.count]
        rng = np.random.default_rng((self.config.seed, self.fold, epoch, batch * world_size() + rank()))
        self.augment.set_random_seed(int(rng.integers(2**32)))
        patches = np.stack([self.augment(image=patch)["image"] for patch in self.store.images(self.rows[chosen])])
        return torch.from_numpy(patches), torch.from_numpy(self.targets[chosen])


@functools.lru_cache(maxsize=1)
def _order(seed: int, fold: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, fold, epoch)).permutation(count)


class _SharedBatches(Dataset):
    """The batches of `data`, written into `count` slots of shared memory in turn; an item is its slot, fast to send."""

    def __init__(self, data: TrainBatches, count: int) -> None:
        self.data = data
        side = data.config.side
        empty = torch.empty(data.count, side, side, 3, dtype=torch.uint8), torch.empty(data.count)
        try:
            self.slots: list[Batch] = [tuple(part.clone().share_memory_() for part in empty) for _ in range(count)]
        except RuntimeError:
            raise UserError(
                f"batch_size={data.config.batch_size}: shared memory has no room for {count} batches; use fewer --workers, "
                "or make it larger (docker run --shm-size 1g)"
            ) from None

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> int:
        slot = index % len(self.slots)
        for target, part in zip(self.slots[slot], self.data[index], strict=True):
            target.copy_(part)
        return slot


def batches(data: TrainBatches, first_epoch: int, workers: int) -> Iterator[Batch]:
    """Yield the batches of `data` from `first_epoch` on (from 0), on the GPU if there is one, valid until the next."""
    # One slot more than the batches in flight, for the batch that is trained on.
    shared = _SharedBatches(data, PREFETCH * workers + 1)
    # A forked worker inherits OpenCV's pool without its threads, and would wait for them forever.
    cv2.setNumThreads(0)
    release_memory()
    loader = DataLoader(
        shared,
        batch_size=None,
        sampler=range(first_epoch * data.steps, len(data)),
        num_workers=workers,
        prefetch_factor=PREFETCH,
        worker_init_fn=_lower_priority,
        # Without a generator the loader draws from the global stream, which dropout draws from.
        generator=torch.Generator(),
    )
    read = (shared.slots[slot] for slot in loader)
    yield from _on_gpu(read, shared.slots) if torch.cuda.is_available() else read


def _on_gpu(read: Iterator[Batch], slots: list[Batch]) -> Iterator[Batch]:
    """Yield the batches of `read` on the GPU, where a stream of its own copies each while the step before it computes.

    The `slots` that they are in are pinned once, because a copy is asynchronous from pinned memory only.
    """
    copies, cuda = torch.cuda.Stream(), torch.cuda.cudart()
    first = next(read, None)
    # The workers have been forked by now, and share the memory as it is.
    pinned = [part for slot in slots for part in slot if not int(cuda.cudaHostRegister(part.data_ptr(), part.nbytes, 0))]
    if unpinned := sum(map(len, slots)) - len(pinned):
        log.warning("loader: %d tensors can't be pinned, so training waits while they are copied to the GPU", unpinned)
    # A refusal would be raised by the next kernel, whichever that is.
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")
    try:
        for batch in itertools.chain([first] if first else [], read):
            with torch.cuda.stream(copies):
                moved = tuple(part.to("cuda", non_blocking=True) for part in batch)
            torch.cuda.current_stream().wait_stream(copies)
            for part in moved:
                part.record_stream(torch.cuda.current_stream())
            yield moved
            # Before the slot may be overwritten; the copy has long ended.
            copies.synchronize()
    finally:
        for part in pinned:
            cuda.cudaHostUnregister(part.data_ptr())


def _lower_priority(worker: int) -> None:
    # The threads of a training step run first; the idle class would leave this process no time on a busy machine.
    # Windows has neither call, macOS lacks the second.
    with suppress(AttributeError, OSError):
        os.nice(LOADER_NICE)
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
