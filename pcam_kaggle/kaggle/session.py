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
from typing import Any

from pcam_kaggle import UserError
from pcam_kaggle.config.logs import status_line
from pcam_kaggle.data.atomic_io import read_json, reading, write_json
from pcam_kaggle.data.layout import Workspace
from pcam_kaggle.kaggle.client import Client, Status
from pcam_kaggle.kaggle.failures import Unreachable
from pcam_kaggle.kaggle.kernel import Kernel, pack

log = logging.getLogger(__name__)

# Seconds between two questions for the status.
POLL_SECONDS = 20.0
# Seconds for which Kaggle may be unreachable while a session is followed, which it survives.
PATIENCE = 1800.0


@dataclass(frozen=True, slots=True)
class Session:
    """A pushed kernel's session.

    Attributes:
        kernel: The kernel's id, owner/slug.
        request: What the user asked for, as `Kernel.fields`.
        run: Name of the run that it makes.
        mark: Text in its notebook by which its version is recognised on Kaggle.
        version: Its version; 0 until Kaggle has confirmed the push.
        url: Its address; empty until then.
        imported: Whether its runs were downloaded.
    """

    kernel: str
    request: dict[str, Any]
    run: str
    mark: str
    version: int = 0
    url: str = ""
    imported: bool = False

    def __str__(self) -> str:
        return f"{self.run}, version {self.version} of {self.kernel}"


def session_file(workspace: Workspace, slug: str) -> Path:
    """Return the file that describes the last session of the kernel with this slug."""
    return workspace.root / "sessions" / f"{slug}.json"


def read_session(file: Path) -> Session | None:
    """Return the session that `file` describes; None if there is no such file. Raises UserError if it is damaged."""
    if not file.is_file():
        return None
    content = read_json(file, kernel=str, request=dict, run=str, mark=str, version=int, url=str, imported=bool)
    with reading(file):
        return Session(**content)


def start_session(client: Client, kernel: Kernel, request: dict[str, Any], file: Path) -> Session:
    """Push `kernel` and describe its session in `file`.

    The file is written before the push: if the process is killed before Kaggle's reply has arrived, `find_version` recognises
    the pushed version by its mark.

    Args:
        client: Kaggle.
        kernel: What to push.
        request: What the user asked for.
        file: Where to describe the session.

    Raises:
        UserError: Kaggle refuses it; `file` is then deleted.
    """
    mark = f"push {secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory() as folder:
        name = pack(kernel, client.owner, Path(folder), mark)
        session = Session(name, request, kernel.run, mark)
        write_session(session, file)
        try:
            version, url = client.push(Path(folder))
        except Unreachable:
            # The push may have arrived.
            raise
        except UserError:
            file.unlink()
            raise
    session = replace(session, version=version, url=url)
    write_session(session, file)
    return session


def find_version(client: Client, session: Session, file: Path) -> Session | None:
    """Return `session` with its version, which is asked for if its push was interrupted; None if Kaggle has no such version."""
    if session.version:
        return session
    version = client.current_version(session.kernel, session.mark)
    if version is None:
        return None
    session = replace(session, version=version)
    write_session(session, file)
    return session


def write_session(session: Session, file: Path) -> None:
    """Write `session` to `file`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, asdict(session))


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
                show(_told(session, status, line))
                if status.is_over:
                    return status
                until = time.monotonic() + POLL_SECONDS
                while (left := until - time.monotonic()) > 0:
                    try:
                        piece = pieces.get(timeout=left)
                    except queue.Empty:
                        break
                    line = next((text for text in reversed(piece.splitlines()) if text.strip()), line)
                    show(_told(session, status, line))
    finally:
        over.set()


def _told(session: Session, status: Status, line: str) -> str:
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
    is_told = False
    while True:
        try:
            return ask()
        except Unreachable as error:
            if time.monotonic() >= until:
                raise
            if not is_told:
                log.warning("%s; the session continues, and its status is requested again", error)
                is_told = True
            time.sleep(POLL_SECONDS)
