"""Processes of a training: one per GPU, and the loader processes beside each."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import joblib
import torch

from pcam_kaggle import UserError
from pcam_kaggle.config.logs import configure_logging, logging_verbosity
from pcam_kaggle.config.process import end_with_parent
from pcam_kaggle.training.device import find_device

Item = TypeVar("Item")

# The batches in flight of eight loader processes, 25 of 64 patches, fit into the 64 MB of a container's shared memory.
MAX_LOADERS = 8


def gpu_count() -> int:
    """Return the number of GPUs."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def limit_threads() -> None:
    """Set torch's threads to one where a GPU computes.

    Otherwise each copy of a batch wakes a thread per core, and these spin on the cores of the loader processes and of the
    thread that launches kernels: on 16 cores a step took a quarter longer.
    """
    if find_device() == "cuda":
        torch.set_num_threads(1)


def loader_processes(items: int) -> int:
    """Return the number of loader processes of one training.

    The cores that this process may use, by affinity and by the limit of its control group, are divided among the trainings
    that run on this machine at the same time.

    Args:
        items: Number of trainings that are spread over the GPUs.

    Returns:
        1 to `MAX_LOADERS`.
    """
    trainings = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * max(1, min(gpu_count(), items))
    return max(1, min(MAX_LOADERS, joblib.cpu_count() // trainings))


def spread_over_gpus(work: Callable[[list[Item]], None], items: list[Item]) -> None:
    """Call `work` once per GPU, each call in a process of its own; with at most one GPU, call it here with all items.

    A process frees its GPU's memory when it ends. Errors are raised when all processes have ended.

    Args:
        work: Called with a share of `items`; must be picklable.
        items: Distributed over the GPUs in rotation.

    Raises:
        UserError: A process was killed.
    """
    count = min(gpu_count(), len(items))
    if gpu_count() < 2:
        work(items)
        return
    verbosity = logging_verbosity()
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(_run_on_gpu, gpu, verbosity, work, items[gpu::count]) for gpu in range(count)]
    try:
        for share in shares:
            share.result()
    except BrokenProcessPool:
        raise UserError(
            "a GPU's process was killed, perhaps for lack of memory; run the same command again, which resumes"
        ) from None


def _run_on_gpu(gpu: int, verbosity: int | None, work: Callable[[list[Item]], None], share: list[Item]) -> None:
    if verbosity is not None:
        configure_logging(verbosity, bar_position=gpu)
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    limit_threads()
    end_with_parent()
    work(share)
