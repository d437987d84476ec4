"""Backends: the device that a net runs on, its precision and its memory format."""

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pcam_kaggle.core.errors import UserError

log = logging.getLogger(__name__)

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16"), "mps": ("fp32", "fp16")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEFAULT_FORMAT = "channels_last"
FORMATS = {DEFAULT_FORMAT: torch.channels_last, "contiguous": torch.contiguous_format}

# Compute capabilities from which on GPUs have fp16 and bf16 units.
VOLTA, AMPERE = 7, 8

# The same command must give the same bytes, so the device's units decide. Timings, which vary by a tenth on a shared machine,
# override them only for a clear gain.
CLEAR_GAIN = 1.2
# A candidate this many times slower than the fastest is no longer timed.
HOPELESS = 3
TIMED_STEPS = 3
# Patches per timed step at most; on a GPU fewer would measure the kernels' launches.
TIMED_PATCHES = {"cpu": 16, "mps": 256}


@dataclass(frozen=True, slots=True)
class Backend:
    """One way of running a net.

    Attributes:
        kind: Kind of device: cpu, cuda or mps.
        precision: fp32, bf16 or fp16; the latter two by autocast.
        memory_format: channels_last or contiguous.
    """

    kind: str
    precision: str
    memory_format: str

    def __post_init__(self) -> None:
        if self.kind not in PRECISIONS or self.precision not in DTYPES or self.memory_format not in FORMATS:
            raise ValueError(f"no such backend: {self.kind}, {self.precision}, {self.memory_format}")

    def place(self, net: nn.Module) -> nn.Module:
        """Move `net` to the device and into the memory format; return it."""
        # torch's annotations lack this argument.
        return net.to(self.kind, memory_format=FORMATS[self.memory_format])  # type: ignore[call-overload]

    def images(self, patches: Tensor) -> Tensor:
        """Return the net's input for a batch.

        Args:
            patches: RGB uint8 (n, h, w, 3).

        Returns:
            float32 (n, 3, h, w) in [0, 1] on the device, in the memory format.
        """
        # Memory that is not pinned may be overwritten by the next batch before an asynchronous copy reads it.
        moved = patches.to(self.kind, non_blocking=patches.is_pinned()).permute(0, 3, 1, 2)
        return moved.to(torch.float32, memory_format=FORMATS[self.memory_format]).div_(255)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context for a forward pass."""
        return torch.autocast(self.kind, DTYPES[self.precision], enabled=self.precision != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Return a gradient scaler, enabled in fp16 only."""
        return torch.amp.GradScaler(self.kind, enabled=self.precision == "fp16")

    def __str__(self) -> str:
        return f"{device_name(self.kind)}, {self.precision}, {self.memory_format}"


def find_device() -> str:
    """Return the kind of the first available device: cuda, mps or cpu.

    Raises:
        UserError: The device cannot run a convolution. torch may report a GPU as available for which this build has no
            kernels, such as Kaggle's P100.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = next((kind for kind, is_available in available.items() if is_available), "cpu")
    try:
        image = torch.ones(1, 3, 8, 8, device=kind)
        torch.nn.functional.conv2d(image, torch.ones(4, 3, 3, 3, device=kind)).sum().item()
    except RuntimeError as error:
        raise UserError(
            f"{device_name(kind)}: this build of torch cannot compute on it ({' '.join(str(error).split())[:100]}); choose "
            "another accelerator (on Kaggle T4 x2), or set CUDA_VISIBLE_DEVICES to an empty string to use the CPU"
        ) from None
    return kind


def device_name(kind: str) -> str:
    """Return the device's name for messages."""
    return torch.cuda.get_device_name() if kind == "cuda" else f"{kind} ({torch.get_num_threads()} threads)"


def choose_backend(create_net: Callable[[], nn.Module], side: int, batch_size: int, precision: str) -> Backend:
    """Choose the backend for training on this machine.

    The default is the precision that the device has units for, in channels_last. Except on an Nvidia GPU, each candidate that
    `auto` admits is timed on a few train steps of random patches; one that is faster than the default by 20 % replaces it.

    Args:
        create_net: Returns a new net.
        side: Side of the net's input in pixels.
        batch_size: Patches per step.
        precision: A value of the config. Only `auto` admits other precisions and memory formats than the given precision in
            channels_last.

    Raises:
        UserError: No candidate runs on the device.
    """
    kind = find_device()
    if precision != "auto":
        return Backend(kind, precision, DEFAULT_FORMAT)
    if kind == "cuda":
        # Eager steps of a small net last as long as Python launches their kernels, which a CUDA graph does not wait for.
        return Backend(kind, precisions(kind)[0], DEFAULT_FORMAT)
    candidates = [Backend(kind, *pair) for pair in itertools.product(precisions(kind), FORMATS)]
    count = min(batch_size, TIMED_PATCHES[kind])
    steps = {candidate: _timed_steps(candidate, create_net, side, count) for candidate in candidates}
    seconds: dict[Backend, float] = {}
    refusal = ""
    # Interleaved, so that other work on the machine slows all candidates.
    for candidate in (candidate for candidate in candidates * TIMED_STEPS if candidate in steps):
        try:
            seconds[candidate] = min(seconds.get(candidate, math.inf), next(steps[candidate]))
        except RuntimeError as error:
            refusal = " ".join(str(error).split())
            seconds.pop(candidate, None)
            del steps[candidate]
            continue
        if seconds[candidate] > HOPELESS * min(seconds.values()):
            del steps[candidate]
    steps.clear()
    for candidate, duration in seconds.items():
        log.debug("%s: %.4f s per step of %d patches", candidate, duration, count)
    if not seconds:
        raise UserError(f"{kind}: no precision works for this net ({refusal[:200]})")
    best = next(candidate for candidate in candidates if candidate in seconds)
    for candidate in candidates:
        if seconds.get(candidate, math.inf) * CLEAR_GAIN < seconds[best]:
            best = candidate
    return best


def precisions(kind: str) -> tuple[str, ...]:
    """Return the precisions that a device of `kind` supports, the one it has units for first."""
    first = "fp32"
    if kind == "cpu":
        # The flags are avx512_bf16 and amx_bf16 on x86, bf16 on ARM.
        cpu_info = Path("/proc/cpuinfo")
        first = "bf16" if cpu_info.exists() and "bf16" in cpu_info.read_text() else first
    if kind == "cuda":
        major, _ = torch.cuda.get_device_capability()
        first = "bf16" if major >= AMPERE else "fp16" if major >= VOLTA else first
    return (first, *(precision for precision in PRECISIONS[kind] if precision != first))


def _timed_steps(backend: Backend, create_net: Callable[[], nn.Module], side: int, count: int) -> Iterator[float]:
    """Take train steps of `count` patches; yield the seconds of each but the first, which is a warm-up."""
    net = backend.place(create_net()).train()
    patches = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
    scaler = backend.scaler()
    for step in itertools.count():
        start = time.perf_counter()
        with backend.autocast():
            loss = net(backend.images(patches)).float().square().mean()
        scaler.scale(loss).backward()
        # The lower layers may be frozen.
        gradient = next(parameter for parameter in net.parameters() if parameter.requires_grad).grad
        assert gradient is not None
        # Reading a number waits for a GPU to finish the step.
        float(loss.detach() + gradient.sum().detach())
        if step:
            yield time.perf_counter() - start
