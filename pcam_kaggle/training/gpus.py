"""Processes of a training: one per GPU, the folds that each trains, and the loader processes beside each."""

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import TypeVar

import joblib
import torch

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.logs import configure_logging, logging_verbosity
from pcam_kaggle.core.process import end_with_parent
from pcam_kaggle.training.device import configure_torch
from pcam_kaggle.training.loader import PREFETCH

log = logging.getLogger(__name__)

Item = TypeVar("Item")
# A container has 64 MB of it by default.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108


def loader_processes(trained: int, batch_bytes: int) -> int:
    """Return the number of loader processes of each of `trained` folds: PCAM_WORKERS, or a share of the CPUs; at least 1."""
    trainings = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * max(1, min(torch.cuda.device_count(), trained))
    wanted = int(os.environ.get("PCAM_WORKERS") or joblib.cpu_count() // trainings)
    if SHARED_MEMORY.is_dir():
        slots = shutil.disk_usage(SHARED_MEMORY).free // trainings // batch_bytes
        if (fitting := (slots - 1) // PREFETCH) < wanted:
            log.info("train: shared memory has room for %d loader processes instead of %d", max(1, fitting), wanted)
            wanted = fitting
    return max(1, wanted)


def round_robin(items: list[Item]) -> list[list[Item]]:
    """Return the items of each GPU, dealt in turn; all in one list if there is at most one GPU."""
    count = max(1, min(torch.cuda.device_count(), len(items)))
    return [items[gpu::count] for gpu in range(count)]


def assign_folds(epochs: dict[int, int], gpus: int) -> list[list[int]]:
    """Assign folds, with the `epochs` that are left of each, to GPUs: the longest first, to the GPU with the fewest epochs."""
    queues: list[list[int]] = [[] for _ in range(min(gpus, len(epochs)))]
    for fold in sorted(epochs, key=lambda fold: epochs[fold], reverse=True):
        min(queues, key=lambda queue: sum(epochs[each] for each in queue)).append(fold)
    return [sorted(queue) for queue in queues]


def run_on_gpus(work: Callable[[list[Item]], None], assignments: list[list[Item]]) -> None:
    """Call the picklable `work` with each assignment, each on a GPU in a process of its own; a single one is called here."""
    if len(assignments) == 1:
        work(assignments[0])
        return
    run = partial(_run_on_gpu, logging_verbosity(), multiprocessing.get_start_method(), work)
    with ProcessPoolExecutor(len(assignments), multiprocessing.get_context("spawn")) as pool:
        ended = [pool.submit(run, gpu, items) for gpu, items in enumerate(assignments)]
    try:
        for each in ended:
            each.result()
    except BrokenProcessPool:
        message = "a GPU's process was killed, perhaps for lack of memory; run the same command again, which resumes"
        raise UserError(message) from None


def _run_on_gpu(
    verbosity: int | None, start_method: str, work: Callable[[list[Item]], None], gpu: int, items: list[Item]
) -> None:
    # Otherwise this process's loaders would be spawned, too, and import torch anew for each fold.
    multiprocessing.set_start_method(start_method, force=True)
    if verbosity is not None:
        configure_logging(verbosity, bar_position=gpu)
    if torch.cuda.is_available():
        torch.cuda.set_device(gpu)
    configure_torch()
    end_with_parent()
    work(items)
