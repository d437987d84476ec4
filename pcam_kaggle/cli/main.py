"""The command line: parses the arguments, runs the command, and prints an error as one line."""

import argparse
import gc
import math
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pcam_kaggle import EXAMPLES, UserError
from pcam_kaggle.config.experiments import DEFAULT, EXPERIMENTS

STAGES = {
    "prepare": "read and check every TIF once, pack them into store/",
    "folds": "draw the folds, write folds/<scheme>.csv",
    "train": "train a net per fold, into runs/<name>/fold_<k>/",
    "predict": "predict out of fold and the test set",
    "blend": "average the folds of one experiment or of several, print the OOF AUC",
    "submission": "write submissions/<name>.csv for Kaggle",
    "pipeline": "all of these, in order",
}
METHODS = ("mean", "rank", "climb")
FORMATS = ("text", "md", "csv", "json")
DETAILS = "error-details.txt"


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and leave with status 2."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments`, by default the process's own; return its exit status: 0, or 2 for a user's error."""
    options = parser().parse_args(arguments)
    try:
        _run(options)
    except (UserError, OSError) as error:
        if options.debug:
            _print_traceback(error)
        print(f"error: {_message(error, options)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes from what is finished", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    # torch, pandas and albumentations take seconds to import, which --help and a wrong argument need not wait for. What is
    # imported stays to the end: collecting garbage in it takes a third of a short command's time.
    gc.disable()
    from pcam_kaggle.cli.commands import COMMANDS

    gc.freeze()
    gc.enable()
    COMMANDS[options.command](options)


def _message(error: UserError | OSError, options: argparse.Namespace) -> str:
    """Return `error` in one line; write the whole list behind it to a file where the message shows only a part."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}; --debug shows where it was raised"
    if len(error.details) <= EXAMPLES:
        return str(error)
    from pcam_kaggle.data.atomic_io import write
    from pcam_kaggle.data.layout import find_workspace

    file = find_workspace(options.work).root / DETAILS
    try:
        write(file, lambda out: out.write("".join(f"{line}\n" for line in error.details).encode()))
    except UserError as reason:
        return f"{error}; the list of all {len(error.details):,} can't be written: {reason}"
    return f"{error}; all {len(error.details):,} are listed in {file}"


def _print_traceback(error: BaseException) -> None:
    """Print the traceback of `error` and of what it was raised from, also where `from None` hides that."""
    cause: BaseException | None = error
    while cause:
        cause.__suppress_context__ = False
        cause = cause.__context__
    traceback.print_exception(error)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = Parser(prog="python -m pcam_kaggle", description="From histopathologic patches to a scored submission.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)

    def command(name: str, purpose: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=purpose, description=purpose)
        added.add_argument("--work", default=os.environ.get("PCAM_WORK"), help="folder to write in [the current one]")
        debug = os.environ.get("PCAM_DEBUG", "0") not in ("", "0")
        added.add_argument("--debug", action="store_true", default=debug, help="print the traceback of an error [PCAM_DEBUG=1]")
        return added

    for name, purpose in STAGES.items():
        _add_job(command(name, purpose), name)
    compared = command("compare", "compare runs: AUC per fold, paired differences, what differs")
    compared.add_argument("--format", choices=FORMATS, default="text", help="what to print [text]")
    report = command("report", "the same with figures, as one HTML file in reports/")
    for each in (compared, report):
        each.add_argument("runs", nargs="*", help="runs to compare [all]")
        each.add_argument("--baseline", help="run to compare the others with [the best]")
        each.add_argument("--slides", type=Path, help="CSV of id,wsi [the groups of the fold file]")
    ledger = command("ledger", "list the submissions, and record Kaggle's scores")
    ledger.add_argument("name", nargs="?", help="the submission that was scored")
    ledger.add_argument("--public", type=float, help="its public score")
    ledger.add_argument("--private", type=float, help="its private score")
    sent = command("submit", "send a submission to Kaggle, with its OOF AUC as description")
    sent.add_argument("name", nargs="?", default=DEFAULT, help=f"the submission [{DEFAULT}]")
    command("leaderboard", "record Kaggle's scores of what was submitted")
    kernel = command("kernel", "the notebook that Kaggle runs: build, push, status, logs, output")
    kernel.add_argument("action", choices=["build", "push", "status", "logs", "output"], help="what to do with it")
    kernel.add_argument("-e", "--experiment", default=DEFAULT, help=f"push: one of {', '.join(EXPERIMENTS)} [{DEFAULT}]")
    kernel.add_argument("--set", action="append", default=[], metavar="key=value", help="push: change a field of the config")
    kernel.add_argument("--hours", type=_hours, default=11.0, help="push: what a session may take [11]")
    kernel.add_argument("--goes-on", action="store_true", help="push: attach the kernel's last output, to go on from it")
    command("data", "download, verify and unpack the competition with Kaggle's client")
    return top


def _add_job(added: argparse.ArgumentParser, name: str) -> None:
    source = added.add_mutually_exclusive_group()
    source.add_argument("--data", default=os.environ.get("PCAM_DATA"), help="the competition's folder [PCAM_DATA]")
    source.add_argument("--demo", action="store_true", help="work on the synthetic demo, in demo/")
    added.add_argument("-e", "--experiment", help=f"one of {', '.join(EXPERIMENTS)} [{DEFAULT}]")
    added.add_argument("--name", help="name of the run and of its submission [the experiment's]")
    added.add_argument("--set", action="append", default=[], metavar="key=value", help="change a field of the config")
    added.add_argument("--slides", type=Path, help="CSV of id,wsi [patch_id_wsi*.csv beside the labels]")
    added.add_argument("--groups", help="which patches share a fold: slides, stain or none; short for --set groups=")
    if name in ("prepare", "pipeline"):
        added.add_argument("--ids", choices=["sha1", "names"], help="how ids are made [sha1, or as dataset.json says]")
        added.add_argument("--skip-damaged", action="store_true", help="set damaged train patches aside")
    if name in ("train", "predict", "blend", "pipeline"):
        added.add_argument("--folds", type=_folds, metavar="0,2", help="folds to work on [all]")
    if name in ("train", "pipeline"):
        added.add_argument("--hours", type=_hours, help="end by then, with the folds that are finished [never]")
    if name == "blend":
        added.add_argument("members", nargs="*", help="runs to blend [the experiment's folds]")
    if name in ("blend", "pipeline"):
        added.add_argument("--method", choices=METHODS, default="mean", help="how to average [mean]")


def _folds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 0,2")
    return tuple(sorted(set(map(int, text.split(",")))))


def _hours(text: str) -> float:
    hours = float(text)
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours")
    return hours
