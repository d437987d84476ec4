"""A session on Kaggle: pushed, followed, downloaded, submitted and scored. Interrupted, the same command resumes it."""

import contextlib
import itertools
import logging
import secrets
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from pcam_kaggle.core.errors import UserError, examples, program
from pcam_kaggle.core.experiments import experiment
from pcam_kaggle.core.logs import status_line
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.core.records import Record
from pcam_kaggle.kaggle.client import Client, Status
from pcam_kaggle.kaggle.failures import Refused, Unreachable
from pcam_kaggle.kaggle.kernel import Kernel, check_kernel, pack
from pcam_kaggle.runs.import_run import import_runs
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import SubmissionRecord, describe, print_scores

log = logging.getLogger(__name__)

# A session is started if the quota has the least hours, and leaves the spare ones, since it ends a little after its time.
LEAST_HOURS, SPARE_HOURS = 0.5, 0.2
# Between two requests of a session's status or of a submission's score.
POLL_SECONDS = 20.0
# For which Kaggle may be unreachable while a session is followed, and for which a score is awaited.
PATIENCE_SECONDS = 1800.0


class Session(Record):
    """The session of a pushed kernel (owner/slug) whose output is not downloaded yet.

    It makes `run`. `mark` is a text in its notebook; by it the version is found if it is 0: the push is not confirmed yet.
    """

    kernel: str
    run: str
    mark: str
    version: int = 0

    def __str__(self) -> str:
        return f"{self.run}, version {self.version} of {self.kernel}"

    def confirmed(self, version: int, file: Path) -> "Session":
        """Write the session with its `version` to `file` and return it."""
        session = self.model_copy(update={"version": version})
        session.write(file)
        return session


def session_file(workspace: Workspace, slug: str) -> Path:
    """Return the file of the kernel's session, which exists until its output is downloaded."""
    return workspace.root / "sessions" / f"{slug}.json"


def start(client: Client, kernel: Kernel, workspace: Workspace) -> Session | None:
    """Return the session of `kernel`: the one that is not downloaded yet, or a new one; None if the run needs none."""
    file = session_file(workspace, kernel.slug())
    session = _pending(client, file)
    if session and session.run != kernel.plan.name:
        choices = f"continue it with `kaggle run`, use --title for a second notebook, or delete {file} to give it up"
        raise UserError(f"{session}: was started and is not downloaded yet; {choices}")
    if session:
        log.info("push: %s (up to date)", session)
        return session
    if _is_trained(workspace, kernel):
        log.info("output: %s (up to date)", workspace.run(kernel.plan.name))
        return None
    check_kernel(kernel)
    quota, hours = client.quota(), kernel.settings.hours
    if quota and quota.left < LEAST_HOURS:
        raise UserError(f"quota: {quota}, and a session needs half an hour; wait until the quota is renewed")
    if quota:
        hours = min(hours, round(quota.left - SPARE_HOURS, 1))
    log.info("quota: %s; the session ends after %.1f", quota or "unknown", hours)
    return _push(client, replace(kernel, settings=replace(kernel.settings, hours=hours)), file)


def finish(client: Client, session: Session, kernel: Kernel, workspace: Workspace) -> None:
    """Follow `session` and import the runs that it has saved; one that fails is forgotten, and the command starts a new one."""
    file = session_file(workspace, kernel.slug())
    status = _follow(client, session)
    if status.name != "COMPLETE":
        file.unlink()
        advice = f"read its log with `{program()} kaggle status --log` and repeat the command for a new session"
        raise UserError(f"{session}: ended as {status}; {advice}")
    fetch(client, session.kernel, workspace, kernel)
    file.unlink()


def fetch(client: Client, name: str, workspace: Workspace, kernel: Kernel | None = None) -> None:
    """Import the runs that the last session of the kernel `name` (owner/slug) has saved, some of them those of `kernel`."""
    with tempfile.TemporaryDirectory() as folder:
        client.output(name, Path(folder))
        found = sorted(path.name for path in Path(folder, "runs").iterdir() if path.is_dir())
        if kernel and not set(found) & set(kernel.runs):
            raise UserError(f"{name}: has saved {examples(found)}, not {kernel.plan.name}; another version was started since")
        imported = ", ".join(import_runs(Path(folder), workspace))
    log.info("output: %s imported into %s", imported or "nothing new", workspace.root / "runs")
    for run in (Run(workspace.run(each)) for each in found):
        for entry in run.environments()[-1:]:
            log.info("%s: %s", run.name, entry)


def is_complete(workspace: Workspace, name: str) -> bool:
    """Return whether the run `name` is blended of all its folds."""
    run = Run(workspace.run(name))
    return run.has_score and not run.blend_metrics().missing_folds


def submit_and_wait(client: Client, workspace: Workspace, run: str) -> None:
    """Submit all folds of `run` unless Kaggle has them, wait up to half an hour for the scores, record and print them."""
    file, description = describe(workspace.submissions, run)
    mark = SubmissionRecord.read(file.with_suffix(".json")).mark
    # One that Kaggle could not score is submitted again.
    if (_of(client.submissions(), mark)["status"] == "error").all():
        client.submit(file, description)
        log.info("submit: %s, %s", file, description)
    else:
        log.info("submit: %s was submitted before", file)
    until = time.monotonic() + PATIENCE_SECONDS
    with status_line() as show:
        while True:
            found = client.submissions()
            own = _of(found, mark)[:1]
            if (own["status"] == "complete").any():
                break
            if (own["status"] == "error").any():
                raise UserError(f"{file}: Kaggle can't score it: {own['error_description'].item() or 'no reason given'}")
            if time.monotonic() >= until:
                raise UserError(f"{file}: not scored for half an hour; run `{program()} kaggle scores` later")
            show("submit: waiting for the scores")
            time.sleep(POLL_SECONDS)
    print_scores(workspace, found)


def _of(found: pd.DataFrame, mark: str) -> pd.DataFrame:
    return found[found["description"].str.endswith(mark)]


def _is_trained(workspace: Workspace, kernel: Kernel) -> bool:
    """Return whether no session is needed: the run is complete, or exists and is not to be resumed."""
    if is_complete(workspace, kernel.plan.name):
        return True
    # Members of a blend may have been trained for themselves.
    names = [kernel.plan.name] if experiment(kernel.settings.experiment).members else kernel.runs
    runs = [Run(workspace.run(name)) for name in names]
    return not kernel.resume and any(run.is_experiment or run.has_score for run in runs)


def _pending(client: Client, file: Path) -> Session | None:
    """Return the session in `file`; None if there is none, or if its push did not arrive."""
    if not file.is_file():
        return None
    session = Session.read(file)
    if session.version:
        return session
    version = client.current_version(session.kernel, session.mark)
    return session.confirmed(version, file) if version else None


def _push(client: Client, kernel: Kernel, file: Path) -> Session:
    with tempfile.TemporaryDirectory() as folder:
        mark = f"push {secrets.token_hex(8)}"
        session = Session(kernel=pack(kernel, client.owner, Path(folder), mark), run=kernel.plan.name, mark=mark)
        # If Kaggle's reply does not arrive, `_pending` recognises the pushed version by its mark.
        session.write(file)
        try:
            version, url = client.push(Path(folder))
        except Refused:
            file.unlink()
            raise
    session = session.confirmed(version, file)
    log.info("push: %s at %s", session, url)
    return session


def _follow(client: Client, session: Session) -> Status:
    """Show the status of `session` and the last line of its log until it is over; return its last status."""
    lines, over, answered = [""], threading.Event(), time.monotonic()
    # The stream of the log blocks, and does not tell when a session has failed to start.
    threading.Thread(target=_read_log, args=(client, session.kernel, lines, over), daemon=True).start()
    try:
        with status_line() as show:
            while True:
                try:
                    status = client.status(session.kernel)
                except Unreachable as error:
                    if time.monotonic() - answered >= PATIENCE_SECONDS:
                        raise
                    show(f"{error}; the session continues, and its status is requested again")
                else:
                    answered = time.monotonic()
                    show(f"{session}: {status}, {lines[-1]}" if lines[-1] else f"{session}: {status}")
                    if status.is_over:
                        return status
                time.sleep(POLL_SECONDS)
    finally:
        over.set()


def _read_log(client: Client, kernel: str, lines: list[str], over: threading.Event) -> None:
    """Append the last line of each piece of the log of `kernel` to `lines` until `over` is set."""
    seen = 0
    while not over.wait(POLL_SECONDS):
        with contextlib.suppress(UserError):
            # A new connection starts at the first piece.
            for piece in itertools.islice(client.follow_log(kernel), seen, None):
                seen += 1
                lines += piece.strip().splitlines()[-1:]
