"""The number of torch's threads on a CPU follows the cores that other programs leave free.

All threads of a parallel region wait for one that has lost its core, so that beside one busy program on two cores two threads
are several times slower than one.
"""

import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import joblib
import psutil
import torch

log = logging.getLogger(__name__)

# Read by OpenMP when torch is imported, and set by --threads.
FIXED = "OMP_NUM_THREADS"
# Seconds between two readings, and the fraction of a core that the small programs of any machine take together.
INTERVAL, NOISE = 1.0, 0.15


def others_seconds() -> float:
    """Return the CPU seconds that other programs have spent so far on the cores of this process, not counting its children."""
    own = psutil.Process()
    # macOS has no affinity, and neither it nor Windows counts all of these times.
    cores, times = getattr(own, "cpu_affinity", lambda: None)(), psutil.cpu_times(percpu=True)
    busy = [times[core] for core in cores or range(len(times))]
    spent = [own.cpu_times()]
    for child in multiprocessing.active_children():
        with suppress(psutil.NoSuchProcess):
            spent.append(psutil.Process(child.pid).cpu_times())
    return sum(_seconds(each) for each in busy) - sum(_seconds(each) for each in spent)


def _seconds(times: Any) -> float:
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "children_user", "children_system"))


@dataclass
class FreeCores:
    """Sets the number of threads to `most` minus the cores that others are busy on, at least 1.

    `others` returns the CPU seconds of other programs so far, `clock` the time in seconds.
    """

    most: int
    others: Callable[[], float] = others_seconds
    clock: Callable[[], float] = time.monotonic
    set_threads: Callable[[int], None] = torch.set_num_threads

    def __post_init__(self) -> None:
        self._time, self._seconds = self.clock(), self.others()
        self._threads = self._wanted = self.most
        self.set_threads(self.most)

    def follow(self) -> None:
        """Read the load, if the last reading is old enough, and change the number of threads if the load has lasted."""
        elapsed = self.clock() - self._time
        if elapsed < INTERVAL:
            return
        before, self._time, self._seconds = self._seconds, self._time + elapsed, self.others()
        busy = (self._seconds - before) / elapsed
        last, self._wanted = self._wanted, max(1, self.most - math.ceil(max(0.0, busy - NOISE)))
        # A change must last for two readings.
        if self._wanted == last != self._threads:
            self._threads = last
            self.set_threads(self._threads)
            log.info(
                f"threads: {self._threads} of {self.most}, since other programs are busy on {busy:.1f} cores; from here on, "
                "results are not bit-identical to those of another number (--threads fixes it)"
            )


@cache
def _free_cores() -> FreeCores:
    return FreeCores(min(torch.get_num_threads(), joblib.cpu_count()))


def follow_free_cores() -> None:
    """Let the number of threads follow the free cores; call it before each batch. It stays if it is fixed, or for a GPU."""
    if FIXED not in os.environ and not torch.cuda.is_available():
        _free_cores().follow()
