"""What a net runs on: the processor, the arithmetic and the layout of activations."""

import contextlib
import itertools
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import joblib
import torch
from torch import Tensor, nn

from pcam_kaggle import UserError
from pcam_kaggle.config.process import end_with_parent

PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16"), "mps": ("fp32", "fp16")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

# Compute capabilities from which on there are units for fp16 and for bf16.
VOLTA, AMPERE = 7, 8

# The same command must end in the same bytes, so what the device is built for decides, and a measurement only where it finds
# what timings of a shared machine, which wander by a tenth, do not find by themselves.
CLEAR_GAIN = 1.2
HOPELESS = 3
STEPS = 3
# A batch of so many patches is enough to time; on a GPU a smaller one than that of the training would time its launches.
ENOUGH = {"cpu": 16, "cuda": 256, "mps": 256}

# The batches that eight processes have under way, 25 of 64 patches, fit into the 64 MB of shared memory that a container has.
MOST_LOADERS = 8


@dataclass(frozen=True, slots=True)
class Backend:
    """One way of running a net; `kind` is cpu, cuda or mps."""

    kind: str
    precision: str
    memory_format: str

    def __post_init__(self) -> None:
        if self.kind not in PRECISIONS or self.precision not in DTYPES or self.memory_format not in FORMATS:
            raise ValueError(f"no such backend: {self.kind}, {self.precision}, {self.memory_format}")

    def place(self, net: nn.Module) -> nn.Module:
        """Return `net`, moved to the device in the memory format."""
        return net.to(self.kind, memory_format=FORMATS[self.memory_format])

    def images(self, patches: Tensor) -> Tensor:
        """Return `patches`, uint8 (n, h, w, 3), as the net takes them: float32 (n, 3, h, w) in [0, 1] on the device."""
        # Pinned memory can be copied from later; any other may hold the next batch by then.
        moved = patches.to(self.kind, non_blocking=patches.is_pinned()).permute(0, 3, 1, 2)
        return moved.to(torch.float32, memory_format=FORMATS[self.memory_format]).div_(255)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context that a forward pass runs in."""
        return torch.autocast(self.kind, DTYPES[self.precision], enabled=self.precision != "fp32")

    def scaler(self) -> torch.amp.GradScaler:
        """Return the gradient scaler, which does nothing but in fp16."""
        return torch.amp.GradScaler(self.kind, enabled=self.precision == "fp16")

    def __str__(self) -> str:
        return f"{device_name(self.kind)}, {self.precision}, {self.memory_format}"


def find_device() -> str:
    """Return cuda, mps or cpu, the first that there is.

    Raises UserError where it does not carry out a convolution: a GPU can be reported as available and lack kernels in this
    build of torch, as a P100 does on Kaggle.
    """
    offered = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = next((kind for kind, available in offered.items() if available), "cpu")
    try:
        image = torch.ones(1, 3, 8, 8, device=kind)
        torch.nn.functional.conv2d(image, torch.ones(4, 3, 3, 3, device=kind)).sum().item()
    except RuntimeError as error:
        raise UserError(
            f"{device_name(kind)}: this build of torch cannot compute on it ({' '.join(str(error).split())[:100]}); choose "
            "another accelerator, on Kaggle T4 x2, or set CUDA_VISIBLE_DEVICES= to an empty text to compute on the CPU"
        ) from None
    return kind


def spare_cores() -> None:
    """Set torch's threads to one where a GPU computes.

    Else each copy of a batch wakes a thread for each core, and they wait, awake, where processes augment and Python launches
    kernels: on 16 cores a step took a quarter longer.
    """
    if find_device() == "cuda":
        torch.set_num_threads(1)


def loader_processes(items: int) -> int:
    """Return how many processes load batches for one training, where `items` trainings are spread over the GPUs.

    The cores that this process may use, by affinity and by the limit of its control group, are divided among the processes
    that train on this machine at the same time.
    """
    trainings = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) * max(1, min(gpus(), items))
    return max(1, min(MOST_LOADERS, joblib.cpu_count() // trainings))


def spread(work: Callable[[list[int]], None], items: list[int]) -> None:
    """Call `work` with a share of `items` on each GPU, in a process of its own; with one GPU or none, here with all of them.

    A process gives its GPU's memory back when it ends, for what comes next. Raises what a process raised, once all have ended,
    and UserError where one was killed.
    """
    count = min(gpus(), len(items))
    if gpus() < 2:
        work(items)
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        shares = [pool.submit(_on_gpu, index, work, items[index::count]) for index in range(count)]
    try:
        for share in shares:
            share.result()
    except BrokenProcessPool:
        raise UserError(
            "a process of a GPU was killed, perhaps for want of memory; the same command goes on from what is finished"
        ) from None


def gpus() -> int:
    """Return how many GPUs there are."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _on_gpu(index: int, work: Callable[[list[int]], None], share: list[int]) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(index)
    spare_cores()
    end_with_parent()
    work(share)


def device_name(kind: str) -> str:
    """Return the device's name for people."""
    return torch.cuda.get_device_name() if kind == "cuda" else f"{kind} ({torch.get_num_threads()} threads)"


def choose(make: Callable[[], nn.Module], side: int, batch_size: int, precision: str, memory_format: str) -> Backend:
    """Return the backend to train `make()` on: of those that `auto` leaves open the first, unless another is clearly faster.

    The first is what the device has units for, in channels_last. A few train steps of random patches are timed per candidate;
    another than the first must be faster by 20 %. A candidate that takes three times as long as the best is given up, one
    that the device refuses is left out.

    Raises UserError where the device refuses all.
    """
    kind = find_device()
    chosen = precisions(kind) if precision == "auto" else (precision,)
    formats = tuple(FORMATS) if memory_format == "auto" else (memory_format,)
    candidates = [Backend(kind, *pair) for pair in itertools.product(chosen, formats)]
    if len(candidates) == 1:
        return candidates[0]
    count = min(batch_size, ENOUGH[kind])
    steps = {candidate: _steps(candidate, make, side, count) for candidate in candidates}
    seconds: dict[Backend, float] = {}
    refusal = ""
    # By turns, so that a moment in which the machine has other work slows all of them.
    for candidate in (candidate for candidate in candidates * STEPS if candidate in steps):
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
    torch.cuda.empty_cache()
    if not seconds:
        raise UserError(f"{kind}: no precision works for this net ({refusal[:200]})")
    best = next(candidate for candidate in candidates if candidate in seconds)
    for candidate in candidates:
        if seconds.get(candidate, math.inf) * CLEAR_GAIN < seconds[best]:
            best = candidate
    return best


def precisions(kind: str) -> tuple[str, ...]:
    """Return the precisions that a device of `kind` may compute in, first the one that it has units for."""
    first = "fp32"
    if kind == "cpu":
        # Called avx512_bf16 and amx_bf16 on x86, bf16 on ARM; where there is no such file, none is known.
        cpus = Path("/proc/cpuinfo")
        first = "bf16" if cpus.exists() and "bf16" in cpus.read_text() else first
    if kind == "cuda":
        major, _ = torch.cuda.get_device_capability()
        first = "bf16" if major >= AMPERE else "fp16" if major >= VOLTA else first
    return (first, *(precision for precision in PRECISIONS[kind] if precision != first))


def _steps(backend: Backend, make: Callable[[], nn.Module], side: int, count: int) -> Iterator[float]:
    """Take train steps of `count` patches; yield the seconds of each but a first one, which prepares what the others reuse."""
    net = backend.place(make()).train()
    patches = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
    scaler = backend.scaler()
    for step in itertools.count():
        start = time.perf_counter()
        with backend.autocast():
            loss = net(backend.images(patches)).float().square().mean()
        scaler.scale(loss).backward()
        float(loss.detach() + next(net.parameters()).grad.sum().detach())
        if step:
            yield time.perf_counter() - start
