"""Kaggle's real client against a local server: downloads are verified before anything is unpacked."""

import os
import re
import signal
import socket
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Call, Pcam, on_terminal
from kaggle_server import KERNEL, SECRET, STARTED, Kaggle, Reply, saved, use_token, zipped

from pcam_kaggle.core.files import PART, read_json
from pcam_kaggle.core.paths import COMPETITION, Data, find_data
from pcam_kaggle.kaggle.archive import PARTS
from pcam_kaggle.kaggle.failures import NO_KERNEL, RULES

MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture
def target(home: Path) -> Path:
    return home / "data" / COMPETITION


def assert_complete(target: Path, data: Data) -> None:
    for path in data.root.rglob("*.*"):
        assert (target / path.relative_to(data.root)).read_bytes() == path.read_bytes()
    assert [path.name for path in target.parent.iterdir() if not path.name.endswith(".lock")] == [target.name]


def test_the_data_are_downloaded_once(
    kaggle: Kaggle, data: Data, home: Path, target: Path, tmp_path: Path, monkeypatch: MonkeyPatch, call: Call
) -> None:
    kaggle.archive = zipped(data.root)
    with on_terminal(monkeypatch) as shown:
        call("download")
    assert "100%|" in shown[0]
    assert len([line for line in shown[0].split("\n") if line.strip()]) == 1
    assert_complete(target, data)
    assert find_data(None, home, tmp_path) == Data(target)
    assert kaggle.asked == ["DownloadDataFiles"]
    # A process that is killed after its last rename leaves the hidden folder behind.
    target.with_name(".download").mkdir()
    assert "(up to date)" in call("download")
    assert kaggle.asked == ["DownloadDataFiles"]
    assert_complete(target, data)


def test_an_interrupted_download_is_resumed(kaggle: Kaggle, data: Data, target: Path, call: Call) -> None:
    # The client writes pieces of 1 MiB.
    (data.patches("train") / "noise.tif").write_bytes(os.urandom(4 << 20))
    kaggle.archive = zipped(data.root)
    partial = target.with_name(".download") / "partial" / f"{COMPETITION}.zip"

    def interrupt() -> None:
        while not partial.is_file() or partial.stat().st_size < 1 << 20:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        # The rest is sent once the download has ended.
        stopped.wait(20)

    # A shell starts its background jobs with SIGINT ignored, and their processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kaggle.halfway, stopped = interrupt, threading.Event()
    call("download", status=130)
    stopped.set()
    size = partial.stat().st_size
    assert size >= 1 << 20
    assert not Data(target).labels.exists()
    kaggle.sent = 0
    call("download")
    assert kaggle.sent == len(kaggle.archive) - size
    assert_complete(target, data)


@pytest.mark.parametrize(
    ("owner", "name", "calls", "error"),
    [
        (Path, "replace", 0, KeyboardInterrupt()),
        (zipfile.ZipFile, "extract", 5, OSError(28, "no space")),
    ],
)
def test_an_interrupted_install_is_completed(
    kaggle: Kaggle, data: Data, target: Path, owner: type, name: str, calls: int, error: BaseException, call: Call
) -> None:
    kaggle.archive = zipped(data.root)
    complete, done = getattr(owner, name), []

    def interrupted(*arguments: Any) -> Any:
        if len(done) == calls:
            raise error
        done.append(arguments)
        return complete(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        status = 2 if isinstance(error, OSError) else 130
        assert "no space" in call("download", status=status) or status == 130
    assert not target.exists()
    assert not list(target.parent.rglob(f"*{PART}"))
    kaggle.sent = 0
    call("download")
    assert kaggle.sent == 0
    assert_complete(target, data)


def test_a_full_disk_is_noticed_early(kaggle: Kaggle, data: Data, target: Path, monkeypatch: MonkeyPatch, call: Call) -> None:
    kaggle.archive = zipped(data.root)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "make room" in call("download", status=2)
    assert (target.with_name(".download") / f"{COMPETITION}.zip").is_file()


def test_existing_files_are_refused_before_the_download(kaggle: Kaggle, target: Path, call: Call) -> None:
    (target / "train").mkdir(parents=True)
    assert f"{target}: exists and was not made by this program" in call("download", status=2)
    assert kaggle.asked == []
    assert list(target.rglob("*")) == [target / "train"]


def test_a_wrong_archive_is_downloaded_again(kaggle: Kaggle, data: Data, target: Path, tmp_path: Path, call: Call) -> None:
    whole = zipped(data.root)
    half = len(whole) // 2
    # More bytes than the header of a file has.
    changed = whole[:half] + bytes(200) + whole[half + 200 :]
    refused = [(whole[:half], "damaged"), (changed, "damaged")]
    for part in PARTS:
        moved = (data.root / part).rename(tmp_path / "elsewhere")
        refused.append((zipped(data.root), f"lacks {part},"))
        moved.rename(data.root / part)
    for content, problem in refused:
        kaggle.archive = content
        assert re.search(f"{problem} .*downloads it again", call("download", status=2))
        assert not target.exists()
    kaggle.archive = whole
    call("download")
    assert_complete(target, data)


RECIPES = TOKEN, ACCEPT, NETWORK, LATER, CREATE, SOURCES, LOOK = (
    "KAGGLE_API_TOKEN or ~/.kaggle/access_token",
    RULES,
    "check the network",
    "try again later",
    "make kaggle",
    "correct the sources",
    "see whether kaggle.com",
)
REFUSALS: dict[tuple[str, str], dict[int | None, str]] = {
    ("download", "DownloadDataFiles"): {401: TOKEN, 403: ACCEPT, 404: LOOK, 429: LATER, 500: LATER, None: NETWORK},
    ("scores", "ListSubmissions"): {503: LATER},
    ("run", "SaveKernel"): {401: TOKEN, 404: SOURCES, 500: LATER, None: NETWORK},
    ("fetch", "GetKernelSessionStatus"): {403: CREATE, 502: LATER},
    ("fetch", "ListKernelSessionOutput"): {404: CREATE},
    ("download", "IntrospectToken"): {401: TOKEN, 403: TOKEN, 503: LATER},
}


@pytest.mark.parametrize(
    ("command", "name", "reply", "recipe"),
    [(*request, reply, recipe) for request, replies in REFUSALS.items() for reply, recipe in replies.items()],
)
def test_each_kind_of_refusal_has_one_recipe(
    kaggle: Kaggle, command: str, name: str, reply: int | None, recipe: str, home: Path, monkeypatch: MonkeyPatch, call: Call
) -> None:
    if name == "IntrospectToken":
        use_token(monkeypatch)
    kaggle.replies[name] = reply
    err = call(command, status=2)
    assert [each for each in RECIPES if each in err] == [recipe], err
    assert "http" not in err
    assert recipe not in (LATER, LOOK, SOURCES) or str(reply) in err
    left = [path.name for path in home.rglob("*") if path.is_file() and path.suffix != ".lock"]
    # A push whose reply has not arrived may have started a session, which the next command looks for.
    assert left == ([f"{KERNEL}.json"] if name == "SaveKernel" and recipe in (LATER, NETWORK) else [])


QUOTA, STATUS = "GetAcceleratorQuotaStatistics", "GetKernelSessionStatus"
FAILED = {"status": "ERROR", "failureMessage": "out of\nmemory"}
RESERVED = {"timeUsed": "36000s", "timeReserved": "18000s", "totalTimeAllowed": "108000s"}


@pytest.mark.parametrize(
    ("command", "name", "reply", "expected"),
    [
        ("run", "SaveKernel", {"error": 'The requested title "PCam submission" is already in use'}, "already in use"),
        ("scores", "ListSubmissions", {"code": 400, "message": "no such thing"}, "no such thing"),
        ("scores", "ListSubmissions", {"submissions": [{"ref": 1, "status": "LOST"}]}, "can't read Kaggle's reply"),
        ("status", QUOTA, {"quotaRefreshTime": "soon"}, "kaggle quota: "),
    ],
)
def test_what_kaggle_says_is_shown(kaggle: Kaggle, command: str, name: str, reply: Reply, expected: str, call: Call) -> None:
    kaggle.replies[name] = reply
    err = call(command, status=2)
    assert expected in err
    assert not [recipe for recipe in RECIPES if recipe in err and recipe != SOURCES]


@pytest.mark.slow
@pytest.mark.usefixtures("kaggle")
@pytest.mark.parametrize("token", [True, False])
@pytest.mark.parametrize("proxy", [True, False])
def test_a_server_that_cannot_be_reached(token: bool, proxy: bool, monkeypatch: MonkeyPatch, call: Call) -> None:
    # Nothing listens on a port that was just free, and without a proxy the client asks port 80 of this machine.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free.getsockname()[1]}" if proxy else "")
    if token:
        monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    err = call("download", status=2)
    assert re.search("no connection to Kaggle: .*Connection refused; check the network", err)
    assert TOKEN not in err
    assert ("proxy" in err) == proxy


def test_missing_credentials_or_no_client_are_one_line(kaggle: Kaggle, monkeypatch: MonkeyPatch, call: Call) -> None:
    kaggle.replies["IntrospectToken"] = {"active": False}
    use_token(monkeypatch)
    assert TOKEN in call("run", status=2)
    asked = len(kaggle.asked)
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    assert TOKEN in call("run", status=2)
    assert len(kaggle.asked) == asked
    monkeypatch.setattr("pcam_kaggle.kaggle.client.find_spec", lambda _: None)
    assert "run pip install kaggle" in call("run", status=2)


@pytest.mark.parametrize("in_file", [True, False])
def test_a_token_is_enough(kaggle: Kaggle, in_file: bool, tmp_path: Path, monkeypatch: MonkeyPatch, call: Call) -> None:
    use_token(monkeypatch)
    if in_file:
        monkeypatch.delenv("KAGGLE_API_TOKEN")
        (tmp_path / ".kaggle").mkdir()
        (tmp_path / ".kaggle" / "access_token").write_text(SECRET)
    kaggle.replies |= {"IntrospectToken": {"active": True, "username": "somebody"}, "SaveKernel": STARTED}
    call("run", "--detach")
    assert kaggle.bodies["SaveKernel"]["slug"] == f"somebody/{KERNEL}"
    assert kaggle.credentials == {"Bearer"}


@pytest.mark.parametrize(
    ("replies", "quota", "session"),
    [
        ({STATUS: 404}, "30.0 of 30.0 GPU hours are left until 2026-12-05", f"none (kaggle status: {NO_KERNEL})"),
        # Hours that running sessions have reserved are not left.
        ({QUOTA: {"gpuQuota": RESERVED}}, "15.0 of 30.0 GPU hours are left", f"someone/{KERNEL} is complete"),
        ({QUOTA: {}, STATUS: FAILED}, "unknown", f"someone/{KERNEL} is error (out of memory)"),
    ],
)
def test_status_of_quota_and_session(kaggle: Kaggle, replies: dict[str, Reply], quota: str, session: str, call: Call) -> None:
    kaggle.replies |= replies
    kaggle.stream = ["fold 0\n", "fold 1"]
    printed = ["login: someone, who has joined the competition", f"quota: {quota}", f"session: {session}"]
    assert call("status").splitlines() == printed
    assert call("status", "--log").splitlines() == [*printed, "fold 0", "fold 1"]


def test_output_is_verified_and_used(kaggle: Kaggle, session: Path, home: Path, pcam: Pcam, tmp_path: Path, call: Call) -> None:
    kaggle.replies["ListKernelSessionOutput"] = {}
    assert "has saved no runs" in call("fetch", status=2)
    saved(kaggle, session)
    checkpoint = "/output/runs/bottleneck/fold_1/best.pt"
    content, kaggle.files[checkpoint] = kaggle.files[checkpoint], 503
    # The text of an error is not saved as the file.
    assert re.search("503.*try again later", call("fetch", status=2))
    assert not (home / "runs").exists()
    kaggle.files[checkpoint] = content
    printed = call("fetch")
    assert f"output: bottleneck imported into {home / 'runs'}" in printed
    rates = r"images per second [\d.]+, loader wait 0\.\d+, steps eager, because the device is cpu"
    stages = ", ".join(rf"{stage} seconds \d+\.\d" for stage in ("prepare", "folds", "train", "predict", "blend", "submission"))
    assert re.search(rf"^bottleneck: cpu \(\d+ threads\), {rates} .*, {stages}$", printed, re.MULTILINE), printed
    for path in [*session.glob("runs/bottleneck/*.*"), *session.glob("runs/*/fold_*/*.*"), *session.glob("submissions/bott*")]:
        assert (home / path.relative_to(session)).read_bytes() == path.read_bytes()
    home.rename(tmp_path / "work")
    assert re.search(r"^train.*\(up to date\)", pcam("pipeline").out, re.MULTILINE)


def test_a_submission_goes_and_scores_come_back(kaggle: Kaggle, session: Path, monkeypatch: MonkeyPatch, call: Call) -> None:
    file = session / "submissions" / "bottleneck.csv"
    kaggle.replies["StartSubmissionUpload"] = {"token": "abc", "createUrl": kaggle.address("/upload")}
    kaggle.replies["ListSubmissions"] = {}
    assert "no submissions yet" in call("scores")
    for refusal, printed in (({"message": "Submission not allowed: limit reached"}, "limit reached"), (400, "400")):
        kaggle.replies["CreateSubmission"] = refusal
        assert printed in call("submit", status=2, work=session)
    kaggle.replies["CreateSubmission"] = {"message": f"Successfully submitted to {COMPETITION}"}
    call("submit", work=session)
    assert kaggle.put == file.read_bytes()
    description = kaggle.bodies["CreateSubmission"]["submissionDescription"]
    assert f"OOF AUC {read_json(file.with_suffix('.json'))['oof_auc']['value']:.4f}" in description

    rows = [
        {"ref": 2, "fileName": "bottleneck.csv", "description": "another", "publicScore": "0.5", "privateScore": "0.5"},
        {"ref": 1, "fileName": "bottleneck.csv", "description": description, "publicScore": "0.9512", "privateScore": ""},
    ]
    kaggle.replies["ListSubmissions"] = {"submissions": rows}
    call("scores", work=session)
    made = read_json(file.with_suffix(".json"))
    assert (made["public_score"], made["private_score"]) == (0.9512, None)
    rows[1]["privateScore"] = "0.9401"
    assert "0.9512  0.9401" in call("scores", work=session)
    # No network is needed for a score recorded by hand, or to refuse what was changed since its validation.
    asked = len(kaggle.asked)
    assert "0.9512  0.7500" in call("scores", "bottleneck", "--private", "0.75", work=session)
    for wrong in (["bottleneck"], ["--public", "0.9"]):
        assert "needs NAME and --public or --private" in call("scores", *wrong, status=2, work=session)
    file.write_text("id,label\nx,0.5\n")
    # Outside of a clone.
    monkeypatch.setattr("pcam_kaggle.kaggle.kernel.ROOT", session)
    assert "has changed" in call("submit", "bottleneck", status=2, work=session)
    assert len(kaggle.asked) == asked
