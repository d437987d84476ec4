"""`kaggle run`, from the push to the scores, with Kaggle's real client against a local server."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import Outcome
from kaggle_server import KERNEL, SECRET, STARTED, Content, Kaggle, Reply, quota, saved

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked
from pcam_kaggle.kaggle import session
from pcam_kaggle.kaggle.client import Quota
from pcam_kaggle.kaggle.failures import RULES
from pcam_kaggle.kaggle.session import allowed_hours

ROOT = Path(__file__).parent.parent
Pcam = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(session, "PATIENCE", 0.0)
    monkeypatch.setattr(session, "SCORE_SECONDS", 0.02)


class Account:
    """What Kaggle remembers of a user: the pushed versions, the statuses to come, and the submissions."""

    def __init__(self, server: Kaggle, output: Path) -> None:
        self.pushed: list[str] = []
        self.statuses = ["QUEUED", "RUNNING", "COMPLETE"]
        self.pending = 1
        self.submitted: list[Content] = []
        saved(server, output)
        server.stream = ["prepare: 36 patches\n", "fold 0, epoch  1 of 2: loss 0.5\n"]
        server.replies |= {
            "SaveKernel": self._push,
            "GetKernel": self._kernel,
            "GetKernelSessionStatus": lambda _: {"status": self._next_status()},
            "StartSubmissionUpload": {"token": "abc", "createUrl": server.address("/upload")},
            "CreateSubmission": self._submit,
            "ListSubmissions": lambda _: {"submissions": self._scored()},
        }

    def _push(self, body: Content) -> Reply:
        self.pushed.append(body["text"])
        return STARTED | {"versionNumber": len(self.pushed)}

    def _kernel(self, _: Content) -> Reply:
        if not self.pushed:
            return 404
        return {"metadata": {"currentVersionNumber": len(self.pushed)}, "blob": {"source": self.pushed[-1]}}

    def _next_status(self) -> str:
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]

    def _submit(self, body: Content) -> Reply:
        self.submitted.insert(0, {"ref": 1, "description": body["submissionDescription"], "status": "PENDING"})
        return {"message": "Successfully submitted"}

    def _scored(self) -> list[Content]:
        if self.submitted and self.pending == 0:
            self.submitted[0] |= {"status": "COMPLETE", "publicScore": "0.9512", "privateScore": "0.9401"}
        self.pending -= bool(self.submitted)
        return self.submitted


@pytest.fixture
def account(kaggle: Kaggle, session: Path) -> Account:
    """Return an account for which every session makes a run of `bottleneck`."""
    return Account(kaggle, session)


def state(home: Path) -> dict[str, Any]:
    """Return what is recorded of the session."""
    return json.loads((home / "sessions" / f"{KERNEL}.json").read_text())


def test_one_command_leads_from_the_push_to_the_scores(
    kaggle: Kaggle, account: Account, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kaggle", "run", "--submit", "--work", str(home)]) == 0
    printed = capsys.readouterr().out
    steps = [
        "login: someone, who has joined the competition",
        "quota: 30.0 of 30.0 GPU hours are left until 2026-12-05; the session ends after 11.0",
        f"push: bottleneck, version 1 of someone/{KERNEL}",
        "queued",
        "fold 0, epoch  1 of 2",
        "complete",
        "output: bottleneck imported",
        "pooled",
        "submit: ",
        "waiting for the scores",
        "leaderboard: scores of bottleneck recorded",
    ]
    found = [printed.find(step) for step in steps]
    assert -1 not in found, (steps[found.index(-1)], printed)
    assert found == sorted(found)
    made = json.loads((home / "submissions" / "bottleneck.json").read_text())
    assert (made["public_score"], made["private_score"]) == (0.9512, 0.9401)
    assert "0.9512  0.9401" in printed
    # Everything is done: the same command asks for the scores and nothing else.
    before = len(account.pushed), kaggle.put
    assert main(["kaggle", "run", "--submit", "--work", str(home)]) == 0
    printed = capsys.readouterr().out
    assert "(up to date)" in printed
    assert "was submitted before" in printed
    assert (len(account.pushed), kaggle.put) == before
    assert len(account.submitted) == 1


def test_the_run_is_compared_with_the_local_ones(
    account: Account, home: Path, pcam: Pcam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pcam("pipeline", "--name", "local").status == 0
    capsys.readouterr()
    assert main(["kaggle", "run", "--work", str(tmp_path / "work")]) == 0
    printed = capsys.readouterr().out
    assert "local compared with bottleneck: no significant difference (+0.0000" in printed
    assert printed.rstrip().endswith("next: repeat the command with --submit (make: in ARGS)")


# The request whose reply does not arrive, since the process is killed before it.
@pytest.mark.slow
@pytest.mark.parametrize(
    "request_name",
    [
        "GetAcceleratorQuotaStatistics",
        "SaveKernel",
        "GetKernelSessionStatus",
        "ListKernelSessionOutput",
        "download",
        "StartSubmissionUpload",
        "upload",
        "CreateSubmission",
    ],
)
def test_a_killed_command_goes_on_where_it_was(kaggle: Kaggle, account: Account, home: Path, request_name: str) -> None:
    account.statuses, account.pending = ["COMPLETE"], 0
    command = [sys.executable, "-m", "pcam_kaggle", "kaggle", "run", "--submit", "--work", str(home)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, cwd=home.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def kill(name: str) -> None:
        if name == request_name:
            first.kill()
            first.wait()

    kaggle.hook = kill
    output, _ = first.communicate(timeout=120)
    assert first.returncode == -9, output
    kaggle.hook = lambda _: None
    second = subprocess.run(command, cwd=home.parent, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert second.returncode == 0, second.stderr
    assert "leaderboard: scores of bottleneck recorded" in second.stdout
    assert len(account.pushed) == 1
    assert len(account.submitted) == 1
    assert not (home / "sessions" / f"{KERNEL}.json").exists()


def test_a_push_that_did_not_arrive_is_repeated(
    kaggle: Kaggle, account: Account, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrived = kaggle.replies["SaveKernel"]
    kaggle.replies["SaveKernel"] = None
    assert main(["kaggle", "run", "--work", str(home)]) == 2
    assert state(home)["version"] == 0
    kaggle.replies["SaveKernel"] = arrived
    # A version without the mark is another one.
    account.pushed.append("an older version")
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert len(account.pushed) == 2
    assert "version 2" in capsys.readouterr().out


@pytest.mark.parametrize("reply", [502, None, {"versionNumber": "three"}])
def test_a_push_that_arrived_is_not_repeated_if_its_reply_did_not(
    kaggle: Kaggle, account: Account, home: Path, reply: Reply, capsys: pytest.CaptureFixture[str]
) -> None:
    arrived = kaggle.replies["SaveKernel"]

    def lost(body: Content) -> Reply:
        assert callable(arrived)
        arrived(body)
        return reply

    kaggle.replies["SaveKernel"] = lost
    assert main(["kaggle", "run", "--detach", "--work", str(home)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    # A second push is refused, and the run continues the first.
    assert main(["kaggle", "run", "--detach", "--work", str(home)]) == 2
    assert "version 1" in capsys.readouterr().err
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert len(account.pushed) == 1


def test_the_check_tells_login_and_quota(kaggle: Kaggle, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kaggle", "status", "--work", str(home)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        "login: someone, who has joined the competition",
        "quota: 30.0 of 30.0 GPU hours are left until 2026-12-05",
    ]
    # Hours that running sessions have reserved are not left.
    gpu = {"timeUsed": "36000s", "timeReserved": "18000s", "totalTimeAllowed": "108000s"}
    kaggle.replies["GetAcceleratorQuotaStatistics"] = {"gpuQuota": gpu}
    assert main(["kaggle", "status", "--work", str(home)]) == 0
    assert "quota: 15.0 of 30.0 GPU hours are left\n" in capsys.readouterr().out
    kaggle.replies["GetAcceleratorQuotaStatistics"] = {}
    assert main(["kaggle", "status", "--work", str(home)]) == 0
    assert "quota: unknown" in capsys.readouterr().out


KINDS: dict[str, tuple[dict[str, Reply], str]] = {
    "credentials": ({"GetCompetition": 401}, "KAGGLE_API_TOKEN or ~/.kaggle/access_token"),
    "rules": ({"GetCompetition": {"userHasEntered": False}}, f"accept its rules at {RULES}"),
    "quota": (quota(0.5), "0.5 of 30.0 GPU hours are left"),
    "quota that Kaggle refuses": (
        {"SaveKernel": {"error": "Maximum weekly GPU quota of 30 hours reached"}},
        "which `python -m pcam_kaggle kaggle status` tells",
    ),
    "network": ({"GetCompetition": None}, "no connection to Kaggle"),
    "server": ({"GetCompetition": 503}, "try again later"),
    "source": ({"SaveKernel": STARTED | {"invalidDatasetSources": ["someone/gone"]}}, "not valid: someone/gone"),
    "source that is not found": ({"SaveKernel": 404}, "correct the sources in kernel-metadata.json"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_failure_has_its_own_line(
    kaggle: Kaggle, account: Account, home: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.replies |= KINDS[kind][0]
    assert main(["kaggle", "run", "--work", str(home)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert [name for name, (_, text) in KINDS.items() if text in err] == [kind], err
    assert not (home / "sessions" / f"{KERNEL}.json").exists()
    assert account.pushed == []
    assert kaggle.names().count("SaveKernel") == ("SaveKernel" in KINDS[kind][0])


def test_a_failed_session_is_told_and_the_same_command_starts_a_new_one(
    kaggle: Kaggle, account: Account, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.replies["GetKernelSessionStatus"] = {"status": "ERROR", "failureMessage": "Your notebook\nran out of memory"}
    assert main(["kaggle", "run", "--work", str(home)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "version 1" in err
    assert "ended as error (Your notebook ran out of memory)" in err
    kaggle.replies["GetKernelSessionStatus"] = {"status": "COMPLETE"}
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert len(account.pushed) == 2


def test_another_request_does_not_replace_a_session_that_is_not_downloaded(
    kaggle: Kaggle, account: Account, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["kaggle", "run", "--detach", "--work", str(home)]) == 0
    assert main(["kaggle", "run", "-e", "quick", "--work", str(home)]) == 2
    assert "bottleneck, version 1" in capsys.readouterr().err
    assert len(account.pushed) == 1
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert len(account.pushed) == 1


def test_an_output_of_another_version_is_refused(account: Account, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kaggle", "run", "-e", "quick", "--work", str(home)]) == 2
    assert "has saved bottleneck, not quick" in capsys.readouterr().err
    assert not (home / "runs").exists()


def test_missing_folds_are_trained_by_a_resumed_session(
    kaggle: Kaggle, account: Account, home: Path, pcam: Pcam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    complete = dict(kaggle.files), kaggle.replies["ListKernelSessionOutput"]
    for command in (["pipeline", "--folds", "0,2"], ["blend", "--folds", "0,2"], ["submission"]):
        assert pcam(*command).status == 0
    saved(kaggle, tmp_path / "work")
    run = ["kaggle", "run", "--work", str(home)]
    assert main([*run, "--submit"]) == 0
    printed = capsys.readouterr().out
    assert "missing: folds 1" in printed
    assert "with --resume" in printed
    assert account.submitted == []
    # Without --resume there is nothing to do, with it a new session gets the output of the first.
    assert main(run) == 0
    assert len(account.pushed) == 1
    kaggle.files, kaggle.replies["ListKernelSessionOutput"] = complete
    assert main([*run, "--resume", "--hours", "4"]) == 0
    assert len(account.pushed) == 2
    assert kaggle.bodies["SaveKernel"]["kernelDataSources"] == [f"someone/{KERNEL}"]
    # The run is complete, so no options of the session matter any more.
    assert main([*run, "--submit"]) == 0
    assert main([*run, "--resume"]) == 0
    assert len(account.pushed) == 2
    assert len(account.submitted) == 1
    assert "-folds-" not in account.submitted[0]["description"]


def test_a_blend_of_fewer_seeds_is_imported_and_resumed(
    kaggle: Kaggle, account: Account, home: Path, pcam: Pcam, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # What a session leaves whose time ends after the first of two seeds.
    assert pcam("pipeline", "--name", "bottleneck-seed42").status == 0
    saved(kaggle, tmp_path / "work")
    run = ["kaggle", "run", "--seeds", "2", "--work", str(home)]
    assert main(run) == 0
    printed = capsys.readouterr().out
    assert "bottleneck-seed42: pooled" in printed
    assert "with --resume" in printed
    assert main(run) == 0
    assert len(account.pushed) == 1
    assert main([*run, "--resume"]) == 0
    assert len(account.pushed) == 2


@pytest.mark.parametrize("name", ["oof.csv", "config.json", "fold_1/best.pt"])
def test_an_error_in_place_of_a_file_is_not_saved_as_the_file(
    kaggle: Kaggle, account: Account, home: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, kaggle.files[f"/output/runs/bottleneck/{name}"] = kaggle.files[f"/output/runs/bottleneck/{name}"], 503
    assert main(["kaggle", "run", "--work", str(home)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "503" in err
    assert "try again later" in err
    assert not (home / "runs").exists()
    kaggle.files[f"/output/runs/bottleneck/{name}"] = content
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert len(account.pushed) == 1


def test_two_processes_do_not_work_on_one_kernel(
    account: Account, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pcam_kaggle.core.files.LOCK_SECONDS", 0)
    with locked(home / "sessions" / KERNEL):
        for command in ("run", "push"):
            assert main(["kaggle", command, "--work", str(home)]) == 2
            assert "another process" in capsys.readouterr().err
    assert account.pushed == []


def test_a_login_is_renewed_in_a_long_session(
    kaggle: Kaggle, account: Account, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    monkeypatch.setattr("pcam_kaggle.kaggle.client.LOGIN_SECONDS", 0.0)
    kaggle.replies["IntrospectToken"] = {"active": True, "username": "someone"}
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert kaggle.names().count("IntrospectToken") > 3
    assert len(account.pushed) == 1


def test_no_request_waits_forever(
    kaggle: Kaggle, account: Account, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pcam_kaggle.kaggle.client.TIMEOUT", (0.2, 0.2))
    # A server that accepts the connection and never answers.
    stop = threading.Event()
    kaggle.hook = lambda name: stop.wait(20) if name == "GetCompetition" else None
    assert main(["kaggle", "run", "--work", str(home)]) == 2
    stop.set()
    assert "no connection to Kaggle: timed out" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["PATIENCE", "SCORE_PATIENCE"])
def test_waiting_has_an_end(
    kaggle: Kaggle,
    account: Account,
    home: Path,
    limit: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(session, "PATIENCE", 0.1)
    monkeypatch.setattr(session, "SCORE_PATIENCE", 0.1)
    account.pending = 10**6
    if limit == "PATIENCE":
        kaggle.replies["GetKernelSessionStatus"] = 503
    assert main(["kaggle", "run", "--submit", "--work", str(home)]) == 2
    assert ("try again later" if limit == "PATIENCE" else "not scored for half an hour") in capsys.readouterr().err


def test_a_session_survives_a_lost_connection(
    kaggle: Kaggle, account: Account, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replies: list[Reply] = [{"status": "RUNNING"}, None, 502, {"status": "COMPLETE"}]
    kaggle.replies["GetKernelSessionStatus"] = lambda _: replies.pop(0) if len(replies) > 1 else replies[0]
    monkeypatch.setattr(session, "PATIENCE", 60.0)
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("warning: ") == 1
    assert "the session continues" in printed.err
    assert "output: bottleneck imported" in printed.out


def test_a_log_that_starts_again_is_not_shown_again(
    kaggle: Kaggle, account: Account, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # At each new connection the server sends the log from its beginning.
    streams: list[str] = []
    kaggle.hook = lambda name: streams.append(name) if name == "log" else None
    kaggle.replies["GetKernelSessionStatus"] = lambda _: {"status": "COMPLETE" if len(streams) > 3 else "RUNNING"}
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert capsys.readouterr().out.count("prepare: 36 patches") == 1


def test_a_session_ends_before_the_quota_does(account: Account, kaggle: Kaggle, home: Path) -> None:
    kaggle.replies |= quota(6.0)
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert "HOURS = 5.8" in account.pushed[0]
    # The request is recognised although its hours were changed.
    kaggle.replies |= quota(3.0)
    assert main(["kaggle", "run", "--work", str(home)]) == 0
    assert len(account.pushed) == 1


@pytest.mark.parametrize(
    ("left", "asked", "hours", "least", "expected"),
    [
        (30.0, 11.0, 4.0, 0.8, 11.0),
        (6.0, 11.0, 4.0, 0.8, 5.8),
        # A session that the user wants to be short ends in time with the folds that it has.
        (3.0, 2.0, 4.0, 0.8, 2.0),
        (3.0, 11.0, 4.0, 0.8, "at least 4.0; wait until .*, or train the folds that fit with --hours 2.8"),
        (0.5, 11.0, 4.0, 0.8, r"at least 4.0; wait until 2026-12-05 00:00 UTC$"),
        (0.1, 11.0, None, None, "none can be started"),
        (6.0, 11.0, None, None, 5.8),
    ],
)
def test_a_session_gets_the_hours_that_the_quota_leaves(
    left: float, asked: float, hours: float | None, least: float | None, expected: float | str
) -> None:
    needs = None if hours is None or least is None else Needs(memory=1, output=1, hours=hours, least_hours=least)
    week = Quota(left, 30.0, pd.Timestamp("2026-12-05").to_pydatetime())
    if isinstance(expected, float):
        assert allowed_hours(week, asked, needs) == expected
        return
    with pytest.raises(UserError, match=expected):
        allowed_hours(week, asked, needs)


def test_a_submission_that_kaggle_cannot_score_is_an_error_and_can_be_repeated(
    kaggle: Kaggle, account: Account, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = kaggle.replies["ListSubmissions"]

    def failed(_: Content) -> Reply:
        return {"submissions": [row | {"status": "ERROR", "errorDescription": "Missing ids"} for row in account.submitted]}

    kaggle.replies["ListSubmissions"] = failed
    run = ["kaggle", "run", "--submit", "--work", str(home)]
    assert main(run) == 2
    assert "Kaggle can't score it: Missing ids" in capsys.readouterr().err
    account.submitted[0] |= {"status": "ERROR"}

    def newest_first(body: Content) -> Reply:
        assert callable(scored)
        account.submitted.sort(key=lambda row: row["status"] == "ERROR")
        return scored(body)

    kaggle.replies["ListSubmissions"] = newest_first
    assert main(run) == 0
    assert len(account.submitted) == 2


@pytest.mark.parametrize("status", [403, 500])
def test_a_refused_upload_is_one_line(
    kaggle: Kaggle, account: Account, home: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kaggle.upload_status = status
    assert main(["kaggle", "run", "--submit", "--work", str(home)]) == 2
    assert capsys.readouterr().err == "error: kaggle submit: Kaggle's storage has refused the upload; try again later\n"
    assert account.submitted == []


def test_a_lost_upload_is_one_line_without_its_address(
    account: Account, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kaggle.api.kaggle_api_extended import KaggleApi, ResumableUploadResult

    def lost(*_: object) -> object:
        # What the client prints after its ten tries, which take minutes.
        print("HTTPSConnectionPool(host='storage'): Max retries with url: /x?Signature=abc ([Errno 113] No route to host)")
        return ResumableUploadResult.INCOMPLETE

    monkeypatch.setattr(KaggleApi, "upload_complete", lost)
    assert main(["kaggle", "run", "--submit", "--work", str(home)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no connection to Kaggle: [Errno 113] No route to host" in err
    assert "Signature" not in err
    assert account.submitted == []


def test_a_submission_on_a_later_page_is_recognised(kaggle: Kaggle, account: Account, home: Path) -> None:
    run = ["kaggle", "run", "--submit", "--work", str(home)]
    assert main(run) == 0
    others = [{"ref": n, "description": f"other {n}", "status": "COMPLETE"} for n in range(200)]
    kaggle.replies["ListSubmissions"] = lambda body: {"submissions": others if body["page"] == 1 else account.submitted}
    assert main(run) == 0
    assert len(account.submitted) == 1


def test_make_runs_it() -> None:
    command = ["make", "--dry-run", "kaggle", "EXPERIMENT=quick", "ARGS=--submit"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"-m pcam_kaggle kaggle run -e 'quick' --submit$", printed, re.MULTILINE)
