"""How a net is run: as the device is built for, and as measured where that is clearly faster."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import EXPERIMENTS
from pcam_kaggle.models.factory import create
from pcam_kaggle.training import device, gpus
from pcam_kaggle.training.device import Backend, choose_backend, precisions

SMALL = Config(n_blocks=2, width=8, side=32)


def small() -> torch.nn.Module:
    """Return a small net."""
    return create(SMALL)


@pytest.mark.parametrize(
    ("flags", "seconds", "chosen"),
    [
        ("avx512f avx512_bf16", {"bf16": 1.0, "fp32": 0.9}, "bf16"),
        ("avx512f avx512_bf16", {"bf16": 1.3, "fp32": 1.0}, "fp32"),
        ("avx512f", {"bf16": 0.9, "fp32": 1.0}, "fp32"),
        ("avx512f", {"bf16": 0.7, "fp32": 1.0}, "bf16"),
        ("avx512f avx512_bf16", {"fp32": 1.0}, "fp32"),
    ],
)
def test_what_the_processor_has_units_for_is_used_unless_another_is_clearly_faster(
    flags: str, seconds: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : fpu {flags}")
    monkeypatch.setattr(device, "find_device", lambda: "cpu")

    def steps(backend: Backend, *_: object) -> Iterator[float]:
        if backend.precision not in seconds:
            raise RuntimeError("not implemented\nfor this dtype")
        slower = 1.0 if backend.memory_format == "channels_last" else 1.05
        # In the first turn the machine has other work.
        yield from itertools.chain([2 * seconds["fp32"]], itertools.repeat(slower * seconds[backend.precision]))

    monkeypatch.setattr(device, "_timed_steps", steps)
    assert choose_backend(small, 32, 16, "auto") == Backend("cpu", chosen, "channels_last")


def test_a_step_is_taken_with_each_backend_that_the_device_admits() -> None:
    for precision in precisions("cpu"):
        [seconds] = itertools.islice(device._timed_steps(Backend("cpu", precision, "contiguous"), small, 32, 4), 1)
        assert seconds > 0
    assert choose_backend(small, 32, 16, "fp32") == Backend("cpu", "fp32", "channels_last")


@pytest.mark.parametrize(("capability", "first"), [((6, 0), "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_a_gpu_starts_from_its_own_units(capability: tuple[int, int], first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert precisions("cuda")[0] == first
    assert sorted(precisions("cuda")) == ["bf16", "fp16", "fp32"]


def test_a_gpu_computes_in_its_own_units_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_device", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))

    def created() -> torch.nn.Module:
        raise AssertionError

    assert choose_backend(created, 96, 64, "auto") == Backend("cuda", "fp16", "channels_last")


@pytest.mark.parametrize(("kind", "left"), [("cpu", 2), ("cuda", 1)])
def test_the_cores_belong_to_the_loader_where_a_gpu_computes(kind: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "find_device", lambda: kind)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gpus.configure_torch()
        assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "devices", "folds", "local", "loaders"),
    [(4, 0, 5, 1, 4), (4, 2, 5, 1, 2), (4, 2, 1, 1, 4), (1, 2, 5, 1, 1), (32, 1, 5, 1, 32), (4, 1, 5, 2, 2), (3, 2, 5, 1, 1)],
)
def test_loaders_share_the_cores_of_the_processes_that_train(
    cores: int, devices: int, folds: int, local: int, loaders: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    monkeypatch.setattr(gpus, "gpu_count", lambda: devices)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setattr(gpus, "SHARED_MEMORY", tmp_path)
    assert gpus.loader_processes(folds, 1) == loaders


@pytest.mark.parametrize(("free", "devices", "loaders"), [(10, 1, 3), (9, 1, 2), (20, 2, 3), (1, 1, 1), (100, 1, 16)])
def test_batches_in_flight_fit_into_shared_memory(
    free: int,
    devices: int,
    loaders: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package_log: pytest.LogCaptureFixture,
) -> None:
    """Three batches per process are in flight, and one is read."""
    monkeypatch.setattr(gpus, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(gpus, "gpu_count", lambda: devices)
    monkeypatch.setattr("joblib.cpu_count", lambda: 16 * devices)
    monkeypatch.setattr(gpus.shutil, "disk_usage", lambda _: SimpleNamespace(free=free * 1000))
    assert gpus.loader_processes(5, 1000) == loaders
    assert ("shared memory has room for" in package_log.text) == (loaders < 16)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_only_cores_that_this_process_may_use_are_counted() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert gpus.loader_processes(1, 1) == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no scheduling classes")
def test_a_loader_process_does_not_starve_beside_other_programs() -> None:
    """A process of the idle class, or of the lowest priority, gets nothing on a busy machine."""
    code = "import os\nfrom pcam_kaggle.training.loader import _lower_priority\n_lower_priority(0)\n"
    code += "print(os.sched_getscheduler(0) == os.SCHED_BATCH, os.nice(0))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown[0] == "True"
    assert int(shown[1]) - os.nice(0) <= 5


def test_a_device_that_refuses_all_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Iterator[float]:
        raise RuntimeError("not implemented\nfor this dtype")
        yield

    monkeypatch.setattr(device, "_timed_steps", refuse)
    with pytest.raises(UserError, match=r"^cpu: no precision works for this net \(not implemented for this dtype\)$"):
        choose_backend(small, 32, 16, "auto")


def test_what_a_device_refuses_after_a_first_step_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(backend: Backend, *_: object) -> Iterator[float]:
        if backend.precision == "fp32":
            yield from itertools.repeat(1.0)
        yield 0.1
        raise RuntimeError("out of memory")

    monkeypatch.setattr(device, "_timed_steps", steps)
    assert choose_backend(small, 32, 16, "auto").precision == "fp32"


def test_logits_are_as_fine_in_bf16_as_their_patches_differ() -> None:
    torch.manual_seed(0)
    config = EXPERIMENTS["bottleneck"].config
    net = create(config).eval()
    torch.nn.init.normal_(net.head[-1].weight)
    with torch.inference_mode(), Backend("cpu", "bf16", "channels_last").autocast():
        logits = net(torch.rand(64, 3, config.side, config.side))
    assert logits.dtype == torch.float32
    assert len(logits.unique()) == 64


def test_a_net_with_frozen_layers_is_timed() -> None:
    config = Config(model="timm:resnet10t", weights="unused", freeze=0.5)
    assert choose_backend(lambda: create(config, weights=False), 32, 4, "auto").kind == "cpu"
