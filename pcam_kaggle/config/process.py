"""What is set for a whole process: environment variables, which packages read when they are imported, malloc, and its end.

This module imports none of those packages.
"""

import ctypes
import multiprocessing
import os
import sys
import threading

ENVIRONMENT = {
    # The allocator's use of huge pages makes training on a CPU a third faster.
    "THP_MEM_ALLOC_ENABLE": "1",
    # A thread that waits for a step's other threads frees its core for the loader processes four times as soon, which makes
    # training on two cores 2 to 3 % faster.
    "GOMP_SPINCOUNT": "80000",
    # Otherwise albumentations asks the network for a newer version of itself.
    "NO_ALBUMENTATIONS_UPDATE": "1",
}

# Of glibc's malloc.h: the parameters' numbers, and values that keep 2 GB of freed memory and map nothing by itself.
MALLOC_OPTIONS = {-1: 2**31 - 1, -2: 2**26, -4: 0}


def set_environment() -> None:
    """Set each variable of `ENVIRONMENT` that is not set; call it before torch and albumentations are imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def hold_memory() -> None:
    """Keep what tensors free for the next ones, where the C library is glibc; elsewhere do nothing.

    Else every step gives its activations back to the system and faults them in anew: a sixth of its time on a CPU, a twentieth
    where the allocator uses huge pages.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for parameter, value in MALLOC_OPTIONS.items() if mallopt else ():
        mallopt(parameter, value)


def release_memory() -> None:
    """Give back what `hold_memory` keeps and no tensor uses, where the C library is glibc.

    A process that is forked shares it else, and every page of it is copied when it is next written to: seconds for a net's.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


def end_with_parent() -> None:
    """Let this process end as soon as the one that started it has ended: a killed one must not be outlived in its folder."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
