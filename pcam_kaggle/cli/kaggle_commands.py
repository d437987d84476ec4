"""What each command of `kaggle` does: data, notebook, session, submissions and scores."""

import argparse
import logging
from collections.abc import Callable
from dataclasses import replace

from pcam_kaggle.core.errors import UserError, program
from pcam_kaggle.core.experiments import DEFAULT
from pcam_kaggle.core.files import locked, write
from pcam_kaggle.core.paths import COMPETITION, Data, find_workspace
from pcam_kaggle.kaggle.archive import download
from pcam_kaggle.kaggle.client import Client
from pcam_kaggle.kaggle.failures import Refused
from pcam_kaggle.kaggle.kernel import Kernel
from pcam_kaggle.kaggle.notebook import CELLS, NOTEBOOK, ROOT, Settings, notebook
from pcam_kaggle.kaggle.session import Session, fetch, finish, last_session, pending, session_file, start, submit_and_wait
from pcam_kaggle.pipeline.compare import print_result
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import describe, print_scores, record_score

log = logging.getLogger(__name__)


def _run_download(options: argparse.Namespace) -> None:
    data = Data(find_workspace(options.work).root / "data" / COMPETITION)
    log.info("data: %s%s", data.root, "" if download(data) else " (up to date)")
    log.info("next: make submission, or %s pipeline", program())


def _run_notebook(_: argparse.Namespace) -> None:
    if not CELLS.is_file():
        raise UserError(f"{CELLS}: no such file; run the command in a clone of the repository")
    write(ROOT / NOTEBOOK, lambda file: file.write(notebook()))
    log.info("notebook: %s", ROOT / NOTEBOOK)
    log.info("next: make kaggle")


def _run_run(options: argparse.Namespace) -> None:
    workspace, client = find_workspace(options.work), _log_in()
    file = session_file(workspace, Kernel(title=options.title).slug())
    with locked(file.with_suffix("")):
        kernel, session = start(client, _kernel(options, last_session(workspace, file.stem)), workspace)
        if options.detach:
            log.info("next: repeat the command without --detach, which follows and downloads the session")
            return
        if session:
            finish(client, session, workspace)
        print_result(workspace, [*kernel.recipes()])
        if Run(workspace.run(kernel.plan.name)).missing_folds():
            log.info("next: repeat the command with --resume (make: in ARGS), which trains what is missing")
        elif options.submit:
            submit_and_wait(client, workspace, kernel.plan.name)
        else:
            log.info("next: repeat the command with --submit (make: in ARGS)")


def _kernel(options: argparse.Namespace, last: Session | None) -> Kernel:
    """Return the kernel of `options`; those that say what to train are those of the `last` session if none is given."""
    name, changes = options.experiment or DEFAULT, tuple(options.set)
    kernel = Kernel(Settings(name, changes, seeds=options.seeds, slides=options.slides, name=options.name), options.weights)
    if last and (options.resume or options.submit) and not options.experiment:
        if kernel == Kernel() and last.recipes:
            log.info("settings: those of the last session, which makes %s", last.run)
            kernel = last.request
        elif options.resume and [*kernel.recipes().values()] != [*last.recipes.values()]:
            raise UserError(f"--resume: the last session made {last.run}; say with -e and its options what to resume")
    settings = replace(kernel.settings, hours=options.hours or kernel.settings.hours)
    accelerator, public = options.accelerator or kernel.accelerator, options.public or kernel.public
    offline = options.no_internet or kernel.offline
    return Kernel(settings, kernel.weights, options.resume, accelerator, public, options.title, offline)


def _run_status(options: argparse.Namespace) -> None:
    client = _log_in()
    log.info("quota: %s", client.quota() or "unknown")
    name = _name(client, options)
    try:
        log.info("session: %s is %s", name, client.status(name))
    except Refused as error:
        log.info("session: none (%s)", error)
    for piece in client.follow_log(name) if options.log else ():
        print(piece, end="" if piece.endswith("\n") else "\n", flush=True)


def _run_fetch(options: argparse.Namespace) -> None:
    client, workspace = Client(), find_workspace(options.work)
    name = _name(client, options)
    fetch(client, name, workspace, pending(client, workspace, name))
    log.info("next: make compare, or %s kaggle submit NAME", program())


def _run_submit(options: argparse.Namespace) -> None:
    workspace = find_workspace(options.work)
    last = None if options.name else last_session(workspace, Kernel(title=options.title).slug())
    if last and not Run(workspace.run(last.run)).session_file.is_file():
        raise UserError(f"{last}: its run is not here; run `{program()} kaggle fetch`, or name the submission")
    file, description = describe(workspace.submissions, options.name or (last.run if last else DEFAULT))
    Client().submit(file, description)
    log.info("submit: %s, %s", file, description)
    log.info("next: %s kaggle scores, when Kaggle has scored it", program())


def _run_scores(options: argparse.Namespace) -> None:
    workspace = find_workspace(options.work)
    if bool(options.name) != ((options.public, options.private) != (None, None)):
        raise UserError("kaggle scores: a score recorded by hand needs NAME and --public or --private")
    if not options.name:
        print_scores(workspace, Client().submissions())
        return
    with locked(workspace.submissions):
        file = workspace.submissions / f"{options.name}.csv"
        record_score(file, public_score=options.public, private_score=options.private)
    print_scores(workspace)


def _log_in() -> Client:
    client = Client()
    client.check_rules()
    log.info("login: %s, who has joined the competition", client.owner)
    return client


def _name(client: Client, options: argparse.Namespace) -> str:
    return f"{client.owner}/{Kernel(title=options.title).slug()}"


KAGGLE_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "kaggle run": _run_run,
    "kaggle status": _run_status,
    "kaggle fetch": _run_fetch,
    "kaggle submit": _run_submit,
    "kaggle scores": _run_scores,
    "kaggle notebook": _run_notebook,
    "kaggle download": _run_download,
}
