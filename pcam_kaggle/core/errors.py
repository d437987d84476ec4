"""The error for a mistake of the user, and how messages name the program."""

import sys
from collections.abc import Collection, Sequence
from itertools import islice
from pathlib import Path

EXAMPLES = 5


class UserError(Exception):
    """An error that the user can fix: the message names the file, id or key and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2. Where the message shows `examples` of a
    list, `details` is the whole list, which the command line writes to a file.
    """

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


def program() -> str:
    """Return the words that start the program, as its user did: `pcam`, or `python -m pcam_kaggle`."""
    return "pcam" if Path(sys.argv[0]).stem == "pcam" else "python -m pcam_kaggle"


def examples(items: Collection[str]) -> str:
    """Return the first five of `items`, separated by commas, and how many more there are."""
    shown = ", ".join(islice(items, EXAMPLES))
    more = len(items) - EXAMPLES
    return f"{shown} and {more:,} more" if more > 0 else shown
