"""Settings of the process: environment variables that packages read on import, options of malloc, and its end."""

import ctypes
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

ENVIRONMENT = {
    # Huge pages in PyTorch's CPU allocator, which makes training on a CPU a third faster.
    "THP_MEM_ALLOC_ENABLE": "1",
    # An OpenMP thread then sleeps earlier and leaves its core to the loader processes: 2 to 3 % faster on two cores.
    "GOMP_SPINCOUNT": "80000",
    # albumentations otherwise connects to the network on import, to look for a newer version.
    "NO_ALBUMENTATIONS_UPDATE": "1",
}

# Numbers of the parameters in glibc's malloc.h, and the values that keep up to 2 GB of freed memory and never allocate by mmap.
MALLOC_OPTIONS = {-1: 2**31 - 1, -2: 2**26, -4: 0}


def set_environment() -> None:
    """Set the variables of `ENVIRONMENT` that are not set yet; call it before torch and albumentations are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def rank() -> int:
    """Return this process's rank among those that torchrun has started, from 0; rank 0 alone writes shared files."""
    return int(os.environ.get("RANK", "0"))


def tune_malloc() -> None:
    """Make glibc's malloc keep freed memory; page faults otherwise take a sixth of a training step's time on a CPU."""
    for parameter, value in MALLOC_OPTIONS.items():
        _glibc("mallopt")(parameter, value)


def release_memory() -> None:
    """Return freed memory to the system before a fork, after which each of its pages would be copied on the next write."""
    _glibc("malloc_trim")(0)


def end_with_parent() -> None:
    """End this process when its parent process ends, so that no orphan keeps writing to a run's folder."""
    parent = multiprocessing.parent_process()
    if not parent:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _glibc(name: str) -> Callable[..., Any]:
    """Return the function `name` of glibc, or without glibc one that does nothing."""
    return getattr(ctypes.CDLL(None) if sys.platform == "linux" else None, name, lambda *_: None)
