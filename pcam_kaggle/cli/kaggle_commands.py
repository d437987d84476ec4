"""What each command of `kaggle` does: data, kernel, submissions and scores."""

import argparse
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import DEFAULT
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.paths import COMPETITION, Data, find_workspace
from pcam_kaggle.kaggle.archive import download
from pcam_kaggle.kaggle.client import Client
from pcam_kaggle.runs.submissions import LEDGER_FILE, describe, print_scores, record_score, write_ledger

if TYPE_CHECKING:
    from pcam_kaggle.kaggle.kernel import Kernel

log = logging.getLogger(__name__)


def _run_download(options: argparse.Namespace) -> None:
    data = Data(find_workspace(options.work).root / "data" / COMPETITION)
    log.info("data: %s%s", data.root, "" if download(data) else " (up to date)")
    log.info("next: make submission")


def _run_build(options: argparse.Namespace) -> None:
    notebook = _development("notebook")
    log.info("kernel: %s", notebook.build(notebook.ROOT))
    log.info("next: make kaggle")


def _run_run(options: argparse.Namespace) -> None:
    steps = _development("run_kernel")
    steps.run_kernel(_kernel(options), find_workspace(options.work), options.submit)


def _run_check(options: argparse.Namespace) -> None:
    client = Client()
    client.check_rules()
    log.info("login: %s, who has joined the competition", client.owner)
    log.info("quota: %s", client.quota() or "unknown")


def _run_push(options: argparse.Namespace) -> None:
    steps, session = _development("run_kernel"), _development("session")
    kernel = _kernel(options)
    file = session.session_file(find_workspace(options.work), kernel.slug())
    with locked(file.with_suffix("")):
        steps.push_kernel(Client(), kernel, file)
    log.info("next: the same options with `kaggle run` instead of `kaggle push`, which follows and downloads it")


def _run_status(options: argparse.Namespace) -> None:
    client = Client()
    name = _name(client, options)
    status = client.status(name)
    print(f"{name}: {status.name}{f', {status.failure}' if status.failure else ''}")


def _run_logs(options: argparse.Namespace) -> None:
    client = Client()
    for piece in client.follow_log(_name(client, options)):
        print(piece, end="" if piece.endswith("\n") else "\n", flush=True)


def _run_output(options: argparse.Namespace) -> None:
    steps, session = _development("run_kernel"), _development("session")
    client, workspace = Client(), find_workspace(options.work)
    name = _name(client, options)
    is_over = client.status(name).is_over
    submissions = steps.import_output(client, name, workspace)
    if is_over:
        session.session_file(workspace, name.rpartition("/")[2]).unlink(missing_ok=True)
    submits = " or ".join(f"make submit EXPERIMENT={name}" for name in submissions)
    log.info("next: %s", f"make compare, or {submits}" if submits else "make kernel-push")


def _kernel(options: argparse.Namespace) -> "Kernel":
    """Return the kernel that the options of a push ask for."""
    module = _development("kernel")
    changes = tuple(options.set)
    settings = module.Settings(options.experiment or DEFAULT, changes, options.hours, options.seeds, options.internet)
    return module.Kernel(settings, options.weights or "", options.resume, options.accelerator, options.public, options.title)


def _name(client: Client, options: argparse.Namespace) -> str:
    """Return the kernel's id, owner/slug."""
    return f"{client.owner}/{_development('kernel').Kernel(title=options.title).slug()}"


def _development(name: str) -> ModuleType:
    """Return the module `kaggle.name`, which builds the notebook and so needs nbformat, which only development installs."""
    try:
        return importlib.import_module(f"pcam_kaggle.kaggle.{name}")
    except ModuleNotFoundError as error:
        raise UserError(f"kernel: {error.name} is missing; use a clone, in which `make kaggle` installs it") from None


def _run_submit(options: argparse.Namespace) -> None:
    file, description = describe(find_workspace(options.work).submissions, options.name)
    Client().submit(file, description)
    log.info("submit: %s, %s", file, description)
    log.info("next: make leaderboard, when Kaggle has scored it")


def _run_leaderboard(options: argparse.Namespace) -> None:
    print_scores(find_workspace(options.work), Client().submissions())


def _run_ledger(options: argparse.Namespace) -> None:
    submissions = find_workspace(options.work).submissions
    with locked(submissions):
        if options.name:
            record_score(submissions, options.name, options.public, options.private)
        ledger = write_ledger(submissions)
    print(ledger.drop(columns="commit").to_string(index=False))
    log.info("ledger: %s", submissions / LEDGER_FILE)
    log.info("next: python -m pcam_kaggle kaggle ledger NAME --public 0.9 --private 0.9 records scores")


KAGGLE_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "kaggle run": _run_run,
    "kaggle check": _run_check,
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
