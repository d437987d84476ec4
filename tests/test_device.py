"""How a model is run: as the device is built for, and with loader processes that leave it its cores."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.models.factory import create
from pcam_kaggle.models.timm_model import classifier_prefixes
from pcam_kaggle.training import device, gpus, threads
from pcam_kaggle.training.device import Backend


@pytest.mark.parametrize(
    ("kind", "units", "given", "chosen"),
    [
        ("cpu", "avx512f avx512_bf16", "auto", "bf16"),
        ("cpu", "avx512f", "auto", "fp32"),
        ("cpu", "", "auto", "fp32"),
        ("cpu", "avx512f avx512_bf16", "fp32", "fp32"),
        ("mps", "avx512f avx512_bf16", "auto", "fp32"),
        ("cuda", (6, 0), "auto", "fp32"),
        ("cuda", (7, 5), "auto", "fp16"),
        ("cuda", (8, 0), "auto", "bf16"),
        ("cuda", (9, 0), "fp32", "fp32"),
    ],
)
def test_precisions_of_devices(kind: str, units: object, given: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_device", lambda: kind)
    monkeypatch.setattr(Path, "exists", lambda self: bool(units))
    monkeypatch.setattr(Path, "read_text", lambda self: f"flags : fpu {units}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: units)
    assert device.choose_backend(given) == Backend(kind, chosen, "channels_last")


@pytest.mark.parametrize(
    ("given", "gpus_found", "found"),
    [
        *(("", "", "cpu"), ("", "cuda", "cuda"), ("", "mps", "mps"), ("", "cuda mps", "cuda"), ("cpu", "cuda mps", "cpu")),
        *(("mps", "cuda mps", "mps"), ("cuda", "mps", "one of mps, cpu"), ("gpu", "cuda", "one of cuda, cpu")),
    ],
)
def test_the_device_that_is_used(given: str, gpus_found: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        monkeypatch.setattr(backend, "is_available", lambda kind=kind: kind in gpus_found)
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size))
    monkeypatch.setenv("PCAM_DEVICE", given)
    refused = pytest.raises(UserError, match=rf"^--device {given}: torch [^\n]* {found}$")
    with refused if "one of" in found else nullcontext():
        assert device.find_device() == found


@pytest.mark.parametrize(("kind", "left"), [("cpu", 2), ("cuda", 1)])
def test_the_cores_belong_to_the_loader_where_a_gpu_computes(kind: str, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_device", lambda: kind)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    # The limit of a container, on a machine of 64 cores.
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS")
    numbers: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    monkeypatch.setattr(threads, "FreeCores", lambda most: SimpleNamespace(follow=lambda: numbers.append(most)))
    threads._free_cores.cache_clear()
    device.configure_torch()
    threads._free_cores.cache_clear()
    assert (numbers[-1], torch.backends.cudnn.benchmark) == (left, kind == "cuda")


@pytest.mark.parametrize(
    ("cores", "devices", "folds", "local", "loaders"),
    [
        *((4, 0, 5, 1, 4), (4, 2, 5, 1, 2), (4, 2, 1, 1, 4), (1, 2, 5, 1, 1), (32, 1, 5, 1, 32)),
        *((4, 1, 5, 2, 2), (3, 2, 5, 1, 1)),
    ],
)
def test_loaders_share_the_cores_of_the_processes_that_train(
    cores: int, devices: int, folds: int, local: int, loaders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("joblib.cpu_count", lambda: cores)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert gpus.loader_processes(folds) == loaders
    monkeypatch.setenv("PCAM_WORKERS", "1")
    assert gpus.loader_processes(folds) == 1


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="this system has no scheduling classes")
def test_a_loader_process_does_not_starve_beside_other_programs() -> None:
    """A process of the idle class, or of the lowest priority, gets nothing on a busy machine."""
    code = "import os\nfrom pcam_kaggle.training.loader import _lower_priority\n_lower_priority(0)\n"
    code += "print(os.sched_getscheduler(0) == os.SCHED_BATCH, os.nice(0))"
    is_batch, nice = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert is_batch == "True"
    assert int(nice) - os.nice(0) <= 5


@pytest.mark.parametrize("model", ["cnn", *(f"timm:{name}" for name in ("resnet10t", "efficientvit_m0", "crossvit_9_240"))])
def test_logits_are_as_fine_in_bf16_as_their_patches_differ(model: str) -> None:
    torch.manual_seed(0)
    net = create(Config(model=model)).eval()
    last = [net.head[-1]] if model == "cnn" else [net.net.get_submodule(name[:-1]) for name in classifier_prefixes(net.net)]
    for layer in last:
        torch.nn.init.normal_(layer.weight)
    with torch.inference_mode(), Backend("cpu", "bf16", "channels_last").autocast():
        logits = net(torch.rand(64, 3, 96, 96))
    assert logits.dtype == torch.float32
    assert len(logits.unique()) == 64
