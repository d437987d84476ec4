"""Backends: the device that a model runs on, its precision and its memory format."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.process import tune_malloc
from pcam_kaggle.runs.records import BackendRecord
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.threads import follow_free_cores

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Runs of earlier versions may have recorded the second.
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
# Parts of messages; torch has an exception class for the memory of NVIDIA's GPUs only.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc", "could not create a primitive")


@dataclass(frozen=True, slots=True)
class Backend:
    """How a model is run: kind of device (cpu, cuda or mps), precision of autocast and memory format."""

    kind: str
    precision: str
    memory_format: str

    def place(self, net: nn.Module) -> nn.Module:
        """Move `net` to the device and into the memory format; return it."""
        return net.to(self.kind, memory_format=FORMATS[self.memory_format])  # type: ignore[call-overload]

    def images(self, patches: Tensor) -> Tensor:
        """Return RGB uint8 `patches` (n, h, w, 3) as float32 (n, 3, h, w) in [0, 1] on the device, in the memory format."""
        # Memory that is not pinned may be overwritten before an asynchronous copy reads it.
        moved = patches.to(self.kind, non_blocking=patches.is_pinned()).permute(0, 3, 1, 2)
        return moved.to(torch.float32, memory_format=FORMATS[self.memory_format]).div_(255)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the autocast context for a forward pass."""
        return torch.autocast(self.kind, DTYPES[self.precision], enabled=self.precision != "fp32")

    def record(self) -> BackendRecord:
        """Return the backend as the files of a run record it."""
        return BackendRecord(**asdict(self))

    def __str__(self) -> str:
        return f"{device_name(self.kind)}, {self.precision}, {self.memory_format}"


def find_device() -> str:
    """Return the kind of device that PCAM_DEVICE names (--device), by default the first available of cuda, mps and cpu.

    Raises UserError if there is no such device, or torch has no kernels for it.
    """
    checks = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [kind for kind, is_available in checks.items() if is_available]
    kind = os.environ.get("PCAM_DEVICE") or available[0]
    if kind not in available:
        raise UserError(f"--device {kind}: torch {torch.__version__} finds no such device; use one of {', '.join(available)}")
    try:
        image = torch.ones(1, 3, 8, 8, device=kind)
        torch.nn.functional.conv2d(image, torch.ones(4, 3, 3, 3, device=kind)).sum().item()
    except RuntimeError as error:
        raise UserError(
            f"{device_name(kind)}: this build of torch cannot compute on it ({' '.join(str(error).split())[:100]}); choose "
            "another accelerator (on Kaggle T4 x2), or use the CPU (--device cpu)"
        ) from None
    return kind


def device_name(kind: str) -> str:
    """Return the device's name for messages."""
    count = f"{torch.cuda.device_count()} x " if torch.cuda.device_count() > 1 else ""
    return count + torch.cuda.get_device_name() if kind == "cuda" else f"{kind} ({torch.get_num_threads()} threads)"


def native_precision(kind: str) -> str:
    """Return the precision that a device of `kind` has units for: bf16 or fp16; otherwise fp32."""
    if kind == "cuda":
        # From Volta (7.0) on GPUs have fp16 units, from Ampere (8.0) on bf16 units.
        major, _ = torch.cuda.get_device_capability()
        return "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
    # The flags are avx512_bf16 and amx_bf16 on x86, bf16 on ARM.
    flags = Path("/proc/cpuinfo")
    return "bf16" if kind == "cpu" and flags.exists() and "bf16" in flags.read_text() else "fp32"


def choose_backend(precision: str) -> Backend:
    """Return the backend of a new run on this machine, with the `precision` of its config; `auto` is `native_precision`."""
    kind = find_device()
    return Backend(kind, native_precision(kind) if precision == "auto" else precision, "channels_last")


def find_backend(run: Run, config: Config) -> Backend:
    """Prepare this process; return the backend of the run's last session on this kind of device, by default a new run's."""
    configure_torch()
    used = [entry.backend for entry in run.environments() if entry.backend.kind == find_device()]
    return Backend(**used[-1].model_dump()) if used else choose_backend(config.precision)


def configure_torch() -> None:
    """Let malloc keep freed memory, and threads follow the free cores; for a GPU use one, and let cuDNN time its algorithms."""
    tune_malloc()
    follow_free_cores()
    if find_device() == "cuda":
        # Each copy of a batch would wake a thread per core, which spins on the cores of the loader processes.
        torch.set_num_threads(1)
        torch.backends.cudnn.benchmark = True


def is_out_of_memory(error: Exception) -> bool:
    """Return whether `error` is for lack of memory, on a device of any kind."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


@contextlib.contextmanager
def memory_errors(setting: str) -> Iterator[None]:
    """Raise UserError if the block does not fit into the device's memory with `setting`, or a loader process was killed."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(f"{setting}: too large for the device's memory; use a smaller one") from None
        if "DataLoader worker (pid" in str(error):
            raise UserError("a loader process was killed, perhaps for lack of memory; run the same command again") from None
        raise
