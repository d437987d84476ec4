"""What each command of `kaggle` does: data, kernel, submissions and scores."""

import argparse
import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from pcam_kaggle import UserError
from pcam_kaggle.config.experiments import DEFAULT
from pcam_kaggle.data.atomic_io import locked, read_json
from pcam_kaggle.data.layout import COMPETITION, Data, find_workspace
from pcam_kaggle.kaggle.archive import download
from pcam_kaggle.kaggle.client import logs, output, owner, push, scores, status, submit_file
from pcam_kaggle.kaggle.ledger import LEDGER_FILE, describe, record, record_scores, write_ledger
from pcam_kaggle.runs.import_run import import_runs

log = logging.getLogger(__name__)

# The competition's train and test patches.
PATCHES = (220_025, 57_458)


def _run_download(options: argparse.Namespace) -> None:
    data = Data(find_workspace(options.work).root / "data" / COMPETITION)
    log.info("data: %s%s", data.root, "" if download(data) else " (up to date)")
    log.info("next: make submission")


def _run_build(options: argparse.Namespace) -> None:
    notebook = _notebook()
    log.info("kernel: %s", notebook.build(notebook.ROOT))
    log.info("next: make kernel-push")


def _run_push(options: argparse.Namespace) -> None:
    notebook = _notebook()
    settings = notebook.Settings(options.experiment or DEFAULT, tuple(options.set), options.hours, options.seeds)
    if options.weights or any(change.startswith("weights=") for change in options.set):
        log.info("push: the session checks at its start whether the net of these weights fits")
    else:
        # torch takes seconds to import.
        from pcam_kaggle.training.capacity import KAGGLE_T4, check_capacity

        machine = replace(KAGGLE_T4, hours=options.hours)
        log.info("push: %s", check_capacity(notebook.trained_configs(settings), *PATCHES, machine))
    with tempfile.TemporaryDirectory() as folder:
        notebook.pack(notebook.ROOT, owner(), settings, options.resume, Path(folder), options.weights or "")
        log.info("%s", push(Path(folder)))
    log.info("next: make kernel-status, and when it is complete make kernel-output")


def _run_status(options: argparse.Namespace) -> None:
    print(status(_kernel()))


def _run_logs(options: argparse.Namespace) -> None:
    print(logs(_kernel()))


def _run_output(options: argparse.Namespace) -> None:
    workspace = find_workspace(options.work)
    with tempfile.TemporaryDirectory() as folder:
        output(_kernel(), Path(folder))
        imported = ", ".join(import_runs(Path(folder), workspace))
        written = [file.stem for file in sorted(Path(folder).glob("submissions/*.csv")) if file.name != LEDGER_FILE]
    log.info("kernel: %s imported into %s", imported or "nothing new", workspace.root / "runs")
    submits = " or ".join(f"make submit EXPERIMENT={name}" for name in written)
    log.info("next: %s", f"make compare, or {submits}" if written else "make kernel-push")


def _kernel() -> str:
    """Return the kernel's id, owner/slug."""
    notebook = _notebook()
    return f"{owner()}/{read_json(notebook.ROOT / notebook.METADATA, id=str)['id'].rpartition('/')[2]}"


def _notebook() -> ModuleType:
    """Return the module that builds the notebook; it needs nbformat, which only development installs."""
    try:
        from pcam_kaggle.kaggle import notebook
    except ModuleNotFoundError as error:
        raise UserError(f"kernel: {error.name} is missing; use a clone, in which `make kernel-push` installs it") from None
    return notebook


def _run_submit(options: argparse.Namespace) -> None:
    file, description = describe(find_workspace(options.work).submissions, options.name)
    submit_file(file, description)
    log.info("submit: %s, %s", file, description)
    log.info("next: make leaderboard, when Kaggle has scored it")


def _run_leaderboard(options: argparse.Namespace) -> None:
    submissions = find_workspace(options.work).submissions
    scored = scores()
    with locked(submissions):
        recorded = record_scores(submissions, scored)
        ledger = write_ledger(submissions)
    print(ledger.drop(columns="commit").to_string(index=False))
    log.info("leaderboard: scores of %s recorded in %s", ", ".join(recorded) or "none", submissions / LEDGER_FILE)


def _run_ledger(options: argparse.Namespace) -> None:
    submissions = find_workspace(options.work).submissions
    with locked(submissions):
        if options.name:
            record(submissions, options.name, options.public, options.private)
        ledger = write_ledger(submissions)
    print(ledger.drop(columns="commit").to_string(index=False))
    log.info("ledger: %s", submissions / LEDGER_FILE)
    log.info("next: python -m pcam_kaggle kaggle ledger NAME --public 0.9 --private 0.9 records scores")


KAGGLE_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "kaggle download": _run_download,
    "kaggle build": _run_build,
    "kaggle push": _run_push,
    "kaggle status": _run_status,
    "kaggle logs": _run_logs,
    "kaggle output": _run_output,
    "kaggle submit": _run_submit,
    "kaggle leaderboard": _run_leaderboard,
    "kaggle ledger": _run_ledger,
}
