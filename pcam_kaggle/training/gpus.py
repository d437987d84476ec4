"""Processes of a training: one per GPU, the epochs that each trains, and the loader processes beside each."""

import math
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import joblib
import torch

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.logs import configure_logging, logging_verbosity
from pcam_kaggle.core.process import end_with_parent
from pcam_kaggle.training.device import configure_torch

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Segment:
    """Epochs `start` to `until` of a fold, from 0, which one GPU trains; of a split fold, another GPU trains the others."""

    fold: int
    start: int
    until: int
    is_split: bool = False


def loader_processes(trained: int) -> int:
    """Return the number of loader processes of each of `trained` folds: PCAM_WORKERS, or a share of the CPUs; at least 1."""
    trainings = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * max(1, min(torch.cuda.device_count(), trained))
    return max(1, int(os.environ.get("PCAM_WORKERS") or joblib.cpu_count() // trainings))


def round_robin(items: list[Item]) -> list[list[Item]]:
    """Return the items of each GPU, dealt in turn; all in one list if there is at most one GPU."""
    count = max(1, min(torch.cuda.device_count(), len(items)))
    return [items[gpu::count] for gpu in range(count)]


def assign_epochs(done: dict[int, int], epochs: int, gpus: int) -> list[list[Segment]]:
    """Assign the epochs that are left of each fold to GPUs so that all end at about the same time.

    McNaughton's rule (1959, theorem 3.1): one GPU is filled after the other, up to the mean of the epochs per GPU. The fold
    that exceeds this limit ends there and begins on the next GPU, as the first that it trains. Its two parts do not overlap.
    `done` are the finished epochs of each fold. GPUs without work are left out.
    """
    left = {fold: epochs - finished for fold, finished in done.items()}
    limit = max(math.ceil(sum(left.values()) / gpus), *left.values())
    assignments: list[list[Segment]] = [[]]
    used = 0
    for fold, count in left.items():
        fitting = min(count, limit - used)
        middle, is_split = epochs - fitting, 0 < fitting < count
        if fitting or not count:
            assignments[-1].append(Segment(fold, middle, epochs, is_split))
            used += fitting
        if fitting < count:
            assignments.append([Segment(fold, done[fold], middle, is_split)])
            used = count - fitting
    return assignments


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
