"""A fold's log as TensorBoard events, for those who have that viewer."""

from pathlib import Path
from types import TracebackType
from typing import Self


class Scalars:
    """A writer of one fold's scalars into folder `folder`, which does nothing where `tensorboard` is not installed.

    Events from epoch `first` on that an earlier, stopped run wrote are hidden.
    """

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
        else:
            self._writer = SummaryWriter(str(folder), purge_step=first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer:
            self._writer.close()

    def add(self, row: dict[str, float]) -> None:
        """Write every number of `row`, a row of log.csv, at its epoch."""
        if self._writer:
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, int(row["epoch"]))
