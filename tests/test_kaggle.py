"""Kaggle's real client against a server of our own: what arrives is verified before anything is unpacked."""

import io
import json
import shutil
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import Outcome

from pcam_kaggle.cli import main
from pcam_kaggle.errors import UserError
from pcam_kaggle.kaggle import unpack
from pcam_kaggle.paths import COMPETITION, Data, find_data

SECRET = "0123456789abcdef" * 2
ARCHIVE = f"/{COMPETITION}.zip"
ETAG = '"first"'
# What a message about a missing or wrong login must say, and all that it may say about logins.
LOGIN = "KAGGLE_API_TOKEN"


class Kaggle(ThreadingHTTPServer):
    """Answers the client as Kaggle does: a redirect to the archive or a status, and `replies` to what is asked by name.

    A reply is JSON, a status, or None for a connection that is cut; `files` are what can be downloaded, `put` what was sent,
    `starts` the byte from which each download was asked for.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.archive, self.status = b"", 302
        self.asked: list[str] = []
        self.replies: dict[str, dict[str, Any] | int | None] = {}
        self.bodies: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.put = b""
        self.starts: list[int] = []

    def address(self, path: str) -> str:
        """Return the address of `path` on this server."""
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    """One request; it comes through a proxy's mouth, so its path is a whole address."""

    server: Kaggle

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = self.path.rsplit("/", 1)[1]
        if name not in self.server.replies:
            self.answer(self.server.status, b"", Location=self.server.address(ARCHIVE))
            return
        self.server.bodies[name] = json.loads(body)
        reply = self.server.replies[name]
        if isinstance(reply, int):
            self.answer(reply, b"{}")
        elif reply is not None:
            self.answer(200, json.dumps(reply).encode(), **{"Content-Type": "application/json"})
        else:
            self.close_connection = True
            self.connection.close()

    def do_PUT(self) -> None:
        self.server.put = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"")

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        content = self.server.archive if path == ARCHIVE else self.server.files[path]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.server.starts.append(start)
        kind = {"Content-Type": "application/zip", "Last-Modified": "Wed, 01 Jan 2025 00:00:00 GMT"}
        self.answer(206 if start else 200, content[start:], **kind, **{"Accept-Ranges": "bytes", "ETag": ETAG})

    def answer(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

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
        "KAGGLE_KEY": SECRET,
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


@pytest.mark.parametrize(
    ("status", "said"), [(403, "/rules"), (401, LOGIN), (404, "404"), (500, "try again later"), (503, "try again later")]
)
def test_a_refusal_is_one_line(
    kaggle: Kaggle, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.status = status
    assert main(["data", "--work", str(tmp_path / "home")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert ("/rules" in err) + (LOGIN in err) + ("check" in err) + ("try again later" in err) == 1
    assert left(tmp_path / "home") == []


def left(home: Path) -> list[Path]:
    """Return all that is in the data folder of `home`, but for locks."""
    return [path for path in (home / "data").rglob("*") if path.suffix != ".lock"]


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
        assert left(tmp_path / "home") == []


def waiting(home: Path) -> Path:
    """Return the folder in which an interrupted download waits."""
    return home / "data" / f".{COMPETITION}.download"


def test_an_interrupted_download_resumes_and_is_cleared(kaggle: Kaggle, data: Data, tmp_path: Path) -> None:
    home = tmp_path / "home"
    kaggle.archive = zipped(data.root)
    half = len(kaggle.archive) // 2
    waiting(home).mkdir(parents=True)
    # As the client leaves them when it is killed.
    (waiting(home) / ARCHIVE[1:]).write_bytes(kaggle.archive[:half])
    marker = {"validator": ETAG, "size": len(kaggle.archive)}
    (waiting(home) / f"{ARCHIVE[1:]}.kaggle-partial").write_text(json.dumps(marker))
    assert main(["data", "--work", str(home)]) == 0
    assert kaggle.starts[-1] == half
    assert not waiting(home).exists()
    assert (home / "data" / COMPETITION / "train_labels.csv").read_bytes() == data.labels.read_bytes()


def test_an_interrupted_unpacking_needs_no_second_download(
    kaggle: Kaggle, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    kaggle.archive = zipped(data.root)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("zipfile.ZipFile.extract", interrupt)
        assert main(["data", "--work", str(home)]) == 130
    first = (waiting(home) / ARCHIVE[1:]).stat()
    kaggle.archive = b"another" * (len(kaggle.archive) // 7) + b"?" * (len(kaggle.archive) % 7)
    assert main(["data", "--work", str(home)]) == 0, first
    assert (home / "data" / COMPETITION / "train_labels.csv").read_bytes() == data.labels.read_bytes()


@pytest.mark.parametrize("after", range(4))
def test_an_installation_that_was_interrupted_is_completed(
    kaggle: Kaggle, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    home = tmp_path / "home"
    kaggle.archive = zipped(data.root)
    replace, moved = Path.replace, []

    def interrupt(source: Path, target: Path) -> Path:
        if "unpacked" in source.parts:
            if len(moved) == after:
                raise KeyboardInterrupt
            moved.append(target)
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupt)
        assert main(["data", "--work", str(home)]) == 130
    found = home / "data" / COMPETITION
    assert not (found / "train_labels.csv").exists()
    asked = len(kaggle.asked)
    assert main(["data", "--work", str(home)]) == 0
    assert len(kaggle.asked) == asked
    for path in data.root.rglob("*.*"):
        assert (found / path.relative_to(data.root)).read_bytes() == path.read_bytes()
    assert not waiting(home).exists()


def test_files_that_were_there_before_stay(kaggle: Kaggle, data: Data, tmp_path: Path) -> None:
    kaggle.archive = zipped(data.root)
    found = tmp_path / "home" / "data" / COMPETITION
    found.mkdir(parents=True)
    (found / "patch_id_wsi.csv").write_text("id,wsi\n")
    assert main(["data", "--work", str(tmp_path / "home")]) == 0
    assert (found / "patch_id_wsi.csv").read_text() == "id,wsi\n"
    assert (found / "train_labels.csv").exists()


def test_patches_of_somebody_else_are_refused_before_anything_is_asked(
    kaggle: Kaggle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "home" / "data" / COMPETITION / "train" / "mine.tif"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    assert main(["data", "--work", str(tmp_path / "home")]) == 2
    assert f"{mine.parent}: exists and was not downloaded by this program" in capsys.readouterr().err
    assert mine.read_bytes() == b"mine"
    assert kaggle.asked == []
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "home" / "data").mkdir(parents=True)
    (tmp_path / "home" / "data" / COMPETITION).touch()
    assert main(["data", "--work", str(tmp_path / "home")]) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../escape.csv", "/escape.csv", "train/../../escape.csv"])
def test_no_member_leads_out_of_the_archive(name: str, data: Data, tmp_path: Path) -> None:
    archive = tmp_path / "evil.zip"
    archive.write_bytes(zipped(data.root))
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(name, "id,label\n")
    with pytest.raises(UserError, match=r"leads out"):
        unpack(archive, tmp_path / "unpacked" / "here")
    assert not (tmp_path / "unpacked").exists()


def test_an_archive_that_lies_is_refused(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = zipped(data.root)
    buffer = io.BytesIO(whole)
    with zipfile.ZipFile(buffer, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("train_labels.csv", "id,label\n")
    # The directory's offset, six bytes before the end, leads to before the file.
    nowhere = whole[:-6] + (int.from_bytes(whole[-6:-2], "little") + 1000).to_bytes(4, "little") + whole[-2:]
    for content, said in ((buffer.getvalue(), "a member twice"), (nowhere, "can't be unpacked"), (whole, "would unpack to")):
        (tmp_path / "liar.zip").write_bytes(content)
        monkeypatch.setattr("pcam_kaggle.kaggle.MOST_BYTES", 1000 if content is whole else 10**9)
        with pytest.raises(UserError, match=said):
            unpack(tmp_path / "liar.zip", tmp_path / "unpacked")


def test_another_competitions_archive_is_refused(data: Data, tmp_path: Path) -> None:
    data.labels.unlink()
    (tmp_path / "other.zip").write_bytes(zipped(data.root))
    with pytest.raises(UserError, match=r"train_labels.csv"):
        unpack(tmp_path / "other.zip", tmp_path / "unpacked")


KERNEL = "pcam-submission"
STARTED = {"url": f"https://www.kaggle.com/code/someone/{KERNEL}", "versionNumber": 3}


def test_a_push_carries_the_notebook_and_the_users_name(kaggle: Kaggle, capsys: pytest.CaptureFixture[str]) -> None:
    kaggle.replies["SaveKernel"] = STARTED
    assert main(["kernel", "push", "-e", "quick", "--hours", "2", "--goes-on"]) == 0
    sent = kaggle.bodies["SaveKernel"]
    assert sent["slug"] == f"someone/{KERNEL}"
    assert sent["kernelDataSources"] == [f"someone/{KERNEL}"]
    assert sent["competitionDataSources"] == [COMPETITION]
    assert sent["machineShape"] == "NvidiaTeslaT4"
    assert (sent["enableInternet"], sent["isPrivate"], sent["enableGpu"]) == (False, True, True)
    cells = json.loads(sent["text"])["cells"]
    assert next(cell["source"] for cell in cells if cell["id"] == "settings").startswith('EXPERIMENT = "quick"')
    assert "version 3 successfully pushed" in capsys.readouterr().out


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of the error that was printed."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert err.startswith("error: kaggle ")
    assert SECRET not in err
    return err


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ({"error": "Maximum weekly GPU quota of 30 hours reached"}, "GPU quota"),
        (STARTED | {"invalidCompetitionSources": [COMPETITION]}, "not valid competition sources"),
        (401, LOGIN),
        (403, "/rules"),
        (404, "404"),
        (500, "500"),
        (None, "onnection"),
    ],
)
def test_a_push_that_failed_is_one_line(
    kaggle: Kaggle, reply: dict[str, Any] | int | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.replies["SaveKernel"] = reply
    assert main(["kernel", "push"]) == 2
    assert said in one_line(capsys)


ASKED = {
    "GetKernelSessionStatus": ["kernel", "status"],
    "ListKernelSessionOutput": ["kernel", "output"],
    "ListSubmissions": ["leaderboard"],
    "DownloadDataFiles": ["data"],
}


@pytest.mark.parametrize(
    ("reply", "said"), [(404, "404"), ({"code": 400, "message": "no such thing"}, "no such thing"), (None, "onnection")]
)
@pytest.mark.parametrize("name", ASKED)
def test_what_kaggle_does_not_answer_is_one_line(
    kaggle: Kaggle,
    name: str,
    reply: dict[str, Any] | int | None,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kaggle.replies[name] = reply
    assert main([*ASKED[name], "--work", str(tmp_path / "home")]) == 2
    assert said in one_line(capsys)


@pytest.mark.parametrize("arguments", [["kernel", "push"], ["kernel", "status"], ["data"], ["leaderboard"]])
def test_missing_credentials_are_one_line(
    kaggle: Kaggle,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main([*arguments, "--work", str(tmp_path)]) == 2
    assert LOGIN in one_line(capsys)


@pytest.mark.parametrize("arguments", [["kernel", "push"], ["kernel", "status"], ["data"], ["leaderboard"]])
def test_no_network_is_not_told_as_a_wrong_login(
    kaggle: Kaggle, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert main([*arguments, "--work", str(tmp_path / "home")]) == 2
    err = one_line(capsys)
    assert "no connection to Kaggle" in err
    assert LOGIN not in err
    assert "/rules" not in err


def test_a_token_alone_is_enough(kaggle: Kaggle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    kaggle.replies |= {"IntrospectToken": {"active": True, "username": "holder"}, "SaveKernel": STARTED}
    assert main(["kernel", "push"]) == 0, capsys.readouterr().err
    assert kaggle.bodies["SaveKernel"]["slug"] == f"holder/{KERNEL}"
    kaggle.replies["IntrospectToken"] = {"active": False}
    capsys.readouterr()
    assert main(["kernel", "push"]) == 2
    assert LOGIN in one_line(capsys)


def test_status_and_log_are_told(kaggle: Kaggle, capsys: pytest.CaptureFixture[str]) -> None:
    kaggle.replies |= {"GetKernelSessionStatus": {"status": "COMPLETE"}, "ListKernelSessionOutput": {"log": "fold 0"}}
    assert main(["kernel", "status"]) == 0
    assert "COMPLETE" in capsys.readouterr().out
    assert main(["kernel", "logs"]) == 0
    assert "fold 0" in capsys.readouterr().out


@pytest.fixture
def session(pcam: Callable[..., Outcome], tmp_path: Path) -> Path:
    """Return the folder that a session on Kaggle has saved: a run of three folds."""
    assert pcam("pipeline").status == 0
    return (tmp_path / "work").rename(tmp_path / "session")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a folder at home, empty."""
    return tmp_path / "home"


def saved(kaggle: Kaggle, session: Path) -> None:
    """Let `kaggle` offer what `session` saved."""
    names = [str(path.relative_to(session)) for path in session.rglob("*") if path.is_file()]
    kaggle.files = {f"/output/{name}": (session / name).read_bytes() for name in names}
    listed = [{"fileName": name, "url": kaggle.address(f"/output/{name}")} for name in names]
    kaggle.replies["ListKernelSessionOutput"] = {"files": listed, "log": "done"}


def test_what_a_session_made_comes_home(
    kaggle: Kaggle, session: Path, home: Path, pcam: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(kaggle, session)
    assert main(["kernel", "output", "--work", str(home)]) == 0
    assert "make submit EXPERIMENT=bottleneck" in capsys.readouterr().out
    for path in session.rglob("*"):
        if path.is_file() and path.parts[len(session.parts)] in ("runs", "submissions") and path.parent.name != "events":
            if path.name == "ledger.csv":
                continue
            assert (home / path.relative_to(session)).read_bytes() == path.read_bytes()
    assert not (home / "store").exists()
    assert not (home / f"{KERNEL}.log").exists()
    home.rename(tmp_path / "work")
    capsys.readouterr()
    again = pcam("pipeline")
    assert again.status == 0, again.err
    assert "(kept)" in next(line for line in again.out.splitlines() if line.startswith("train"))
    assert (tmp_path / "work" / "submissions" / "bottleneck.csv").read_bytes() == (
        session / "submissions" / "bottleneck.csv"
    ).read_bytes()


@pytest.mark.parametrize("name", ["fold_1/best.pt", "fold_0/oof.csv", "fold_2/metrics.json", "config.json", "fold_0/log.csv"])
def test_a_damaged_output_does_not_come_home(
    kaggle: Kaggle, session: Path, home: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = session / "runs" / "bottleneck" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    saved(kaggle, session)
    capsys.readouterr()
    assert main(["kernel", "output", "--work", str(home)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert name.rsplit("/", maxsplit=1)[-1].split(".", maxsplit=1)[0] in err
    assert not (home / "runs").exists()


def test_another_config_does_not_come_home(
    kaggle: Kaggle, session: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(kaggle, session)
    assert main(["kernel", "output", "--work", str(home)]) == 0
    config = home / "runs" / "bottleneck" / "config.json"
    config.write_text(config.read_text().replace('"seed": 42', '"seed": 43'))
    before = config.read_bytes()
    capsys.readouterr()
    assert main(["kernel", "output", "--work", str(home)]) == 2
    assert "another config" in capsys.readouterr().err
    assert config.read_bytes() == before


UPLOAD = {"token": "abc"}


def test_a_submission_goes_and_its_scores_come_back(kaggle: Kaggle, session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = session / "submissions" / "bottleneck.csv"
    kaggle.replies |= {
        "StartSubmissionUpload": UPLOAD | {"createUrl": kaggle.address("/upload")},
        "CreateSubmission": {"message": f"Successfully submitted to {COMPETITION}"},
    }
    assert main(["submit", "--work", str(session)]) == 0
    assert kaggle.put == file.read_bytes()
    description = kaggle.bodies["CreateSubmission"]["submissionDescription"]
    made = json.loads(file.with_suffix(".json").read_text())
    assert f"OOF AUC {made['oof_auc']['value']:.4f}" in description

    rows = [
        {"ref": 2, "fileName": "bottleneck.csv", "description": "another", "publicScore": "0.5", "privateScore": "0.5"},
        {"ref": 1, "fileName": "bottleneck.csv", "description": description, "publicScore": "0.9512", "privateScore": ""},
    ]
    kaggle.replies["ListSubmissions"] = {"submissions": rows}
    assert main(["leaderboard", "--work", str(session)]) == 0
    made = json.loads(file.with_suffix(".json").read_text())
    assert (made["public_score"], made["private_score"]) == (0.9512, None)
    rows[1]["privateScore"] = "0.9401"
    assert main(["leaderboard", "--work", str(session)]) == 0
    assert json.loads(file.with_suffix(".json").read_text())["private_score"] == 0.9401
    assert "0.9401" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reply", "said"),
    [({"message": "Submission not allowed: limit reached"}, "limit reached"), (400, "400"), (None, "onnection")],
)
def test_a_submission_that_kaggle_refuses_is_one_line(
    kaggle: Kaggle, session: Path, reply: dict[str, Any] | int | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.replies |= {"StartSubmissionUpload": UPLOAD | {"createUrl": kaggle.address("/upload")}, "CreateSubmission": reply}
    capsys.readouterr()
    assert main(["submit", "--work", str(session)]) == 2
    assert said in one_line(capsys)


def test_what_was_changed_since_its_validation_is_not_sent(
    kaggle: Kaggle, session: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (session / "submissions" / "bottleneck.csv").open("a") as file:
        file.write("x,0.5\n")
    capsys.readouterr()
    assert main(["submit", "--work", str(session)]) == 2
    assert "has changed" in capsys.readouterr().err
    assert kaggle.asked == []
