"""What each command of the command line does."""

import argparse
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from pcam_kaggle import UserError
from pcam_kaggle.config.experiments import DEFAULT, DEMO, experiment
from pcam_kaggle.data.atomic_io import locked, read_json
from pcam_kaggle.data.csv_io import PLAIN_NAME
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.data.layout import (
    COMPETITION,
    Data,
    Workspace,
    demo_data,
    demo_workspace,
    find_data,
    find_workspace,
    runs_workspace,
)
from pcam_kaggle.kaggle.client import download, logs, output, owner, push, scores, send, status
from pcam_kaggle.kaggle.ledger import NAME as LEDGER
from pcam_kaggle.kaggle.ledger import describe, record, take_scores, write_ledger
from pcam_kaggle.pipeline.job import Job
from pcam_kaggle.pipeline.stages import STAGES, run_all
from pcam_kaggle.runs.import_run import take_over
from pcam_kaggle.scoring.compare import compare_runs
from pcam_kaggle.scoring.render import render
from pcam_kaggle.training.budget import ENDLESS, Budget
from pcam_kaggle.training.distributed import in_turn, joined

ORDER = [*STAGES]


def _run_data(options: argparse.Namespace) -> None:
    data = Data(find_workspace(options.work).root / "data" / COMPETITION)
    print(f"data: {data.root}" if download(data) else f"data: {data.root} (kept)")
    print("next: make submission")


def _run_compare(options: argparse.Namespace) -> None:
    comparison = compare_runs(_runs(options), options.runs, options.baseline, options.slides)
    print(render(comparison, options.format), end="")


def _run_report(options: argparse.Namespace) -> None:
    # matplotlib takes a second to import, which no other command has to wait for.
    from pcam_kaggle.report.page import write_report

    workspace = _runs(options)
    comparison = compare_runs(workspace, options.runs, options.baseline, options.slides)
    target = workspace.root / "reports" / f"{'-'.join(options.runs) or 'runs'}.html"
    write_report(comparison, workspace, target)
    print(f"report: {target}\nnext: open it in a browser")


def _runs(options: argparse.Namespace) -> Workspace:
    """Return the workspace whose runs are compared, and say so if they are the demo's; standard output stays the tables'."""
    real = find_workspace(options.work)
    found = runs_workspace(real)
    if found != real and (found.root / "runs").is_dir():
        print(f"{real.root}: has no runs; these are the synthetic demo's, in {found.root}", file=sys.stderr)
    return found


def _run_ledger(options: argparse.Namespace) -> None:
    submissions = find_workspace(options.work).submissions
    with locked(submissions):
        if options.name:
            record(submissions, options.name, options.public, options.private)
        ledger = write_ledger(submissions)
    print(ledger.drop(columns="commit").to_string(index=False))
    print(f"ledger: {submissions / LEDGER}")
    print("next: python -m pcam_kaggle ledger NAME --public 0.9 --private 0.9 records scores")


def _run_submit(options: argparse.Namespace) -> None:
    file, description = describe(find_workspace(options.work).submissions, options.name)
    send(file, description)
    print(f"submit: {file}, {description}\nnext: make leaderboard, when Kaggle has scored it")


def _run_leaderboard(options: argparse.Namespace) -> None:
    submissions = find_workspace(options.work).submissions
    scored = scores()
    with locked(submissions):
        taken = take_scores(submissions, scored)
        ledger = write_ledger(submissions)
    print(ledger.drop(columns="commit").to_string(index=False))
    print(f"leaderboard: scores of {', '.join(taken) or 'none'} recorded in {submissions / LEDGER}")


def _run_kernel(options: argparse.Namespace) -> None:
    try:
        # nbformat belongs to development, and no other command needs it.
        from pcam_kaggle.kaggle.notebook import METADATA, ROOT, Settings, build, pack
    except ModuleNotFoundError as error:
        raise UserError(f"kernel: {error.name} is missing; use a clone, in which `make kernel-push` installs it") from None

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
        "--data": options.data if not options.demo and options.data != os.environ.get("PCAM_DATA") else None,
        "--work": options.work if options.work != os.environ.get("PCAM_WORK") else None,
        "-e": options.experiment,
        "--name": job.name if job.name != job.experiment else None,
        "--slides": options.slides,
        "--groups": options.groups,
        "--folds": ",".join(map(str, job.chosen)) if job.chosen and after != "submission" else None,
    }
    parts = ["--demo"] if options.demo else []
    parts += [part for key, value in given.items() if value for part in (key, str(value))]
    parts += [part for assignment in options.set for part in ("--set", assignment)]
    return "".join(f" {shlex.quote(part)}" for part in parts)


def _job(options: argparse.Namespace) -> Job:
    """Return the job that `options` ask for; the demo's patches are written once all else is known to be right."""
    real = find_workspace(options.work)
    found = None if options.demo else find_data(options.data, real.root)
    given = [f"-e {options.experiment}"] if options.experiment else []
    given += [f"--set {assignment}" for assignment in options.set]
    given += [f"--{name} {value}" for name in ("groups", "slides") if (value := getattr(options, name))]
    members = tuple(getattr(options, "members", ()))
    if found is None and given and not options.demo and not members:
        raise UserError(
            f"{given[0]}: no data of the competition found; name its folder with --data (make: DATA=), or add --demo (make: "
            "ARGS=--demo) for the synthetic demo"
        )
    # Runs are blended without the data that they were trained on.
    without_data = runs_workspace(real) if members and not options.demo else demo_workspace(real)
    workspace = real if found else without_data
    demo = workspace != real
    named = options.experiment or (DEMO if demo else DEFAULT)
    chosen = experiment(named)
    assignments = [*options.set, *([f"groups={options.groups}"] if options.groups else [])]
    name = options.name or ("-".join(members) if members else named)
    for text in (name, *members):
        if not PLAIN_NAME.fullmatch(text):
            raise UserError(f"{text!r} is no plain file name; use letters, digits, points, dashes and underscores")
    if options.slides and not options.slides.is_file():
        raise UserError(f"--slides {options.slides}: no such file")
    hours = getattr(options, "hours", None)
    job = Job(
        data=found or demo_data(workspace),
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
        budget=Budget.of_hours(hours) if hours else ENDLESS,
    )
    # The folds of runs that are blended are theirs, not this config's.
    if not members:
        job.folds()
    if demo:
        why = "" if options.demo else ", since no data of the competition was found"
        print(f"This is the synthetic demo in {workspace.root}{why}.", flush=True)
    if demo and not members:
        make_demo(job.data)
    return job


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    **dict.fromkeys([*STAGES, "pipeline"], _run_job),
    "compare": _run_compare,
    "report": _run_report,
    "ledger": _run_ledger,
    "submit": _run_submit,
    "leaderboard": _run_leaderboard,
    "kernel": _run_kernel,
    "data": _run_data,
}
