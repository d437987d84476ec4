"""The ranks that torchrun starts to train one fold together; a process started without it is rank 0 of 1."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from pcam_kaggle.core.process import rank

if TYPE_CHECKING:
    from torch import nn

Result = TypeVar("Result")
# The other ranks wait while rank 0 packs, validates or predicts.
TIMEOUT = timedelta(hours=4)


def world_size() -> int:
    """Return the number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def process_group() -> Iterator[None]:
    """Connect the ranks, if there are several, and give each a GPU, if there are any; only rank 0 prints."""
    if world_size() == 1:
        yield
        return
    # Set before CUDA reads it, each rank sees one GPU, and no other code must choose a device.
    local = int(os.environ["LOCAL_RANK"])
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(local) if devices is None else "".join(devices.split(",")[local : local + 1])
    import torch

    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)
    with Path(os.devnull).open("w", errors="replace") as null, redirect_stdout(null) if rank() else nullcontext():
        yield
    torch.distributed.destroy_process_group()


def on_first_rank(work: Callable[[], Result]) -> Result:
    """Call `work` in rank 0 alone, once all ranks have called this; return its result in every rank."""
    broadcast(None)
    return broadcast(work() if rank() == 0 else cast("Result", None))


def broadcast(value: Result) -> Result:
    """Return the `value` of rank 0 in every rank, once all have called this."""
    values = [value]
    if world_size() > 1:
        import torch

        torch.distributed.broadcast_object_list(values)
        torch.distributed.barrier()
    return values[0]


def average_gradients(net: "nn.Module") -> None:
    """Replace every gradient of `net` by its mean over the ranks, whose parts of the batch have the same size."""
    if world_size() == 1:
        return
    import torch

    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.div_(world_size()).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(to.shape) for part, to in zip(parts, gradients, strict=True)])
