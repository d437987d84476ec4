"""An experiment on Kaggle in one command: check, push, follow, download, compare, submit. Interrupted, it can be resumed."""

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.experiments import experiment
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.logs import status_line
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.kaggle.client import COMPLETE, Client, Quota
from pcam_kaggle.kaggle.kernel import Kernel, check_kernel
from pcam_kaggle.kaggle.session import (
    Session,
    follow,
    pending_session,
    session_file,
    start_session,
)
from pcam_kaggle.pipeline.compare import print_result
from pcam_kaggle.runs.import_run import import_runs
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import LEDGER_FILE, describe, print_scores, read_submissions
from pcam_kaggle.training.capacity import ACCELERATORS, Needs, check_capacity, kaggle_machine

log = logging.getLogger(__name__)

# The competition's train and test patches.
PATCHES = (220_025, 57_458)
# Hours of the quota that a session leaves, since it ends a little after its time.
SPARE_HOURS = 0.2
# Seconds between two questions for the score of a submission.
SCORE_SECONDS = 10.0
# Seconds after which a score is no longer waited for.
SCORE_PATIENCE = 1800.0


def run_kernel(kernel: Kernel, workspace: Workspace, submit: bool) -> None:
    """Run an experiment on Kaggle up to its scores; finished steps are not repeated.

    Args:
        kernel: What the user asks for.
        workspace: Where runs and submissions are written, and the file that describes the session.
        submit: Whether to submit its submission and to wait for the scores.

    Raises:
        UserError: A step fails, a session of another experiment is not downloaded yet, or another process works on the kernel.
    """
    client = Client()
    client.check_rules()
    log.info("login: %s, who has joined the competition", client.owner)
    file = session_file(workspace, kernel.slug())
    with locked(file.with_suffix("")):
        session = pending_session(client, file)
        if session and session.run != kernel.run:
            raise _not_downloaded(session, file)
        if session is None and _is_trained(workspace, kernel):
            log.info("output: %s (up to date)", workspace.run(kernel.run))
        else:
            if session is None:
                session = push_kernel(client, kernel, file)
            _wait(client, session, file)
            import_output(client, session.kernel, workspace, kernel)
            file.unlink()
        show(workspace, kernel)
        if not is_complete(workspace, kernel.run):
            log.info("next: repeat the command with --resume (make: in ARGS), which trains what is missing")
        elif submit:
            submit_and_wait(client, workspace, submission_of(workspace, kernel.run))
        else:
            log.info("next: repeat the command with --submit (make: in ARGS)")


def check_request(kernel: Kernel) -> Needs | None:
    """Check, without Kaggle, that a session can run `kernel`; return what it needs, None if only the session can know.

    Raises:
        UserError: As `check_kernel` and `check_capacity`.
    """
    check_kernel(kernel, [*ACCELERATORS])
    settings = kernel.notebook_settings
    if any(change.startswith("weights=") for change in settings.changes):
        log.info("needs: the session checks at its start whether the net of these weights fits")
        return None
    needs = check_capacity([part.config for part in kernel.parts], *PATCHES, kaggle_machine(kernel.accelerator, settings.hours))
    log.info("%s: %s", kernel.run, needs)
    return needs


def push_kernel(client: Client, kernel: Kernel, file: Path) -> Session:
    """Push `kernel` with at most the hours that the quota leaves, and describe its session in `file`.

    Raises:
        UserError: The quota is too small, a session is not downloaded yet, or as `check_request` and `start_session`.
    """
    if session := pending_session(client, file):
        raise _not_downloaded(session, file)
    needs = check_request(kernel)
    quota = client.quota()
    hours = kernel.settings.hours
    if quota is None:
        log.info("quota: unknown")
    else:
        hours = allowed_hours(quota, hours, needs)
        log.info("quota: %s; the session ends after %.1f", quota, hours)
    limited = replace(kernel, settings=replace(kernel.settings, hours=hours))
    session = start_session(client, limited, file)
    log.info("push: %s at %s", session, session.url)
    return session


def allowed_hours(quota: Quota, hours: float, needs: Needs | None) -> float:
    """Return how many of the asked `hours` a session may take.

    Raises:
        UserError: The quota leaves less than `hours` and less than the session needs.
    """
    left = round(quota.left - SPARE_HOURS, 1)
    if hours <= left:
        return hours
    least = needs.hours if needs else 0.0
    if left <= 0 or left < least:
        need = f"the session needs at least {least:.1f}" if needs else "none can be started"
        shorter = f", or train the folds that fit with --hours {left}" if needs and left >= needs.least_hours else ""
        renewed = "until it is renewed" if quota.renewed is None else f"until {quota.renewed:%Y-%m-%d %H:%M} UTC"
        raise UserError(f"quota: {quota}, {need}; wait {renewed}{shorter}")
    return left


def import_output(client: Client, name: str, workspace: Workspace, kernel: Kernel | None = None) -> list[str]:
    """Download what the last session of the kernel `name` (owner/slug) has saved, verify it, and import its runs.

    Args:
        client: Kaggle.
        name: The kernel's id.
        workspace: Where to copy the runs.
        kernel: What the session was asked for, of which it must have saved a run; None for anything.

    Returns:
        The names of its submissions.

    Raises:
        UserError: Nothing was saved, files are damaged, or there is no run of `kernel`.
    """
    with tempfile.TemporaryDirectory() as folder:
        client.output(name, Path(folder))
        found = sorted(path.name for path in Path(folder, "runs").iterdir() if path.is_dir())
        if kernel and not set(found) & {kernel.run, *(part.name for part in kernel.parts)}:
            raise UserError(f"{name}: has saved {examples(found)}, not {kernel.run}; another version was started since")
        imported = ", ".join(import_runs(Path(folder), workspace))
        submissions = [file.stem for file in sorted(Path(folder).glob("submissions/*.csv")) if file.name != LEDGER_FILE]
    log.info("output: %s imported into %s", imported or "nothing new", workspace.root / "runs")
    return submissions


def show(workspace: Workspace, kernel: Kernel) -> None:
    """Print the AUC of each finished fold of the run of `kernel`; once it is complete, also its comparison with other runs."""
    # A blend that lacks a run has a name of its own.
    partial = sorted(path.name for path in (workspace.root / "runs").glob(f"{kernel.run}-without-*"))
    names = [kernel.run, *partial, *(part.name for part in kernel.parts)]
    print_result(workspace, names)


def is_complete(workspace: Workspace, name: str) -> bool:
    """Return whether the run `name` is blended of all its folds."""
    run = Run(workspace.run(name))
    return run.has_score and not run.blend_metrics().missing_folds


def submission_of(workspace: Workspace, name: str) -> str:
    """Return the name of the submission of all folds of the run `name`; raises UserError if there is none."""
    for file, made in read_submissions(workspace.submissions).items():
        if made.run == name and not made.missing_folds and file.is_file():
            return file.stem
    raise UserError(f"{workspace.submissions}: holds no submission of {name}; write it with `python -m pcam_kaggle submission`")


def submit_and_wait(client: Client, workspace: Workspace, name: str) -> None:
    """Submit submission `name` unless Kaggle has it, wait until it is scored, record its scores and print all submissions.

    Raises:
        UserError: It can't be submitted (see `describe`), Kaggle refuses it or fails to score it, or half an hour has passed.
    """
    file, description = describe(workspace.submissions, name)
    mark = read_submissions(workspace.submissions)[file].mark
    # One that Kaggle could not score is submitted again.
    if (_of(client.submissions(), mark)["status"] == "error").all():
        client.submit(file, description)
        log.info("submit: %s, %s", file, description)
    else:
        log.info("submit: %s was submitted before", file)
    until = time.monotonic() + SCORE_PATIENCE
    with status_line() as tell:
        while True:
            found = client.submissions()
            own = _of(found, mark)
            if len(own) and own["status"].iloc[0] == "complete":
                break
            if len(own) and own["status"].iloc[0] == "error":
                raise UserError(f"{file}: Kaggle can't score it: {own['error'].iloc[0] or 'no reason given'}")
            if time.monotonic() >= until:
                raise UserError(f"{file}: not scored for half an hour; run `make leaderboard` later")
            tell("submit: waiting for the scores")
            time.sleep(SCORE_SECONDS)
    print_scores(workspace, found)


def _is_trained(workspace: Workspace, kernel: Kernel) -> bool:
    """Return whether no session is needed: the run is complete, or it is not and `kernel` does not resume it."""
    if is_complete(workspace, kernel.run):
        return True
    # Members of a blend may have been trained for themselves.
    own = () if experiment(kernel.settings.experiment).members else kernel.parts
    runs = [Run(workspace.run(name)) for name in (kernel.run, *(part.name for part in own))]
    return not kernel.resume and any(run.is_experiment or run.has_score for run in runs)


def _not_downloaded(session: Session, file: Path) -> UserError:
    return UserError(
        f"{session}: was started and is not downloaded yet; continue it with `kaggle run`, use --title for a second kernel, or "
        f"delete {file} to give it up"
    )


def _wait(client: Client, session: Session, file: Path) -> None:
    """Follow `session` to its end; raise UserError if it fails, and forget it, so that the same command starts a new one."""
    status = follow(client, session)
    if status.name != COMPLETE:
        file.unlink()
        reason = f" ({status.failure})" if status.failure else ""
        advice = "read its log with `make kernel-logs`, and repeat the command for a new session"
        raise UserError(f"{session}: ended as {status.name.lower()}{reason}; {advice}")


def _of(found: pd.DataFrame, mark: str) -> pd.DataFrame:
    return found[found["description"].str.endswith(mark)]
