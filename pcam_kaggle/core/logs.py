"""Log lines and progress bars on the terminal; nothing but warnings is printed before `configure_logging` is called."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TypeVar

from pcam_kaggle.core.process import rank

LOGGER = logging.getLogger("pcam_kaggle")
VERBOSE_FORMAT = "%(asctime)s %(message)s"

Item = TypeVar("Item")


class ConsoleHandler(logging.Handler):
    """Prints progress on standard output and warnings, with the prefix "warning: ", on standard error.

    Only rank 0 prints. Streams are looked up for each record, since notebooks replace them. A closed pipe ends the program, as
    it does for `print`.
    """

    def __init__(self, verbosity: int, bar_position: int) -> None:
        super().__init__()
        self.verbosity, self.bar_position = verbosity, bar_position
        self.setFormatter(logging.Formatter(VERBOSE_FORMAT if verbosity > 0 else None))

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether `record` is printed."""
        return rank() == 0

    def emit(self, record: logging.LogRecord) -> None:
        """Print `record` and flush the stream."""
        is_warning = record.levelno >= logging.WARNING
        prefix = "warning: " if is_warning else ""
        print(f"{prefix}{self.format(record)}", file=sys.stderr if is_warning else sys.stdout, flush=True)


def configure_logging(verbosity: int = 0, bar_position: int = 0) -> None:
    """Print the package's log records; a second call replaces the settings of the first.

    Characters that standard output's encoding lacks are replaced from then on, also those of `print`.
    A negative `verbosity` is for warnings only, 0 for progress too, a positive one for debug lines, with the time.
    `bar_position` is the line of this process's progress bars among those of other processes on the terminal.
    """
    # Standard error does so by default, and a notebook's streams take any character.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if console := _console():
        LOGGER.removeHandler(console)
    LOGGER.addHandler(ConsoleHandler(verbosity, bar_position))
    LOGGER.setLevel(logging.DEBUG if verbosity > 0 else logging.INFO if verbosity == 0 else logging.WARNING)
    # A notebook's root logger may print as well.
    LOGGER.propagate = False


def logging_verbosity() -> int | None:
    """Return the `verbosity` given to `configure_logging`, None before its first call."""
    console = _console()
    return console.verbosity if console else None


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
    """Return `items` with a progress bar, which appears after two seconds where rank 0 logs progress on a terminal."""
    from tqdm import tqdm

    console = _console()
    is_quiet = console is None or console.verbosity < 0 or rank() > 0
    position = console.bar_position if console else 0
    # None disables the bar unless standard error is a terminal.
    return tqdm(items, description, total, leave=False, delay=2, disable=True if is_quiet else None, position=position)


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows a text: on a terminal in a line that the next replaces, elsewhere as a line, not repeated."""
    from tqdm import tqdm

    console = _console()
    if sys.stderr.isatty() and console and console.verbosity >= 0:
        with tqdm(bar_format="{desc} ({elapsed})", leave=False, dynamic_ncols=True) as bar:
            yield bar.set_description_str
        return
    shown = [""]

    def show(text: str) -> None:
        if text != shown[-1]:
            LOGGER.info("%s", text)
            shown.append(text)

    yield show


def _console() -> ConsoleHandler | None:
    return next((handler for handler in LOGGER.handlers if isinstance(handler, ConsoleHandler)), None)
