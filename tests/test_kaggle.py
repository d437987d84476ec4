"""Kaggle's real client against a server of our own: what arrives is verified before anything is unpacked."""

import io
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pcam_kaggle.cli import main
from pcam_kaggle.errors import UserError
from pcam_kaggle.kaggle import unpack
from pcam_kaggle.paths import COMPETITION, Data, find_data

ARCHIVE = f"/{COMPETITION}.zip"


class Kaggle(ThreadingHTTPServer):
    """Answers the client as Kaggle does: a redirect to the archive, or a status."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.archive, self.status = b"", 302
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """One request; it comes through a proxy's mouth, so its path is a whole address."""

    server: Kaggle

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.server.status)
        self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}{ARCHIVE}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/zip")
        self.send_header("Content-Length", str(len(self.server.archive)))
        self.send_header("Last-Modified", "Wed, 01 Jan 2025 00:00:00 GMT")
        self.end_headers()
        self.wfile.write(self.server.archive)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kaggle]:
    """Start the server and point the client at it; nothing leaves the machine."""
    server = Kaggle()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    (tmp_path / "config").mkdir()
    for name in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HTTP_PROXY": f"http://127.0.0.1:{server.server_port}",
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "KAGGLE_USERNAME": "someone",
        "KAGGLE_KEY": "key",
        "KAGGLE_CONFIG_DIR": str(tmp_path / "config"),
    }.items():
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def zipped(folder: Path) -> bytes:
    """Return all files of `folder` as a ZIP."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, str(path.relative_to(folder)))
    return buffer.getvalue()


def test_the_competition_arrives_whole(kaggle: Kaggle, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kaggle.archive = zipped(data.root)
    home = tmp_path / "home"
    assert main(["data", "--work", str(home)]) == 0
    found = find_data(None, home, tmp_path)
    assert found is not None
    for path in data.root.rglob("*.*"):
        assert (found.root / path.relative_to(data.root)).read_bytes() == path.read_bytes()
    asked = len(kaggle.asked)
    assert any("DownloadDataFiles" in path for path in kaggle.asked)
    assert main(["data", "--work", str(home)]) == 0
    assert len(kaggle.asked) == asked
    assert "(kept)" in capsys.readouterr().out
    shutil.rmtree(data.root)


@pytest.mark.parametrize(("status", "said"), [(403, "/rules"), (401, "KAGGLE_KEY"), (404, "404")])
def test_a_refusal_is_one_line(
    kaggle: Kaggle, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.status = status
    assert main(["data", "--work", str(tmp_path / "home")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert list((tmp_path / "home" / "data").iterdir()) == []


def test_a_damaged_archive_leaves_nothing(
    kaggle: Kaggle, data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = zipped(data.root)
    spoilt = bytearray(whole)
    spoilt[len(spoilt) // 2] ^= 255
    for content in (whole[: len(whole) // 2], bytes(spoilt)):
        kaggle.archive = content
        assert main(["data", "--work", str(tmp_path / "home")]) == 2
        err = capsys.readouterr().err
        assert "damaged" in err
        assert err.count("\n") == 1
        assert list((tmp_path / "home" / "data").iterdir()) == []


@pytest.mark.parametrize("name", ["../escape.csv", "/escape.csv", "train/../../escape.csv"])
def test_no_member_leads_out_of_the_archive(name: str, data: Data, tmp_path: Path) -> None:
    archive = tmp_path / "evil.zip"
    archive.write_bytes(zipped(data.root))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, "id,label\n")
    with pytest.raises(UserError, match=r"leads out"):
        unpack(archive, tmp_path / "unpacked" / "here")
    assert not (tmp_path / "unpacked").exists()


def test_another_competitions_archive_is_refused(data: Data, tmp_path: Path) -> None:
    data.labels.unlink()
    (tmp_path / "other.zip").write_bytes(zipped(data.root))
    with pytest.raises(UserError, match=r"train_labels.csv"):
        unpack(tmp_path / "other.zip", tmp_path / "unpacked")
