"""Processes of a training: one per GPU, and the loader processes beside each."""

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import joblib
import torch

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.logs import configure_logging, logging_verbosity
from pcam_kaggle.core.process import end_with_parent
from pcam_kaggle.training.device import find_device
from pcam_kaggle.training.loader import PREFETCH

log = logging.getLogger(__name__)

Item = TypeVar("Item")

# Where Linux keeps shared memory, of which a container has 64 MB unless it is told otherwise.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


def gpu_count() -> int:
    """Return the number of GPUs."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def configure_torch() -> None:
    """Set torch's threads to one where a GPU computes, and let cuDNN time its algorithms, since all batches have one shape.

    With more threads each copy of a batch wakes a thread per core, and these spin on the cores of the loader processes and of
    the thread that launches kernels: on 16 cores a step took a quarter longer.
    """
    if find_device() == "cuda":
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True


def loader_processes(items: int, batch_bytes: int) -> int:
    """Return the number of loader processes of one training.

    The cores that this process may use, by affinity and by the limit of its control group, are divided among the trainings
    that run on this machine at the same time, and so is the free shared memory, in which the batches in flight must fit.

    Args:
        items: Number of trainings that are spread over the GPUs.
        batch_bytes: Bytes of a batch.

    Returns:
        At least 1.
    """
    trainings = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * max(1, min(gpu_count(), items))
    wanted = joblib.cpu_count() // trainings
    if SHARED_MEMORY.is_dir():
        slots = shutil.disk_usage(SHARED_MEMORY).free // trainings // batch_bytes
        if (fitting := (slots - 1) // PREFETCH) < wanted:
            log.info("train: shared memory has room for %d loader processes instead of %d", max(1, fitting), wanted)
            wanted = fitting
    return max(1, wanted)


def rotated(items: list[Item]) -> list[list[Item]]:
    """Return a share of `items` for each GPU, in rotation; one share with all if there is at most one GPU."""
    count = max(1, min(gpu_count(), len(items)))
    return [items[gpu::count] for gpu in range(count)]


def spread_over_gpus(work: Callable[[list[Item]], None], shares: list[list[Item]]) -> None:
    """Call `work` with each share, on a GPU of its own and in a process of its own; call it here if there is one share.

    A process frees its GPU's memory when it ends. Errors are raised when all processes have ended.

    Args:
        work: Called with a share; must be picklable.
        shares: At most as many as there are GPUs.

    Raises:
        UserError: A process was killed.
    """
    if len(shares) == 1:
        work(shares[0])
        return
    verbosity = logging_verbosity()
    with ProcessPoolExecutor(len(shares), multiprocessing.get_context("spawn")) as pool:
        ended = [pool.submit(_run_on_gpu, gpu, verbosity, work, share) for gpu, share in enumerate(shares)]
    try:
        for each in ended:
            each.result()
    except BrokenProcessPool:
        raise UserError(
            "a GPU's process was killed, perhaps for lack of memory; run the same command again, which resumes"
        ) from None


def _run_on_gpu(gpu: int, verbosity: int | None, work: Callable[[list[Item]], None], share: list[Item]) -> None:
    if verbosity is not None:
        configure_logging(verbosity, bar_position=gpu)
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    configure_torch()
    end_with_parent()
    work(share)
