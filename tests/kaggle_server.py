"""A server on this machine that answers Kaggle's real client."""

import json
import re
import shutil
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from pcam_kaggle.core.paths import COMPETITION

SECRET = "0123456789abcdef" * 2
ARCHIVE = f"/{COMPETITION}.zip"
KERNEL = "pcam-submission"
STARTED = {"url": f"https://www.kaggle.com/code/someone/{KERNEL}", "versionNumber": 3}

Content = dict[str, Any]
Reply = Content | int | None


def quota(left: float) -> dict[str, Reply]:
    gpu = {"timeUsed": f"{(30 - left) * 3600:.0f}s", "totalTimeAllowed": "108000s"}
    return {"GetAcceleratorQuotaStatistics": {"gpuQuota": gpu, "quotaRefreshTime": "2026-12-05T00:00:00Z"}}


class Kaggle(ThreadingHTTPServer):
    """A server that answers like Kaggle: with `replies` by the name of the request, otherwise with a redirect to the archive.

    A reply is JSON, a status, None to close the connection, or a function of the request's content that returns one of these.
    `files` has the content of each file that can be downloaded, or the status with which that fails; `put` is the last upload,
    `stream` has the pieces of a session's log. `halfway` is called once, in the middle of a download of the archive, which then
    breaks off. A request for a version by its label gets the reply `refusal`, unless that is None. `mark` returns the content
    of mark.txt in the output of the session that a request is about. `hook` is called with the name of each request,
    `upload`, `download` or `log`, before it is answered.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.archive = b""
        self.asked: list[str] = []
        self.credentials: set[str] = set()
        self.sent = self.streamed = 0
        self.halfway: Callable[[], object] | None = None
        self.hook: Callable[[str], object] = lambda _: None
        self.stream: list[str] = []
        self.replies: dict[str, Reply | Callable[[Content], Reply]] = {
            "GetCompetition": {"userHasEntered": True},
            "GetKernelSessionStatus": {"status": "COMPLETE"},
            **quota(30.0),
        }
        self.bodies: dict[str, Content] = {}
        self.files: dict[str, bytes | int] = {}
        self.put = b""
        self.refusal: Reply = None
        self.mark: Callable[[Content], bytes] = lambda _: b""
        self.upload_status = 200

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: some tests kill the client while it waits for a reply."""

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    """A handler of requests, which come as to a proxy: their path is a full URL."""

    server: Kaggle

    def do_POST(self) -> None:
        name = self.path.rsplit("/", 1)[1]
        self.server.asked.append(name)
        self.server.credentials.add(self.headers.get("Authorization", "").split(" ")[0])
        body = self.server.bodies[name] = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        is_refused = "versionLabel" in body and self.server.refusal is not None
        reply = self.server.refusal if is_refused else self.server.replies.get(name, 302)
        if callable(reply):
            reply = reply(body)
        self.server.hook(name)
        if reply == 302:
            self.answer(302, b"", Location=self.server.address(ARCHIVE))
        elif isinstance(reply, int):
            self.answer(reply, b"{}")
        elif reply is not None:
            self.answer(200, json.dumps(reply).encode(), **{"Content-Type": "application/json"})
        else:
            self.close_connection = True
            self.connection.close()

    def do_PUT(self) -> None:
        self.server.put = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.hook("upload")
        self.answer(self.server.upload_status, b"")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        headers = {"Content-Type": "application/zip", "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        if path == ARCHIVE:
            self.send_archive(headers)
        elif "/logs/stream/" in path:
            self.server.streamed += 1
            self.server.hook("log")
            events = "".join(f"data: {json.dumps({'data': piece})}\n\n" for piece in self.server.stream)
            self.answer(200, f"{events}data: END_OF_LOG\n\n".encode(), **{"Content-Type": "text/event-stream"})
        else:
            self.server.hook("download")
            content = self.server.files[path]
            status, text = (content, b"<Error/>") if isinstance(content, int) else (200, content)
            self.answer(status, text, **headers)

    def send_archive(self, headers: dict[str, str]) -> None:
        whole = self.server.archive
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        headers |= {"Accept-Ranges": "bytes", "ETag": '"1"', "Content-Length": str(len(whole) - start)}
        if start:
            headers |= {"Content-Range": f"bytes {start}-{len(whole) - 1}/{len(whole)}"}
        halfway, self.server.halfway = self.server.halfway, None
        content = whole[start : len(whole) // 2 if halfway else len(whole)]
        self.answer(206 if start else 200, content, **headers)
        self.server.sent += len(content)
        if halfway:
            halfway()

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def zipped(folder: Path) -> bytes:
    return Path(shutil.make_archive(str(folder), "zip", folder)).read_bytes()


def saved(kaggle: Kaggle, session: Path) -> None:
    """Let `kaggle` offer what `session` saved."""
    files = [path for path in session.rglob("*") if path.is_file()]
    kaggle.files = {f"/output/{path.relative_to(session)}": path.read_bytes() for path in files}

    def page(body: Content) -> Reply:
        kaggle.files["/output/mark.txt"] = kaggle.mark(body)
        listed = [{"fileName": name.removeprefix("/output/"), "url": kaggle.address(name)} for name in kaggle.files]
        start = int(body.get("pageToken") or 0)
        more = {"nextPageToken": str(start + 7)} if start + 7 < len(listed) else {}
        return {"files": listed[start : start + 7], "log": "done", **more}

    kaggle.replies["ListKernelSessionOutput"] = page


def use_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log in with a token in place of user name and key."""
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
