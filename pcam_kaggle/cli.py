"""The command line: what was asked for becomes a job, what went wrong becomes one line."""

import argparse
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from pcam_kaggle.artifacts import read_json, write
from pcam_kaggle.blend import METHODS
from pcam_kaggle.budget import ENDLESS, Budget
from pcam_kaggle.compare import compare_runs
from pcam_kaggle.errors import EXAMPLES, UserError
from pcam_kaggle.experiments import DEFAULT, DEMO, EXPERIMENTS, experiment
from pcam_kaggle.job import Job
from pcam_kaggle.kaggle import download, logs, output, owner, push, scores, send, status
from pcam_kaggle.ledger import NAME as LEDGER
from pcam_kaggle.ledger import describe, record, take_scores, write_ledger
from pcam_kaggle.paths import COMPETITION, Data, demo_data, demo_workspace, find_data, find_workspace, runs_workspace
from pcam_kaggle.pipeline import STAGES, run_all
from pcam_kaggle.scoreboard import FORMATS, render
from pcam_kaggle.synthetic import make_demo
from pcam_kaggle.tables import PLAIN_NAME
from pcam_kaggle.transfer import take_over
from pcam_kaggle.world import in_turn, joined

PURPOSE = {
    "prepare": "read and check every TIF once, pack them into store/",
    "folds": "draw the folds, write folds/<scheme>.csv",
    "train": "train a net per fold, into runs/<name>/fold_<k>/",
    "predict": "predict out of fold and the test set",
    "blend": "average the folds of one experiment or of several, print the OOF AUC",
    "submission": "write submissions/<name>.csv for Kaggle",
    "pipeline": "all of these, in order",
}
ORDER = [*STAGES]
DETAILS = "error-details.txt"
# What packages read when they are first imported.
ENVIRONMENT = {
    # The allocator's use of huge pages makes training on a CPU a third faster.
    "THP_MEM_ALLOC_ENABLE": "1",
    # A thread that waits for a step's other threads leaves its core to the loader's processes four times as soon, which
    # makes training on two cores 2 to 3 % faster.
    "GOMP_SPINCOUNT": "80000",
    # albumentations would else look for a newer version of itself.
    "NO_ALBUMENTATIONS_UPDATE": "1",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and leave with status 2."""
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command in `arguments`, by default the process's own; return its exit status: 0, or 2 for a user's error."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except UserError as error:
        print(f"error: {error}{_details(error, options)}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0


def _details(error: UserError, options: argparse.Namespace) -> str:
    """Write the whole list behind `error` to a file where its message shows only a part; return what names the file."""
    if len(error.details) <= EXAMPLES:
        return ""
    file = find_workspace(options.work).root / DETAILS
    write(file, lambda out: out.write("".join(f"{line}\n" for line in error.details).encode()))
    return f"; all {len(error.details):,} are listed in {file}"


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, the function that carries it out."""
    top = Parser(prog="python -m pcam_kaggle", description="From histopathologic patches to a scored submission.")
    commands = top.add_subparsers(dest="command", required=True, metavar="command", parser_class=Parser)

    def command(name: str, purpose: str, run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=purpose, description=purpose)
        added.add_argument("--work", default=os.environ.get("PCAM_WORK"), help="folder to write in [the current one]")
        added.set_defaults(run=run)
        return added

    for name, purpose in PURPOSE.items():
        _add_job(command(name, purpose, _run_job), name)
    compared = command("compare", "hold runs against each other: AUC per fold, paired differences, what differs", _run_compare)
    compared.add_argument("--format", choices=FORMATS, default="text", help="what to print [text]")
    report = command("report", "the same with figures, as one HTML file in reports/", _run_report)
    for each in (compared, report):
        each.add_argument("runs", nargs="*", help="runs to compare [all]")
        each.add_argument("--baseline", help="run to hold the others against [the best]")
        each.add_argument("--slides", type=Path, help="CSV of id,wsi [the groups of the fold file]")
    ledger = command("ledger", "list the submissions, and take down Kaggle's scores", _run_ledger)
    ledger.add_argument("name", nargs="?", help="the submission that was scored")
    ledger.add_argument("--public", type=float, help="its public score")
    ledger.add_argument("--private", type=float, help="its private score")
    sent = command("submit", "send a submission to Kaggle, with its OOF AUC as description", _run_submit)
    sent.add_argument("name", nargs="?", default=DEFAULT, help=f"the submission [{DEFAULT}]")
    command("leaderboard", "take down Kaggle's scores of what was submitted", _run_leaderboard)
    kernel = command("kernel", "the notebook that Kaggle runs: build, push, status, logs, output", _run_kernel)
    kernel.add_argument("action", choices=["build", "push", "status", "logs", "output"], help="what to do with it")
    kernel.add_argument("-e", "--experiment", default=DEFAULT, help=f"push: one of {', '.join(EXPERIMENTS)} [{DEFAULT}]")
    kernel.add_argument("--set", action="append", default=[], metavar="key=value", help="push: change a field of the config")
    kernel.add_argument("--hours", type=_hours, default=11.0, help="push: what a session may take [11]")
    kernel.add_argument("--goes-on", action="store_true", help="push: attach the kernel's last output, to go on from it")
    command("data", "download, verify and unpack the competition with Kaggle's client", _run_data)
    return top


def _add_job(added: argparse.ArgumentParser, name: str) -> None:
    added.add_argument("--data", default=os.environ.get("PCAM_DATA"), help="the competition's folder [PCAM_DATA]")
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


def _run_data(options: argparse.Namespace) -> None:
    data = Data(find_workspace(options.work).root / "data" / COMPETITION)
    print(f"data: {data.root}" if download(data) else f"data: {data.root} (kept)")
    print("next: make submission")


def _run_compare(options: argparse.Namespace) -> None:
    comparison = compare_runs(runs_workspace(find_workspace(options.work)), options.runs, options.baseline, options.slides)
    print(render(comparison, options.format), end="")


def _run_report(options: argparse.Namespace) -> None:
    # matplotlib takes a second to import, which no other command has to wait for.
    from pcam_kaggle.report import write_report

    workspace = runs_workspace(find_workspace(options.work))
    comparison = compare_runs(workspace, options.runs, options.baseline, options.slides)
    target = workspace.root / "reports" / f"{'-'.join(options.runs) or 'runs'}.html"
    write_report(comparison, workspace, target)
    print(f"report: {target}\nnext: open it in a browser")


def _run_ledger(options: argparse.Namespace) -> None:
    submissions = find_workspace(options.work).submissions
    if options.name:
        record(submissions, options.name, options.public, options.private)
    print(write_ledger(submissions).drop(columns="commit").to_string(index=False))
    print(
        f"ledger: {submissions / LEDGER}\nnext: python -m pcam_kaggle ledger NAME --public 0.9 --private 0.9 takes scores down"
    )


def _run_submit(options: argparse.Namespace) -> None:
    file, description = describe(find_workspace(options.work).submissions, options.name)
    send(file, description)
    print(f"submit: {file}, {description}\nnext: make leaderboard, when Kaggle has scored it")


def _run_leaderboard(options: argparse.Namespace) -> None:
    submissions = find_workspace(options.work).submissions
    taken = take_scores(submissions, scores())
    print(write_ledger(submissions).drop(columns="commit").to_string(index=False))
    print(f"leaderboard: scores of {', '.join(taken) or 'none'} taken down in {submissions / LEDGER}")


def _run_kernel(options: argparse.Namespace) -> None:
    # nbformat belongs to development, and no other command needs it.
    from pcam_kaggle.kernel import METADATA, ROOT, Settings, build, pack

    if options.action == "build":
        print(f"kernel: {build(ROOT)}\nnext: make kernel-push")
        return
    if options.action == "push":
        settings = Settings(options.experiment, tuple(options.set), options.hours)
        with tempfile.TemporaryDirectory() as folder:
            pack(ROOT, owner(), settings, options.goes_on, Path(folder))
            print(f"{push(Path(folder))}\nnext: make kernel-status, and when it is complete make kernel-output")
        return
    kernel = f"{owner()}/{read_json(ROOT / METADATA, id=str)['id'].rpartition('/')[2]}"
    if options.action == "output":
        workspace = find_workspace(options.work)
        with tempfile.TemporaryDirectory() as folder:
            output(kernel, Path(folder))
            taken = ", ".join(take_over(Path(folder), workspace))
            sent = [file.stem for file in sorted(Path(folder).glob("submissions/*.csv")) if file.name != LEDGER]
        print(f"kernel: {taken or 'nothing new'} taken into {workspace.root / 'runs'}")
        print(f"next: make compare, or make submit EXPERIMENT={' or '.join(sent)}" if sent else "next: make kernel-push")
    else:
        print({"status": status, "logs": logs}[options.action](kernel))


def _run_job(options: argparse.Namespace) -> None:
    with joined():
        _run_stages(options)


def _run_stages(options: argparse.Namespace) -> None:
    with in_turn():
        job = _job(options)
    if options.command == "pipeline":
        run_all(job)
        return
    STAGES[options.command](job)
    rest = ORDER[ORDER.index(options.command) + 1 :]
    print(
        f"next: python -m pcam_kaggle {rest[0]}{_repeated(options, job, rest[0])}"
        if rest
        else f"next: submit {job.target()} to Kaggle"
    )


def _repeated(options: argparse.Namespace, job: Job, after: str) -> str:
    """Return the options that the stage `after` needs as well, as they are written."""
    given = {
        "--data": options.data if options.data != os.environ.get("PCAM_DATA") else None,
        "--work": options.work if options.work != os.environ.get("PCAM_WORK") else None,
        "-e": options.experiment,
        "--name": job.name if job.name != job.experiment else None,
        "--slides": options.slides,
        "--groups": options.groups,
        "--folds": ",".join(map(str, job.chosen)) if job.chosen and after != "submission" else None,
    }
    parts = [part for key, value in given.items() if value for part in (key, str(value))]
    parts += [part for assignment in options.set for part in ("--set", assignment)]
    return "".join(f" {shlex.quote(part)}" for part in parts)


def _job(options: argparse.Namespace) -> Job:
    workspace = find_workspace(options.work)
    data = find_data(options.data, workspace.root)
    demo = data is None
    if data is None:
        workspace, data = demo_workspace(workspace), demo_data(workspace)
        print(f"No data of the competition found: this is the synthetic demo in {workspace.root}.", flush=True)
        make_demo(data)
    members = tuple(getattr(options, "members", ()))
    named = options.experiment or (DEMO if demo else DEFAULT)
    chosen = experiment(named)
    assignments = [*options.set, *([f"groups={options.groups}"] if options.groups else [])]
    name = options.name or ("-".join(members) if members else named)
    for text in (name, *members):
        if not PLAIN_NAME.fullmatch(text):
            raise UserError(f"{text!r} is no plain file name; use letters, digits, points, dashes and underscores")
    if options.slides and not options.slides.is_file():
        raise UserError(f"--slides {options.slides}: no such file")
    job = Job(
        data=data,
        workspace=workspace,
        demo=demo,
        experiment=named,
        config=chosen.changed(assignments),
        name=name,
        chosen=getattr(options, "folds", None),
        slides=options.slides,
        ids=getattr(options, "ids", None),
        skip_damaged=getattr(options, "skip_damaged", False),
        members=members,
        trains=chosen.members,
        method=getattr(options, "method", "mean"),
        budget=Budget.of_hours(hours) if (hours := getattr(options, "hours", None)) else ENDLESS,
    )
    job.folds()
    return job


def _folds(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list like 0,2")
    return tuple(map(int, text.split(",")))


def _hours(text: str) -> float:
    hours = float(text)
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of hours")
    return hours
