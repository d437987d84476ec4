"""TensorBoard events of a fold's training."""

from pathlib import Path
from types import TracebackType
from typing import Self


class Scalars:
    """Writes a fold's log as TensorBoard events; does nothing if `tensorboard` is not installed.

    Args:
        folder: Folder of the events.
        first: Epoch from which on events of an interrupted run are hidden, from 1.
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
