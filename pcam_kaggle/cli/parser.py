"""The parser: all commands and their options, each option defined once."""

import argparse
import math
import re
import sys
from functools import partial
from typing import Any, NamedTuple, NoReturn

from pcam_kaggle.core.experiments import DEFAULT, EXPERIMENTS
from pcam_kaggle.core.paths import user_path

METHODS = ("mean", "rank", "climb")
# Former commands of `kaggle`.
RENAMED = {
    "check": "status",
    "build": "notebook",
    "push": "run --detach",
    "logs": "status --log",
    "output": "fetch",
    "leaderboard": "scores",
    "ledger": "scores",
}
KAGGLE = "Kaggle: data, training in a session, submissions and scores"


class Option:
    """An option or argument as `ArgumentParser.add_argument` takes it."""

    def __init__(self, *flags: str, **settings: Any) -> None:
        self.flags, self.settings = flags, settings


class Command(NamedTuple):
    """A command with its options; a nested tuple holds mutually exclusive options."""

    name: str
    purpose: str
    options: tuple[Option | tuple[Option, ...], ...] = ()


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with status 2; of a former command it names the new one."""
        former = re.search(r"invalid choice: '([a-z]+)'", message)
        if former and former[1] in RENAMED and self.prog.endswith(" kaggle"):
            message = f"`kaggle {former[1]}` is now `kaggle {RENAMED[former[1]]}`"
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def _folds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 0,2")
    return tuple(sorted(set(map(int, text.split(",")))))


def _count(text: str, most: int = 100) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {most}")
    return int(text)


def _hours(text: str) -> float:
    hours = float(text)
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours")
    return hours


COMMON = (
    Option("--work", help="folder to write in [PCAM_WORK, or the current one]"),
    Option(
        "--threads", type=partial(_count, most=1024), help="number of threads of a CPU [OMP_NUM_THREADS, or the free cores]"
    ),
    Option("--debug", action="store_true", help="print the traceback of an error [PCAM_DEBUG=1]"),
    (
        Option("-v", "--verbose", action="store_true", help="print details, with time, rank and fold"),
        Option("-q", "--quiet", action="store_true", help="print warnings and errors only"),
    ),
)
EXPERIMENT = Option("-e", "--experiment", help=f"one of {', '.join(EXPERIMENTS)} [{DEFAULT}]")
SET = Option("--set", action="append", default=[], metavar="key=value", help="change a field of the config")
IDS = Option("--ids", choices=["sha1", "names"], help="ID scheme [sha1, or as dataset.json says]")
SKIP_DAMAGED = Option("--skip-damaged", action="store_true", help="skip damaged train patches")
FOLDS = Option("--folds", type=_folds, metavar="0,2", help="folds to work on [all]")
SEEDS = Option("--seeds", type=_count, default=1, metavar="3", help="train and blend several seeds, <name>-seed42 … [1]")
HOURS = Option("--hours", type=_hours, help="time limit; unfinished folds are left out [none]")
METHOD = Option("--method", choices=METHODS, default="mean", help="how to blend [mean]")
RUNS = Option("runs", nargs="*", help="names of runs [all]")
BASELINE = Option("--baseline", help="run to compare the others with [compare all with each other]")
COMPARED_FOLDS = Option("--folds", type=_folds, metavar="0,2", help="folds to compare [all, or those that the runs share]")
SLIDES = Option("--slides", type=user_path, help="CSV of id,wsi [the groups of the fold file]")
FORMAT = Option("--format", choices=["text", "md", "csv", "json"], default="text", help="what to print [text]")
TITLE = Option("--title", default="", help="title of the notebook, which names it [that of kernel-metadata.json]")
LOG = Option("--log", action="store_true", help="print the session's log, as it is written if it is running")
SUBMITTED = Option("name", nargs="?", help=f"the submission [that of the notebook's last session, or {DEFAULT}]")
SCORES = (
    Option("name", nargs="?", help="a submission whose scores to record by hand, offline [ask Kaggle for all]"),
    Option("--public", type=float, help="its public score"),
    Option("--private", type=float, help="its private score"),
)

JOB = (
    (
        Option("--data", help="the competition's folder [PCAM_DATA]"),
        Option("--demo", action="store_true", help="work on the synthetic demo, in demo/"),
    ),
    EXPERIMENT,
    Option("--name", help="name of the run and of its submission [the experiment's]"),
    SET,
    Option("--slides", type=user_path, help="CSV of id,wsi [patch_id_wsi*.csv beside the labels]"),
    Option("--groups", help="which patches share a fold: slides, stain or none; short for --set groups="),
    Option("--subset", metavar="5000", help="use a sample of the train patches; short for --set subset= [all]"),
)
PROBE = (*JOB, IDS, SKIP_DAMAGED, FOLDS, HOURS, METHOD)
BLENDED = Option("members", nargs="*", help="runs to blend [those of the experiment]")
HELD_OUT = (
    Option("runs", nargs="+", help="runs to evaluate"),
    Option("--patches", type=user_path, required=True, help="folder of <id>.tif"),
    Option("--labels", type=user_path, required=True, help="CSV of id,label"),
    Option("--ids", choices=["sha1", "names"], default="sha1", help="ID scheme [sha1]"),
    Option("--slides", type=user_path, help="CSV of id,wsi, whose slides are resampled [patches are]"),
    Option("--name", help="name of the held-out set [that of the folder that holds the labels]"),
)
# What `commands` reads of a command that lacks the option.
DEFAULTS = {"members": (), "ids": None, "skip_damaged": False, "folds": None, "seeds": 1, "hours": None, "method": "mean"}
SESSION = (
    EXPERIMENT,
    SET,
    SEEDS,
    Option("--name", default="", help="name of the run [that of experiment and changes, with -kaggle if another run has it]"),
    Option("--hours", type=_hours, default=11.0, help="longest duration of a session [11]"),
    Option(
        "--weights",
        default="",
        metavar="owner/name",
        help="dataset, or model as owner/name/framework/variation/version, to attach and use; with --internet also pretrained",
    ),
    Option("--resume", action="store_true", help="train what the notebook's last session lacks; without -e, with its options"),
    Option("--accelerator", metavar="NAME", default="NvidiaTeslaT4", help="Kaggle's name of the GPU [NvidiaTeslaT4]"),
    Option("--internet", action="store_true", help="let the session use the internet"),
    Option("--public", action="store_true", help="let everyone see the notebook"),
    TITLE,
    (
        Option("--detach", action="store_true", help="return after the push"),
        Option("--submit", action="store_true", help="submit the result and wait for its scores"),
    ),
)
COMMANDS = (
    Command("prepare", "read and check every TIF once, pack them into store/", (*JOB, IDS, SKIP_DAMAGED)),
    Command("folds", "draw the folds, write folds/<scheme>.csv", JOB),
    Command("train", "train a model per fold, predict with it, into runs/<name>/", (*JOB, FOLDS, SEEDS, HOURS)),
    Command("predict", "predict each fold's validation patches and the test set", (*JOB, FOLDS, SEEDS)),
    Command(
        "blend", "blend folds of an experiment or of several runs, print the OOF AUC", (*JOB, FOLDS, SEEDS, BLENDED, METHOD)
    ),
    Command("submission", "write submissions/<name>.csv for Kaggle", (*JOB, SEEDS)),
    Command("pipeline", "run every stage from prepare to submission", (*JOB, IDS, SKIP_DAMAGED, FOLDS, SEEDS, HOURS, METHOD)),
    Command("probe", "run every stage with a logistic regression on pretrained features, into runs/<name>-probe/", PROBE),
    Command(
        "compare",
        "compare runs: AUC per fold, paired differences, differing settings",
        (RUNS, COMPARED_FOLDS, BASELINE, SLIDES, FORMAT),
    ),
    Command("evaluate", "score runs on a held-out set of labelled patches", (*HELD_OUT, FOLDS, BASELINE, FORMAT)),
    Command("report", "write an HTML report of runs, into reports/", (RUNS, COMPARED_FOLDS, BASELINE, SLIDES)),
    Command("config", "list all fields of an experiment's config", (EXPERIMENT, SET)),
    Command("kaggle run", "train an experiment on Kaggle: push, follow, download, compare; resumes", SESSION),
    Command("kaggle status", "print login, GPU quota and the status of the notebook's last session", (TITLE, LOG)),
    Command("kaggle fetch", "download what the notebook's last session has saved, import its runs", (TITLE,)),
    Command("kaggle submit", "submit submissions/<name>.csv, with its OOF AUC as description", (SUBMITTED, TITLE)),
    Command("kaggle scores", "record Kaggle's scores of all submissions, print them beside the OOF AUC", SCORES),
    Command("kaggle notebook", "write the notebook that Kaggle runs, notebooks/pcam_submission.ipynb"),
    Command("kaggle download", "download, verify and unpack the competition's data"),
)


def parser() -> Parser:
    """Return the parser of all commands; `command` of what it parses is the name of one, such as `kaggle run`."""
    top = Parser(prog="python -m pcam_kaggle", description="From histopathologic patches to a scored submission.")
    top.set_defaults(**DEFAULTS)
    groups = {"": top.add_subparsers(required=True, metavar="command", parser_class=Parser)}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            parent = groups[""].add_parser(group, help=KAGGLE, description=KAGGLE)
            groups[group] = parent.add_subparsers(required=True, metavar="command", parser_class=Parser)
        added = groups[group].add_parser(name, help=command.purpose, description=command.purpose)
        added.set_defaults(command=command.name)
        for each in (*command.options, *COMMON):
            target, options = (added.add_mutually_exclusive_group(), each) if isinstance(each, tuple) else (added, (each,))
            for option in options:
                target.add_argument(*option.flags, **option.settings)
    return top
