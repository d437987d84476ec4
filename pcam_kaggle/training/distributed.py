"""The processes that torchrun starts to train one fold together; a process that was started by itself is alone in its world."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

Result = TypeVar("Result")

# The others wait while the first one prepares, or validates.
PATIENCE = timedelta(hours=4)


def rank() -> int:
    """Return which process of its world this is, 0 for the first, which alone writes what belongs to all."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Return how many processes the world has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes, each with the GPU of its number where there are GPUs, of whom the first one speaks.

    Alone, do nothing.
    """
    if size() == 1:
        yield
        return
    # Before CUDA looks at it: so every process has one GPU, and no other code must know.
    os.environ["CUDA_VISIBLE_DEVICES"] = _visible(int(os.environ["LOCAL_RANK"]))
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere) if rank() else nullcontext():
        yield
    torch.distributed.destroy_process_group()


def _visible(place: int) -> str:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return str(place) if named is None else "".join(named.split(",")[place : place + 1])


@contextmanager
def in_turn() -> Iterator[None]:
    """Let one process after the other through: what the first one did, the others find done."""
    for _ in range(rank()):
        agreed(None)
    yield
    for _ in range(size() - rank()):
        agreed(None)


def first(work: Callable[[], Result]) -> Result:
    """Return, in every process, what `work` gave in the first one, which alone calls it."""
    return agreed(work() if rank() == 0 else None)


def agreed(value: Result) -> Result:
    """Return the first process's `value`, once all processes are here."""
    given = [value]
    if size() > 1:
        import torch

        torch.distributed.broadcast_object_list(given)
        torch.distributed.barrier()
    return given[0]


def average_gradients(net: "nn.Module") -> None:
    """Replace every gradient of `net` by its mean over the processes; each must have the same part of the whole batch."""
    if size() == 1:
        return
    import torch

    gradients = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    parts = flat.div_(size()).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view(to.shape) for part, to in zip(parts, gradients, strict=True)])
