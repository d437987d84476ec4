"""A session on Kaggle: what was pushed, as a file, so that the same command finds it again; and how it is followed."""

import logging
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import read_json, reading, write_json
from pcam_kaggle.core.logs import status_line
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.kaggle.client import Client, Status
from pcam_kaggle.kaggle.failures import Refused, Unreachable
from pcam_kaggle.kaggle.kernel import Kernel, pack

log = logging.getLogger(__name__)

# Seconds between two questions for the status.
POLL_SECONDS = 20.0
# Seconds for which Kaggle may be unreachable while a session is followed, which it survives.
PATIENCE = 1800.0


@dataclass(frozen=True, slots=True)
class Session:
    """A pushed kernel's session whose output is not downloaded yet.

    Attributes:
        kernel: The kernel's id, owner/slug.
        run: Name of the run that it makes.
        mark: Text in its notebook by which its version is recognised on Kaggle.
        version: Its version; 0 until Kaggle has confirmed the push.
        url: Its address; empty until then.
    """

    kernel: str
    run: str
    mark: str
    version: int = 0
    url: str = ""

    def __str__(self) -> str:
        return f"{self.run}, version {self.version} of {self.kernel}"


def session_file(workspace: Workspace, slug: str) -> Path:
    """Return the file that describes the session of the kernel with this slug until its output is downloaded."""
    return workspace.root / "sessions" / f"{slug}.json"


def pending_session(client: Client, file: Path) -> Session | None:
    """Return the session that `file` describes; None if there is none, or if its push did not arrive.

    Raises:
        UserError: `file` is damaged, or Kaggle can't be asked for the version of a push whose reply was lost.
    """
    if not file.is_file():
        return None
    content = read_json(file, kernel=str, run=str, mark=str, version=int, url=str)
    with reading(file):
        session = Session(**content)
    if session.version:
        return session
    version = client.current_version(session.kernel, session.mark)
    if version is None:
        return None
    session = replace(session, version=version)
    write_json(file, asdict(session))
    return session


def start_session(client: Client, kernel: Kernel, file: Path) -> Session:
    """Push `kernel` and describe its session in `file`.

    The file is written before the push: if Kaggle's reply does not arrive, `pending_session` recognises the pushed version by
    its mark.

    Raises:
        UserError: The push fails; if Kaggle refuses it, `file` is deleted.
    """
    mark = f"push {secrets.token_hex(8)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        name = pack(kernel, client.owner, Path(folder), mark)
        session = Session(name, kernel.run, mark)
        write_json(file, asdict(session))
        try:
            version, url = client.push(Path(folder))
        except Refused:
            file.unlink()
            raise
    session = replace(session, version=version, url=url)
    write_json(file, asdict(session))
    return session


def follow(client: Client, session: Session) -> Status:
    """Show the status of `session` and the last line of its log until it is over, and return its last status.

    Raises:
        UserError: Kaggle can't be reached for half an hour.
    """
    pieces: queue.SimpleQueue[str] = queue.SimpleQueue()
    over = threading.Event()
    # The stream of the log blocks, and does not tell when a session has failed to start.
    threading.Thread(target=_read_log, args=(client, session.kernel, pieces, over), daemon=True).start()
    line = ""
    try:
        with status_line() as show:
            while True:
                status = _patient(lambda: client.status(session.kernel))
                show(_status_text(session, status, line))
                if status.is_over:
                    return status
                until = time.monotonic() + POLL_SECONDS
                while (left := until - time.monotonic()) > 0:
                    try:
                        piece = pieces.get(timeout=left)
                    except queue.Empty:
                        break
                    line = next((text for text in reversed(piece.splitlines()) if text.strip()), line)
                    show(_status_text(session, status, line))
    finally:
        over.set()


def _status_text(session: Session, status: Status, line: str) -> str:
    return f"{session}: {status.name.lower()}{line and f', {line}'}"


def _read_log(client: Client, kernel: str, pieces: "queue.SimpleQueue[str]", over: threading.Event) -> None:
    """Put the pieces of the log of `kernel` into `pieces` until `over` is set; a new connection starts at the first one."""
    seen = 0
    while not over.is_set():
        try:
            for number, piece in enumerate(client.follow_log(kernel)):
                if over.is_set():
                    return
                if number >= seen:
                    seen = number + 1
                    pieces.put(piece)
        except UserError as error:
            log.debug("log of %s: %s", kernel, error)
        over.wait(POLL_SECONDS)


def _patient(ask: Callable[[], Status]) -> Status:
    """Return what `ask` returns; while Kaggle is unreachable, ask again for up to `PATIENCE` seconds."""
    until = time.monotonic() + PATIENCE
    has_warned = False
    while True:
        try:
            return ask()
        except Unreachable as error:
            if time.monotonic() >= until:
                raise
            if not has_warned:
                log.warning("%s; the session continues, and its status is requested again", error)
                has_warned = True
            time.sleep(POLL_SECONDS)
