"""The parser: all commands and their options, each option defined once."""

import argparse
import math
import os
import re
import sys
from typing import Any, NamedTuple, NoReturn

from pcam_kaggle import __version__
from pcam_kaggle.core.errors import program
from pcam_kaggle.core.experiments import DEFAULT, EXPERIMENTS, PRETRAINED
from pcam_kaggle.core.paths import user_path

METHODS = ("mean", "rank")
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
KAGGLE = "Kaggle: data, training in a session, submissions and scores; run, status, fetch, notebook need a clone"


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


def _count(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1024")
    return int(text)


def _hours(text: str) -> float:
    hours = float(text)
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of hours")
    return hours


COMMON = (
    Option("--work", help="folder of store/, folds/, runs/ and submissions/ [PCAM_WORK, or the current one]"),
    Option("--threads", type=_count, help="CPU threads; results repeat with a fixed number [OMP_NUM_THREADS, or free cores]"),
    Option("--debug", action="store_true", help="print the traceback of an error as well [PCAM_DEBUG=1]"),
    (
        Option("-v", "--verbose", action="store_true", help="print details; lines start with the time"),
        Option("-q", "--quiet", action="store_true", help="print warnings and errors only"),
    ),
)
DEVICE = Option(
    "--device",
    choices=["cpu", "cuda", "mps"],
    default=os.environ.get("PCAM_DEVICE"),
    help="compute on the CPU, an NVIDIA GPU (cuda) or an Apple GPU (mps) [PCAM_DEVICE, or a GPU if there is one]",
)
WORKERS = Option(
    "--workers",
    type=_count,
    default=os.environ.get("PCAM_WORKERS") or None,
    help="processes that load train patches, for each GPU [PCAM_WORKERS, or one for each CPU, divided by the GPUs]",
)
EXPERIMENT = Option("-e", "--experiment", help=f"named settings: {', '.join(EXPERIMENTS)} [{DEFAULT}; probe: {PRETRAINED}]")
SET = Option("--set", action="append", default=[], metavar="key=value", help="change a setting that `config` lists; repeatable")
IDS = Option("--ids", choices=["sha1", "names"], help="what ids are: SHA-1 of the pixels, or any names [dataset.json, or sha1]")
FOLDS = Option("--folds", type=_folds, metavar="0,2", help="numbers of the folds to work on, from 0 [all]")
SEEDS = Option("--seeds", type=_count, default=1, metavar="3", help="train and blend so many seeds, <name>-seed42 … [1]")
HOURS = Option("--hours", type=_hours, help="end training after so many hours; unfinished folds are left out [no limit]")
METHOD = Option("--method", choices=METHODS, default="mean", help="average probabilities, or ranks within folds [mean]")
RUNS = Option("runs", nargs="*", help="names of runs, as in runs/ [all]")
BASELINE = Option("--baseline", metavar="RUN", help="run to compare the others with [the one with the highest AUC]")
COMPARED_FOLDS = Option("--folds", type=_folds, metavar="0,2", help="folds to compare, from 0 [all that the runs share]")
SLIDES = Option("--slides", type=user_path, help="CSV of id,wsi: intervals resample its slides [the groups of the fold file]")
FORMAT = Option("--format", choices=["text", "md", "csv", "json"], default="text", help="format of what is printed [text]")
TITLE = Option("--title", default="", help="title of the notebook on Kaggle, which names it [that of kernel-metadata.json]")
LOG = Option("--log", action="store_true", help="print the session's log, and follow it while it is running")
SUBMITTED = Option("name", nargs="?", help=f"the submission [that of the notebook's last session, or {DEFAULT}]")
SCORES = (
    Option("name", nargs="?", help="a submission whose scores to record by hand, offline [ask Kaggle for all]"),
    Option("--public", type=float, help="its score on the public leaderboard"),
    Option("--private", type=float, help="its score on the private leaderboard"),
)

JOB = (
    (
        Option("--data", help="folder with train/, test/, train_labels.csv [PCAM_DATA, or in data/]"),
        Option("--demo", action="store_true", help="use synthetic patches, and work in demo/"),
    ),
    EXPERIMENT,
    Option("--name", help="name of the run, as in runs/, and of its submission [the experiment's]"),
    SET,
    Option("--slides", type=user_path, help="CSV of id,wsi: a slide is in one fold only [patch_id_wsi*.csv beside the labels]"),
    Option("--fold-file", type=user_path, help="CSV of id,fold, optionally group: folds to use [they are drawn]"),
    Option("--groups", help="keep patches together: slides, stain (similar ones) or none [slides if known]"),
    Option("--subset", metavar="5000", help="use a sample of so many train patches [all]"),
)
PIPELINE = (*JOB, IDS, FOLDS, SEEDS, HOURS, METHOD, DEVICE, WORKERS)
PROBE = (*JOB, IDS, FOLDS, HOURS, METHOD, DEVICE)
BLENDED = Option("members", nargs="*", help="names of the runs to blend [the experiment's]")
COMPARED = (RUNS, COMPARED_FOLDS, BASELINE, SLIDES)
HELD_OUT = (
    Option("runs", nargs="+", help="names of the runs to evaluate, as in runs/"),
    Option("--patches", type=user_path, required=True, help="folder of <id>.tif, with --out also PNG or JPEG"),
    Option("--labels", type=user_path, help="CSV of id,label, to score the runs"),
    Option("--out", type=user_path, help="CSV to write the predictions of one run to, without labels"),
    Option("--ids", choices=["sha1", "names"], default="sha1", help="what ids are: SHA-1 of the pixels, or any names [sha1]"),
    Option("--slides", type=user_path, help="CSV of id,wsi: intervals resample its slides [patches]"),
    Option("--name", help="name of the set, as in evaluations/ [that of the folder of the labels]"),
)
IMPORT = (
    Option("name", help="name of the run to make"),
    Option("--oof", type=user_path, required=True, help="CSV of id,fold,probability: out of fold, of all train patches"),
    Option("--test", type=user_path, required=True, help="CSV of id,probability: of all test patches"),
    (
        Option("--data", help="the competition's folder, for labels and test ids [PCAM_DATA]"),
        Option("--demo", action="store_true", help="use the labels of the synthetic patches, and work in demo/"),
    ),
)
# What `commands` reads of a command that lacks the option.
DEFAULTS = {"members": (), "ids": None, "folds": None, "seeds": 1, "hours": None, "method": "mean"}
DEFAULTS |= {"device": None, "workers": None}
SESSION = (
    EXPERIMENT,
    SET,
    SEEDS,
    Option("--name", default="", help="name of the run [that of experiment and changes, with -kaggle if another run has it]"),
    Option("--hours", type=_hours, help="longest duration of a session [11]"),
    Option(
        "--weights",
        default="",
        metavar="owner/name",
        help="dataset, or model as owner/name/framework/variation/version, to attach and use; or pretrained, timm's download",
    ),
    Option("--slides", default="", metavar="owner/name", help="dataset with a slide map to attach, patch_id_wsi*.csv [none]"),
    Option("--resume", action="store_true", help="train what the notebook's last session lacks; without -e, with its options"),
    Option("--accelerator", metavar="NAME", help="Kaggle's name of the GPU [NvidiaTeslaT4]"),
    Option("--no-internet", action="store_true", help="no download of the weights that the experiment needs; attach --weights"),
    Option("--public", action="store_true", help="let everyone see the notebook"),
    TITLE,
    (
        Option("--detach", action="store_true", help="return once the session is started"),
        Option("--submit", action="store_true", help="submit the result and wait for its scores"),
    ),
)
COMMANDS = (
    Command("prepare", "check every patch and pack all of them into store/, which training reads", (*JOB, IDS)),
    Command("folds", "draw the folds of cross-validation, into folds/", JOB),
    Command("train", "train a model per fold and predict with it; resumes", (*JOB, FOLDS, SEEDS, HOURS, DEVICE, WORKERS)),
    Command("predict", "predict each fold's validation patches and the test set", (*JOB, FOLDS, SEEDS, DEVICE)),
    Command("blend", "average folds and runs, print the out-of-fold AUC", (*JOB, FOLDS, SEEDS, BLENDED, METHOD)),
    Command("submission", "write submissions/<name>.csv, the file for Kaggle, from a blended run", (*JOB, SEEDS)),
    Command("pipeline", "run all stages, from prepare to submission; skips what is up to date and resumes", PIPELINE),
    Command("probe", "run all stages with a logistic regression on a pretrained model's features", PROBE),
    Command("import", "make a run of predictions made elsewhere, to compare and to blend", IMPORT),
    Command("compare", "compare runs by out-of-fold AUC, with intervals of their differences", (*COMPARED, FORMAT)),
    Command(
        "evaluate",
        "score runs on labelled patches of held-out slides, or predict patches without labels",
        (*HELD_OUT, FOLDS, BASELINE, FORMAT, DEVICE),
    ),
    Command("report", "write an HTML report of runs with figures and the patches that are worst predicted", COMPARED),
    Command("config", "list all settings of an experiment: value, allowed values, meaning", (EXPERIMENT, SET)),
    Command("kaggle run", "train an experiment in a notebook on Kaggle, download its runs, compare them", SESSION),
    Command("kaggle status", "print login, GPU quota and the status of the notebook's last session", (TITLE, LOG)),
    Command("kaggle fetch", "download what the notebook's last session has saved, import its runs", (TITLE,)),
    Command("kaggle submit", "submit submissions/<name>.csv, with its OOF AUC as description", (SUBMITTED, TITLE)),
    Command("kaggle scores", "record Kaggle's scores of all submissions, print them beside the OOF AUC", SCORES),
    Command("kaggle notebook", "write the notebook that runs on Kaggle, notebooks/pcam_submission.ipynb, in a clone"),
    Command("kaggle download", "download, verify and unpack the competition's data into data/"),
)
# Arguments that the help of a command shows.
EXAMPLES = {
    "train": "-e quick --folds 0,2 --hours 2",
    "blend": "bottleneck plain --method rank",
    "import": "other --oof oof.csv --test test.csv",
    "pipeline": "-e quick --subset 5000 --set epochs=3 --name first",
    "probe": "--set weights=~/encoder --name encoder",
    "compare": "bottleneck plain --baseline plain",
    "evaluate": "bottleneck --patches ~/patches --labels ~/labels.csv --ids names",
    "kaggle run": "-e quick --hours 3 --submit",
}


def parser() -> Parser:
    """Return the parser of all commands; `command` of what it parses is the name of one, such as `kaggle run`."""
    advice = f"start with `{program()} pipeline --demo`; `{program()} COMMAND --help` explains a command"
    top = Parser(prog=program(), description="From histopathologic patches to a scored submission.", epilog=advice)
    top.add_argument("--version", action="version", version=f"pcam_kaggle {__version__}", help="print the version and exit")
    top.set_defaults(**DEFAULTS)
    groups = {"": top.add_subparsers(required=True, metavar="command", parser_class=Parser)}
    for command in COMMANDS:
        group, _, name = command.name.rpartition(" ")
        if group not in groups:
            parent = groups[""].add_parser(group, help=KAGGLE, description=KAGGLE)
            groups[group] = parent.add_subparsers(required=True, metavar="command", parser_class=Parser)
        shown = f"example: {program()} {command.name} {EXAMPLES[command.name]}" if command.name in EXAMPLES else None
        added = groups[group].add_parser(name, help=command.purpose, description=command.purpose, epilog=shown)
        added.set_defaults(command=command.name)
        for each in (*command.options, *COMMON):
            target, options = (added.add_mutually_exclusive_group(), each) if isinstance(each, tuple) else (added, (each,))
            for option in options:
                target.add_argument(*option.flags, **option.settings)
    return top
