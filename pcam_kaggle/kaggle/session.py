"""A session on Kaggle: pushed, followed, downloaded, submitted and scored. Interrupted, the same command resumes it."""

import contextlib
import logging
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from pcam_kaggle.core.errors import UserError, examples, program
from pcam_kaggle.core.logs import status_line
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.core.records import Record
from pcam_kaggle.kaggle.client import Client, Status
from pcam_kaggle.kaggle.failures import Refused, Unreachable
from pcam_kaggle.kaggle.kernel import Kernel, check_kernel, pack
from pcam_kaggle.kaggle.notebook import MARK_FILE
from pcam_kaggle.runs.import_run import import_runs
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import SubmissionRecord, describe, print_scores

log = logging.getLogger(__name__)

# A session is started if the quota has the least hours, and leaves the spare ones, since it ends a little after its time.
LEAST_HOURS, SPARE_HOURS = 0.5, 0.2
# Between two requests of a session's status or of a submission's score.
POLL_SECONDS = 20.0
# For which Kaggle may be unreachable or refuse a request while a session is followed, and for which a score is awaited.
PATIENCE_SECONDS = 1800.0
# For which Kaggle may still show what was before a push or a submission.
LAG_SECONDS = 600.0
Reply = TypeVar("Reply")


class Session(Record):
    """The last session of a pushed kernel (owner/slug), or the one that a run was imported from.

    It makes `run` and its members, as `request` asks, each of its recipe. `mark` is a text in its notebook and its output, by
    which the version is found if it is 0: the push is not confirmed yet. It `is_over` if it has failed or is downloaded.
    `pushed` is when it was pushed, and `sent` when its submission was sent last, in seconds since 1970.
    """

    kernel: str
    run: str
    mark: str
    version: int = 0
    is_over: bool = False
    pushed: float = 0.0
    sent: float = 0.0
    request: Kernel = Kernel()
    recipes: dict[str, list[Any]] = {}

    def __str__(self) -> str:
        return f"{self.run}, version {self.version} of {self.kernel}"

    def updated(self, workspace: Workspace, **fields: float) -> "Session":
        """Write the session with other `fields` as the last one of its kernel, and return it."""
        session = self.model_copy(update=fields)
        session.write(session_file(workspace, self.kernel))
        return session


def session_file(workspace: Workspace, kernel: str) -> Path:
    """Return the file of the last session of `kernel`, named by its id or its slug."""
    return workspace.root / "sessions" / f"{kernel.rpartition('/')[2]}.json"


def last_session(workspace: Workspace, kernel: str) -> Session | None:
    """Return the kernel's last session; None if there was none."""
    file = session_file(workspace, kernel)
    return Session.read(file) if file.is_file() else None


def start(client: Client, kernel: Kernel, workspace: Workspace) -> tuple[Kernel, Session | None]:
    """Return `kernel`, renamed if its name is taken, and its session, None if it needs none; UserError if it has another."""
    session = pending(client, workspace, kernel.slug())
    other = replace(kernel, settings=replace(kernel.settings, name=f"{kernel.name}-kaggle"))
    if session:
        if session.recipes not in (kernel.recipes(), other.recipes()):
            file = session_file(workspace, kernel.slug())
            choices = f"continue it with its options, use --title for a second notebook, or delete {file} to give it up"
            raise UserError(f"{session}: was started and is not downloaded yet; {choices}")
        log.info("push: %s (up to date)", session)
        return session.request, session
    is_own, has_other = _is_own(workspace, kernel), _is_own(workspace, other)
    if is_own is False or (is_own is None and has_other):
        if has_other is False:
            raise UserError(f"{workspace.run(other.plan.name)}: made in another way; choose a name for the new run with --name")
        log.info("run: %s, since there is or was another %s", other.plan.name, kernel.plan.name)
        kernel = other
    # What lacks folds or runs is left as it is unless it is to be resumed.
    made = [_made(workspace, name) for name in kernel.recipes()]
    is_made = made[0] or kernel.recipes() in made
    if Run(workspace.run(kernel.plan.name)).missing_folds() == 0 or (is_made and not kernel.resume):
        log.info("output: %s (up to date)", workspace.run(kernel.plan.name))
        return kernel, None
    check_kernel(kernel)
    quota, hours = client.quota(), kernel.settings.hours
    if quota and quota.left < LEAST_HOURS:
        raise UserError(f"quota: {quota}, and a session needs half an hour; wait until the quota is renewed")
    if quota:
        hours = min(hours, round(quota.left - SPARE_HOURS, 1))
    log.info("quota: %s; the session ends after %.1f", quota or "unknown", hours)
    return kernel, _push(client, kernel, hours, workspace)


def finish(client: Client, session: Session, workspace: Workspace) -> None:
    """Follow `session` and import the runs that it has saved; UserError if it has failed or saved none."""
    status = _follow(client, session)
    fetch(client, session.kernel, workspace, session)
    if status.name != "COMPLETE":
        raise UserError(f"{session}: ended as {status}; what it saved is imported, repeat the command with --resume")


def fetch(client: Client, name: str, workspace: Workspace, session: Session | None = None) -> None:
    """Import what `session` of the kernel `name` (owner/slug) has saved, or its latest session, whichever that is, if None."""
    if session is None and (last := last_session(workspace, name)) and _has_mark(client, last):
        session = last
    version = session.version if session else 0
    status = client.status(name, version)
    has_output = session is None or _has_mark(client, session)
    latest = version if has_output or client.tells_versions else client.source(name)[0]
    # A session that is running or has failed may have saved nothing.
    if not has_output and (latest != version or status.name == "COMPLETE"):
        problem = f"Kaggle shows another output, perhaps that of the latest version, {latest}; repeat the command later"
        raise UserError(f"{session}: {problem}, or delete {session_file(workspace, name)} and use `kaggle fetch`")
    with tempfile.TemporaryDirectory() as folder:
        if has_output:
            client.output(name, Path(folder), version)
        if not Path(folder, "runs").is_dir():
            if session:
                session.updated(workspace, is_over=status.is_over)
            problem = f"{'ended as' if status.is_over else 'is'} {status} and has saved no runs"
            raise UserError(f"{session or name}: {problem}; read its log with `{program()} kaggle status --log`")
        imported = ", ".join(import_runs(Path(folder), workspace))
        saved = [Run(path) for path in sorted(Path(folder, "runs").iterdir())]
        if session:
            _mark(session, saved, workspace)
            session.updated(workspace, is_over=status.is_over)
    log.info("output: %s imported into %s", imported or "nothing new", workspace.root / "runs")
    for run in [Run(workspace.run(run.name)) for run in saved]:
        for entry in run.environments()[-1:]:
            log.info("%s: %s", run.name, entry)


def _mark(session: Session, saved: list[Run], workspace: Workspace) -> None:
    """Write `session` into the runs here that are copies of those it has `saved`; UserError if that of its plan is another."""
    for other in saved:
        run = Run(workspace.run(other.name))
        if run.name in session.recipes and run.is_copy_of(other):
            session.write(run.session_file)
        # A member of a blend may have been trained here as well.
        elif run.name == session.run and run.folder.is_dir():
            raise UserError(f"{run.folder}: is another run than that of {session}; move it away and repeat the command")


def submit_and_wait(client: Client, workspace: Workspace, run: str) -> None:
    """Submit all folds of `run` unless Kaggle has them, wait up to half an hour for the scores, record and print them."""
    file, description = describe(workspace.submissions, run)
    record, mark = Run(workspace.run(run)).session_file, SubmissionRecord.read(file.with_suffix(".json")).mark
    session = Session.read(record)

    def ask() -> tuple[pd.DataFrame, pd.DataFrame]:
        found = client.submissions()
        return found, found[found["description"].str.endswith(mark)]

    # One that was sent a moment ago may not be listed yet.
    lag, text = session.sent + LAG_SECONDS - time.time(), f"submit: {file} was sent, and Kaggle does not list it yet"
    _, own = _poll(ask, lambda reply: not (reply[1]["status"] == "error").all(), lag, text)
    # One that Kaggle could not score is submitted again.
    if (failed := own["status"] == "error").all():
        session.model_copy(update={"sent": time.time()}).write(record)
        try:
            client.submit(file, description)
        except Refused:
            session.write(record)
            raise
        log.info("submit: %s, %s", file, description)
        _, own = _poll(ask, lambda reply: len(reply[1]) > len(failed), LAG_SECONDS, text)
        if len(own) == len(failed):
            raise UserError(f"{file}: accepted but not listed, as when the day's submissions are used up; repeat it tomorrow")
    else:
        log.info("submit: %s was submitted before", file)
    text = "submit: waiting for the scores"
    found, own = _poll(ask, lambda reply: (reply[1]["status"][:1] != "pending").any(), PATIENCE_SECONDS, text)
    if (own["status"][:1] == "error").any():
        session.model_copy(update={"sent": 0.0}).write(record)
        raise UserError(f"{file}: Kaggle can't score it: {own['error_description'].iloc[0] or 'no reason given'}")
    if not (own["status"][:1] == "complete").any():
        raise UserError(f"{file}: not scored for half an hour; run `{program()} kaggle scores` later")
    print_scores(workspace, found)


def _poll(ask: Callable[[], Reply], is_reached: Callable[[Reply], bool], seconds: float, text: str) -> Reply:
    """Return the reply of `ask`, called until `is_reached` by it or for `seconds`; `text` is shown meanwhile."""
    until = time.monotonic() + seconds
    with status_line() as show:
        while not is_reached(reply := ask()) and time.monotonic() < until:
            show(text)
            time.sleep(POLL_SECONDS)
    return reply


def _is_own(workspace: Workspace, kernel: Kernel) -> bool | None:
    """Return whether what has the name of `kernel` here is from a session that makes the same; None if nothing has it."""
    name = kernel.plan.name
    run = Run(workspace.run(name))
    if run.is_experiment or run.has_score or (workspace.submissions / f"{name}.csv").exists():
        return _made(workspace, name).get(name) == kernel.recipes()[name]
    return None


def _made(workspace: Workspace, name: str) -> dict[str, list[Any]]:
    """Return the recipes of the session that the run `name` was imported from; empty if it was made here."""
    file = Run(workspace.run(name)).session_file
    return Session.read(file).recipes if file.is_file() else {}


def pending(client: Client, workspace: Workspace, slug: str) -> Session | None:
    """Return the kernel's session that is not downloaded yet; None if there is none, or if its push did not arrive."""
    session = last_session(workspace, slug)
    if session is None or session.is_over:
        return None
    if session.version:
        return session
    seconds, text = session.pushed + LAG_SECONDS - time.time(), "push: had no reply, and Kaggle does not show the version yet"
    latest, source = _poll(lambda: client.source(session.kernel), lambda reply: session.mark in reply[1], seconds, text)
    return session.updated(workspace, version=latest) if session.mark in source else None


def _push(client: Client, kernel: Kernel, hours: float, workspace: Workspace) -> Session:
    slug = kernel.slug()
    mark, last, file = f"push {secrets.token_hex(8)}", last_session(workspace, slug), session_file(workspace, slug)
    recipes = kernel.recipes()
    for spec in kernel.plan.trained:
        run, is_own = Run(workspace.run(spec.name)), _made(workspace, spec.name).get(spec.name) == recipes[spec.name]
        if run.is_experiment and not is_own and run.made_from().config != asdict(spec.config):
            raise UserError(f"{run.folder}: has another config than {kernel.plan.name} blends; move it away, or use --work")
    if kernel.resume and not (last and last.recipes.keys() & recipes.keys()):
        log.warning("--resume: the last session (%s) did not make %s: it may start from zero", last or "unknown", kernel.name)
    with tempfile.TemporaryDirectory() as folder:
        name = pack(replace(kernel, settings=replace(kernel.settings, hours=hours, mark=mark)), client.owner, Path(folder))
        session = Session(kernel=name, run=kernel.plan.name, mark=mark, request=kernel, recipes=recipes)
        # If Kaggle's reply does not arrive, `pending` recognises the pushed version by its mark.
        session.updated(workspace, pushed=time.time())
        try:
            version, url, left_out = client.push(Path(folder))
        except Refused:
            last.updated(workspace) if last else file.unlink()
            raise
    session = session.updated(workspace, version=version)
    log.info("push: %s at %s", session, url)
    if left_out:
        problem = f"Kaggle left out {len(left_out):,} of the sources as not valid: {examples(left_out)}"
        raise UserError(f"kaggle push: {problem}; stop the session at {url}, delete {file}, correct the sources, push again")
    return session


def _follow(client: Client, session: Session) -> Status:
    """Show the status of `session` and the last line of its log until it is over; return its last status."""
    lines, over = [""], threading.Event()
    answered = recognised = time.monotonic()
    # The stream of the log blocks, and may be that of the version before until the session runs.
    log_reader = threading.Thread(target=_read_log, args=(client, session.kernel, lines, over), daemon=True)
    try:
        with status_line() as show:
            while True:
                try:
                    status = client.status(session.kernel, session.version)
                    # A session that has failed may have saved nothing.
                    needs_mark = status.name == "COMPLETE" or (status.is_over and not client.tells_versions)
                    is_own = not needs_mark or _has_mark(client, session)
                # Right after its push, Kaggle may show no such notebook.
                except (Refused, Unreachable) as error:
                    if time.monotonic() - answered >= PATIENCE_SECONDS:
                        raise
                    show(f"{error}; the session continues, and its status is requested again")
                else:
                    answered = time.monotonic()
                    if status.name == "RUNNING" and log_reader.ident is None:
                        log_reader.start()
                    recognised = answered if is_own else recognised
                    text = f"{status}, {lines[-1]}" if lines[-1] else f"{status}"
                    show(f"{session}: {text if is_own else 'Kaggle shows another version, which it may do for minutes'}")
                    if status.is_over and (is_own or answered - recognised >= LAG_SECONDS):
                        return status
                time.sleep(POLL_SECONDS)
    finally:
        over.set()


def _has_mark(client: Client, session: Session) -> bool:
    """Return whether the output that Kaggle shows of `session` is its own."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Refused):
        client.output(session.kernel, Path(folder), session.version, [MARK_FILE])
        file = Path(folder, MARK_FILE)
        return file.is_file() and file.read_text(encoding="utf-8") == session.mark
    return False


def _read_log(client: Client, kernel: str, lines: list[str], over: threading.Event) -> None:
    """Append the last line of each piece of the log of `kernel` to `lines` until `over` is set."""
    while not over.wait(POLL_SECONDS):
        with contextlib.suppress(UserError):
            for piece in client.follow_log(kernel):
                lines += piece.strip().splitlines()[-1:]
