"""TensorBoard events of a fold's training."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from pcam_kaggle.training.distributed import rank
from pcam_kaggle.training.learner import EpochRow


@contextmanager
def scalar_writer(folder: Path, first: int) -> Iterator[Callable[[EpochRow], None]]:
    """Yield a function that writes a row of log.csv, in rank 0 and if `tensorboard` is installed.

    Events from epoch `first` on (from 1), of an interrupted run, are hidden.
    """
    if rank() > 0 or find_spec("tensorboard") is None:
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=first) as writer:

        def add(row: EpochRow) -> None:
            for name, value in row.items():
                if name != "epoch":
                    writer.add_scalar(name, value, row["epoch"])

        yield add
