"""Threads follow the free cores: fewer beside other programs, all again without them, and a fixed number if it is set."""

import multiprocessing
from types import SimpleNamespace

import psutil
import pytest
import torch

from pcam_kaggle.training import threads
from pcam_kaggle.training.threads import FreeCores, follow_free_cores, others_seconds


class Machine:
    """A clock, and other programs that are busy on `load` cores; `numbers` are the numbers of threads so far."""

    def __init__(self) -> None:
        self.time, self.seconds, self.numbers = 0.0, 0.0, []

    def run(self, cores: FreeCores, seconds: int, load: float) -> list[int]:
        """Take four steps per second beside `load`; return the numbers of threads that were set."""
        self.numbers.clear()
        for _ in range(4 * seconds):
            self.time += 0.25
            self.seconds += 0.25 * load
            cores.follow()
        return self.numbers.copy()


@pytest.fixture
def machine() -> Machine:
    return Machine()


def free_cores(machine: Machine, most: int) -> FreeCores:
    made = FreeCores(most, lambda: machine.seconds, lambda: machine.time, machine.numbers.append)
    assert machine.numbers == [most]
    return made


@pytest.mark.parametrize(
    ("most", "load", "expected"), [(2, 1.0, 1), (2, 0.3, 1), (2, 2.0, 1), (8, 1.0, 7), (8, 2.7, 5), (8, 20.0, 1)]
)
def test_threads_fall_beside_other_programs_and_recover(machine: Machine, most: int, load: float, expected: int) -> None:
    cores = free_cores(machine, most)
    assert machine.run(cores, 60, 0.1) == []
    assert machine.run(cores, 10, load) == [expected]
    assert machine.run(cores, 10, 0.0) == [most]


def test_a_short_load_changes_nothing(machine: Machine) -> None:
    cores = free_cores(machine, 4)
    for _ in range(10):
        assert machine.run(cores, 1, 3.0) == machine.run(cores, 2, 0.0) == []


def test_this_process_and_its_children_are_not_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    def process(pid: int = 0) -> SimpleNamespace:
        if pid == 2:
            raise psutil.NoSuchProcess(pid)
        used = SimpleNamespace(user=30.0, system=1.0, children_user=4.0)
        return SimpleNamespace(cpu_affinity=lambda: [0, 2], cpu_times=lambda: used)

    core = SimpleNamespace(user=100.0, nice=10.0, system=5.0, idle=1e6)
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [core, SimpleNamespace(user=1e9), core])
    monkeypatch.setattr(psutil, "Process", process)
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [SimpleNamespace(pid=pid) for pid in (1, 2)])
    assert others_seconds() == 2 * 115 - 2 * 35


def test_a_fixed_number_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_free_cores", lambda: pytest.fail("reads the load"))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    follow_free_cores()
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    follow_free_cores()
