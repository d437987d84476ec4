"""The command line: runs the command that the arguments name, and prints an error as one line."""

import argparse
import gc
import os
import sys
import traceback
from collections.abc import Sequence

from pcam_kaggle.cli.parser import parser
from pcam_kaggle.core.errors import EXAMPLES, UserError
from pcam_kaggle.core.logs import configure_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments`, by default those of the process; return 0, 2 after an error or 130 if interrupted."""
    # Help texts, too, have characters that not every encoding has.
    configure_logging()
    options = parser().parse_args(arguments)
    options.work = options.work or os.environ.get("PCAM_WORK")
    # OpenMP reads the first when torch is imported; the processes of several GPUs inherit all of them.
    chosen = {"OMP_NUM_THREADS": options.threads, "PCAM_DEVICE": options.device, "PCAM_WORKERS": options.workers}
    os.environ.update({name: str(value) for name, value in chosen.items() if value})
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    configure_logging(options.verbose - options.quiet)
    try:
        _run(options)
    except (UserError, OSError) as error:
        if options.debug or os.environ.get("PCAM_DEBUG", "0") not in ("", "0"):
            # What the error was raised from is shown, too.
            error.__suppress_context__ = False
            traceback.print_exception(error)
        print(f"error: {_message(error, options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    # torch, pandas and albumentations take seconds to import, which --help and a wrong argument need not wait for. Imported
    # modules live to the end: collecting garbage among them takes a third of a short command's time.
    gc.disable()
    from pcam_kaggle.cli.commands import COMMANDS

    gc.freeze()
    gc.enable()
    COMMANDS[options.command](options)


def _message(error: UserError | OSError, options: argparse.Namespace) -> str:
    """Return `error` in one line; write the full list behind it to a file if the message shows only a part."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; --debug shows where it was raised"
    if len(error.details) <= EXAMPLES:
        return str(error)
    from pcam_kaggle.core.files import write
    from pcam_kaggle.core.paths import find_workspace

    file = find_workspace(options.work).root / "error-details.txt"
    try:
        write(file, lambda out: out.write("".join(f"{line}\n" for line in error.details).encode(errors="backslashreplace")))
    except UserError as reason:
        return f"{error}; the list of all {len(error.details):,} can't be written: {reason}"
    return f"{error}; all {len(error.details):,} are listed in {file}"
