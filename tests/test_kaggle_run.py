"""`kaggle run`, from the push to the scores, with Kaggle's real client against a local server."""

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import Call, Pcam
from kaggle_server import KERNEL, STARTED, Content, Kaggle, Reply, quota, saved, use_token

from pcam_kaggle.core.files import locked, read_json, write_json
from pcam_kaggle.core.paths import COMPETITION
from pcam_kaggle.kaggle import session
from pcam_kaggle.kaggle.failures import RULES

MonkeyPatch = pytest.MonkeyPatch


class Account:
    """A user's pushed versions, statuses to come, and submissions.

    For so many requests `behind` of the latest version Kaggle shows the version before, whose status is `older`. So
    many requests `unlisted` do not list the last submission; if `is_full`, submissions are accepted and never listed.
    """

    def __init__(self, server: Kaggle, output: Path) -> None:
        self.pushed: list[str] = []
        self.server, self.statuses = server, ["QUEUED", "RUNNING", "COMPLETE"]
        self.pending = 2
        self.submitted: list[Content] = []
        self.behind, self.older, self.unlisted, self.is_full = 0, "COMPLETE", 0, False
        saved(server, output)
        server.mark = self._mark
        server.stream = ["prepare: 36 patches\n", "fold 0, epoch  1 of 2: loss 0.5\n"]
        server.replies |= {
            "SaveKernel": self.push,
            "GetKernel": self._kernel,
            "GetKernelSessionStatus": self._status,
            "StartSubmissionUpload": {"token": "abc", "createUrl": server.address("/upload")},
            "CreateSubmission": self._submit,
            "ListSubmissions": self._scored,
        }

    def push(self, body: Content) -> Content:
        self.pushed.append(body["text"])
        return STARTED | {"versionNumber": len(self.pushed)}

    def _version(self, body: Content) -> int:
        return int(body.get("versionLabel", f"v{len(self.pushed) - (self.behind > 0)}").removeprefix("v"))

    def _status(self, body: Content) -> Reply:
        self.behind -= self.behind > 0 and "versionLabel" not in body
        return {"status": self._next_status() if self._version(body) == len(self.pushed) else self.older}

    def _kernel(self, body: Content) -> Reply:
        version = self._version(body)
        self.behind -= self.behind > 0
        if version < 1:
            return 404
        return {"metadata": {"currentVersionNumber": version}, "blob": {"source": self.pushed[version - 1]}}

    def _mark(self, body: Content) -> bytes:
        source = ["", *self.pushed][self._version(body)]
        [mark] = re.findall(r'MARK = \\"(.*?)\\"', source) or [""]
        assert not mark or 'Path(\\"mark.txt\\").write_text(MARK)' in source
        return mark.encode()

    def _next_status(self) -> str:
        # With a second connection the client has read the first log.
        is_awaited = self.statuses[0] == "RUNNING" and self.server.streamed < 2
        return self.statuses[0] if is_awaited or len(self.statuses) == 1 else self.statuses.pop(0)

    def _submit(self, body: Content) -> Reply:
        if not self.is_full:
            self.submitted.insert(0, {"ref": 1, "description": body["submissionDescription"], "status": "PENDING"})
        return {"message": "Successfully submitted"}

    def _scored(self, _: Content) -> Reply:
        # The newest is scored after `pending` requests.
        if self.submitted and self.pending == 0:
            self.submitted[0] |= {"status": "COMPLETE", "publicScore": "0.9512", "privateScore": "0.9401"}
        self.pending -= bool(self.submitted)
        self.unlisted -= bool(self.submitted) and self.unlisted > 0
        return {"submissions": self.submitted[self.unlisted > 0 :]}


@pytest.fixture
def account(kaggle: Kaggle, session: Path, monkeypatch: MonkeyPatch) -> Account:
    monkeypatch.setattr("pcam_kaggle.kaggle.session.POLL_SECONDS", 0.02)
    monkeypatch.setattr("pcam_kaggle.kaggle.session.PATIENCE_SECONDS", 10.0)
    monkeypatch.setattr("pcam_kaggle.kaggle.session.LAG_SECONDS", 2.0)
    return Account(kaggle, session)


def test_one_command_leads_from_the_push_to_the_scores(account: Account, pcam: Pcam, tmp_path: Path, call: Call) -> None:
    work = tmp_path / "work"
    account.unlisted, account.pending = 2, 4
    account.statuses[:0] = ["QUEUED"] * 20
    assert pcam("pipeline", "--name", "local").status == 0
    printed = call("run", "--submit", work=work)
    steps = [
        "login: someone, who has joined the competition",
        "quota: 30.0 of 30.0 GPU hours are left until 2026-12-05; the session ends after 11.0",
        f"push: bottleneck, version 1 of someone/{KERNEL}",
        *("queued", "running, fold 0, epoch  1 of 2", "complete", "output: bottleneck imported", "pooled"),
        "local compared with bottleneck: no significant difference (+0.0000",
        *("submit: ", "does not list it yet", "waiting for the scores", "scores: of bottleneck"),
    ]
    assert re.search(".*".join(map(re.escape, steps)), printed, re.DOTALL), printed
    assert "queued, " not in printed
    made = read_json(work / "submissions" / "bottleneck.json")
    assert (made["public_score"], made["private_score"]) == (0.9512, 0.9401)
    assert "0.9512  0.9401" in printed
    # Everything is done: the same command asks for the scores and nothing else.
    assert re.search(r"\(up to date\).*was submitted before", call("run", "--submit", work=work), re.DOTALL)
    assert (len(account.pushed), len(account.submitted)) == (1, 1)


# The request whose reply does not arrive, since the process is killed before it.
@pytest.mark.slow
@pytest.mark.parametrize("refusal", [None, 404])
@pytest.mark.parametrize(
    "request_name",
    [
        *("GetAcceleratorQuotaStatistics", "SaveKernel", "GetKernelSessionStatus", "ListKernelSessionOutput", "download"),
        *("StartSubmissionUpload", "upload", "CreateSubmission"),
    ],
)
def test_a_killed_command_is_resumed(
    kaggle: Kaggle, account: Account, home: Path, request_name: str, refusal: Reply, call: Call
) -> None:
    account.statuses, account.pending, account.unlisted, kaggle.refusal = ["COMPLETE"], 0, 2, refusal
    command = [sys.executable, "-m", "pcam_kaggle", "kaggle", "run", "--submit", "--work", str(home)]
    first = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def kill(name: str) -> None:
        if name == request_name:
            first.kill()
            first.wait()

    kaggle.hook = kill
    output, _ = first.communicate(timeout=120)
    assert first.returncode == -9, output
    kaggle.hook = lambda _: None
    assert "scores: of bottleneck recorded" in call("run", "--submit")
    assert (len(account.pushed), len(account.submitted)) == (1, 1)
    assert read_json(home / "sessions" / f"{KERNEL}.json")["is_over"]


@pytest.mark.parametrize(
    ("older", "arrives", "reply"), [([], False, None), (["no mark"], False, None), ([], True, None), (["no mark"], True, 502)]
)
def test_a_push_without_a_reply_is_repeated_unless_it_arrived(
    kaggle: Kaggle, account: Account, older: list[str], arrives: bool, reply: Reply, home: Path, call: Call
) -> None:
    account.pushed += older
    # Kaggle still shows the version before, or no notebook.
    account.behind = 1
    kaggle.replies["SaveKernel"] = lambda body: reply if not arrives or account.push(body) else None
    call("run", "--detach", status=2)
    assert read_json(home / "sessions" / f"{KERNEL}.json")["version"] == 0
    kaggle.replies["SaveKernel"] = account.push
    printed = call("run", "--detach")
    assert f"push: bottleneck, version {len(older) + 1} of someone/{KERNEL} " in printed
    assert ("(up to date)" in printed) == arrives
    assert len(account.pushed) == len(older) + 1


@pytest.mark.parametrize(
    ("replies", "expected"),
    [
        ({"GetCompetition": {"userHasEntered": False}}, f"accept its rules at {RULES}"),
        (quota(0.4), "0.4 of 30.0 GPU hours are left until 2026-12-05, and a session needs half an hour"),
        ({"SaveKernel": {"error": "Maximum weekly GPU quota reached"}}, "which `python -m pcam_kaggle kaggle status` tells"),
        ({"SaveKernel": {"error": "Maximum batch GPU session count of 2 reached"}}, "until one of your other sessions ends"),
    ],
)
def test_a_failure_leaves_no_session(
    kaggle: Kaggle, account: Account, home: Path, replies: dict[str, Reply], expected: str, call: Call
) -> None:
    kaggle.replies |= replies
    assert expected in call("run", status=2)
    assert not (home / "sessions" / f"{KERNEL}.json").exists()
    assert account.pushed == []


@pytest.mark.parametrize("has_saved", [False, True])
def test_what_a_failed_session_saved_is_used(kaggle: Kaggle, account: Account, has_saved: bool, home: Path, call: Call) -> None:
    failed = {"status": "ERROR", "failureMessage": "Your notebook\nran out of memory"}
    complete = kaggle.replies | {"GetKernelSessionStatus": {"status": "COMPLETE"}}
    kaggle.replies |= {"GetKernelSessionStatus": failed} | ({} if has_saved else {"ListKernelSessionOutput": 404})
    err = call("run", status=2)
    assert f"version 1 of someone/{KERNEL}: ended as error (Your notebook ran out of memory)" in err
    assert ("has saved no runs" if not has_saved else "is imported, repeat the command with --resume") in err
    kaggle.replies |= complete
    if has_saved:
        shutil.rmtree(home / "runs")
        call("fetch")
    call("run")
    assert len(account.pushed) == 2 - has_saved


@pytest.mark.usefixtures("account")
def test_a_run_trained_here_is_not_the_sessions(pcam: Pcam, tmp_path: Path, call: Call) -> None:
    work = tmp_path / "work"
    call("run", "--detach", work=work)
    assert pcam("pipeline").status == 0
    assert "is another run than that of bottleneck, version 1" in call("run", "--submit", status=2, work=work)
    assert "its run is not here; run" in call("submit", status=2, work=work)
    (work / "runs" / "bottleneck").rename(tmp_path / "moved")
    assert "bottleneck imported" in call("run", work=work)


@pytest.mark.usefixtures("account")
def test_what_is_asked_for_is_told_apart(session: Path, monkeypatch: MonkeyPatch, call: Call) -> None:
    options, warned = ("-e", "pretrained", "--weights", "me/both"), []
    monkeypatch.setattr("pcam_kaggle.kaggle.session.log.warning", lambda *parts: warned.append(parts))
    # A dataset may hold weights and a slide map. There is no session to resume.
    call("run", *options, "--slides", "me/both", "--resume", "--detach")
    assert len(warned) == 1
    assert "is not downloaded yet" in call("run", *options, status=2)
    assert "bottleneck: has another config than blend blends" in call("run", "-e", "blend", status=2, work=session)


def test_another_request_does_not_replace_a_session_that_is_not_downloaded(account: Account, call: Call) -> None:
    call("run", "--detach")
    assert "bottleneck, version 1" in call("run", "-e", "quick", status=2)
    call("run")
    assert len(account.pushed) == 1


@pytest.mark.parametrize(
    ("refusal", "older"), [(None, "COMPLETE"), (404, "COMPLETE"), (404, "ERROR"), ({"code": 400, "message": "no"}, "COMPLETE")]
)
def test_the_output_of_the_version_before_is_not_taken(
    kaggle: Kaggle, account: Account, refusal: Reply, older: str, call: Call
) -> None:
    account.pushed, kaggle.refusal, account.behind, account.older = ["no mark"], refusal, 3, older
    printed = call("run")
    assert re.search("version 2 of .*: running.*output: bottleneck imported", printed, re.DOTALL)
    assert ("Kaggle shows another version" in printed) == (refusal is not None)
    assert ("versionLabel" in kaggle.bodies["ListKernelSessionOutput"]) == (refusal is None)


def test_a_version_that_was_started_since_is_named(
    kaggle: Kaggle, account: Account, home: Path, monkeypatch: MonkeyPatch, call: Call
) -> None:
    monkeypatch.setattr(session, "LAG_SECONDS", 0.1)
    call("run", "--detach")
    replies = kaggle.replies.copy()
    kaggle.replies |= {"GetKernelSessionStatus": {"status": "RUNNING"}, "ListKernelSessionOutput": {}}
    assert "is running and has saved no runs" in call("fetch", status=2)
    account.pushed.append("no mark")
    file = home / "sessions" / f"{KERNEL}.json"
    kaggle.refusal = 404
    for command, status in (("run", "ERROR"), ("run", "COMPLETE"), ("fetch", "COMPLETE")):
        kaggle.replies["GetKernelSessionStatus"] = {"status": status}
        err = call(command, status=2)
        assert f"bottleneck, version 1 of someone/{KERNEL}: " in err
        assert f"the latest version, 2; repeat the command later, or delete {file}" in err
    assert not (home / "runs").exists()
    kaggle.replies = replies
    # Where Kaggle shows each version, the first is there.
    kaggle.refusal = None
    assert "output: bottleneck imported" in call("run")
    # Without a session any output is accepted.
    kaggle.refusal = 404
    assert "output: nothing new" in call("fetch")


def test_a_session_that_lacks_a_source_is_kept(kaggle: Kaggle, account: Account, call: Call) -> None:
    invalid = {"invalidDatasetSources": ["them/x"], "invalidCompetitionSources": ["y"]}
    kaggle.replies["SaveKernel"] = lambda body: account.push(body) | invalid
    assert "left out 2 of the sources as not valid: them/x, y; stop the session at" in call("run", status=2)
    assert "output: bottleneck imported" in call("run")
    assert len(account.pushed) == 1


@pytest.mark.parametrize(
    ("local", "options", "name"),
    [
        ([], (), ""),
        (["runs/bottleneck/metrics.json", "runs/bottleneck/config.json"], (), "bottleneck-kaggle"),
        (["runs/bottleneck/config.json"], (), "bottleneck-kaggle"),
        (["submissions/bottleneck.csv"], (), "bottleneck-kaggle"),
        (["runs/bottleneck/config.json"], ("--name", "mine"), "mine"),
        (["runs/bottleneck/config.json", "runs/bottleneck-kaggle/config.json"], (), None),
    ],
)
def test_a_local_run_keeps_its_name(
    account: Account, session: Path, home: Path, local: list[str], options: tuple[str, ...], name: str | None, call: Call
) -> None:
    for path in local:
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_bytes((session / path.replace("-kaggle", "")).read_bytes())
    if name is None:
        assert "choose a name for the new run with --name" in call("run", *options, status=2)
        return
    assert f"push: {name or 'bottleneck'}, version 1" in call("run", "--detach", *options)
    assert f'NAME = \\"{name}\\"' in account.pushed[0]
    # The same command finds its session.
    assert "(up to date)" in call("run", "--detach", *options)


def test_a_local_run_is_not_submitted_for_the_sessions(
    kaggle: Kaggle, account: Account, session: Path, pcam: Pcam, tmp_path: Path, call: Call
) -> None:
    assert pcam("pipeline", "--name", "bottleneck-kaggle", "--set", "epochs=1").status == 0
    made = tmp_path / "work" / "submissions" / "bottleneck-kaggle.csv"
    assert made.read_bytes() != (session / "submissions" / "bottleneck.csv").read_bytes()
    saved(kaggle, tmp_path / "work")
    assert "output: bottleneck-kaggle imported" in call("run", "--submit", work=session)
    assert kaggle.put == made.read_bytes()
    for options in (("-e", "bottleneck"), ()):
        assert "was submitted before" in call("run", "--submit", *options, work=session)
    call("submit", work=session)
    assert [each["description"].partition(":")[0] for each in account.submitted] == ["bottleneck-kaggle"] * 2
    other = call("run", "--detach", "-e", "quick", "--name", "bottleneck-kaggle", work=session)
    assert "push: bottleneck-kaggle-kaggle, version 2" in other


def test_the_last_sessions_options_are_resumed(kaggle: Kaggle, account: Account, home: Path, call: Call) -> None:
    kaggle.replies["GetKernelSessionStatus"] = {"status": "ERROR"}
    options = ("-e", "pretrained", "--set", "epochs=3", "--weights", "them/encoder", "--seeds", "2", "--name", "mine")
    call("run", *options, "--accelerator", "NvidiaL4", "--hours", "3", status=2)
    # A refused push is not the last session.
    kaggle.replies["SaveKernel"] = {"error": "no"}
    call("run", "-e", "quick", status=2)
    kaggle.replies["SaveKernel"] = account.push
    call("run", "--resume", status=2)
    assert "those of the last session, which makes mine-seeds2" in call("run", "--resume", "--detach", "--hours", "11")
    first, second, third = (re.sub(r"push \w+", "", text) for text in account.pushed)
    assert second == first
    assert third == first.replace("HOURS = 3.0", "HOURS = 11.0") != first
    expected = {"datasetDataSources": ["them/encoder"], "machineShape": "NvidiaL4", "kernelDataSources": [f"someone/{KERNEL}"]}
    expected |= {"competitionDataSources": [COMPETITION], "isPrivate": True, "enableGpu": True, "enableInternet": False}
    assert expected.items() <= kaggle.bodies["SaveKernel"].items()
    # Options that say what to train are not mixed with those of the last session.
    assert "mine-seeds2, version 3" in call("run", "--resume", "-e", "quick", status=2)
    assert "the last session made mine-seeds2; say with -e" in call("run", "--resume", "--set", "epochs=1", status=2)
    file = home / "sessions" / f"{KERNEL}.json"
    write_json(file, read_json(file) | {"is_over": True})
    call("run", "--resume", "--detach", "--accelerator", "NvidiaL4X1", "--public", "--no-internet")
    assert kaggle.bodies["SaveKernel"].items() >= {"machineShape": "NvidiaL4X1", "isPrivate": False}.items()
    assert 'EXPERIMENT = \\"pretrained' in account.pushed[-1]
    # As earlier versions wrote it.
    write_json(file, read_json(file) | {"recipes": {}})
    assert "say with -e" in call("run", "--resume", status=2)


def test_a_submission_that_is_never_listed_can_be_repeated(account: Account, monkeypatch: MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr(session, "LAG_SECONDS", 0.1)
    account.is_full = True
    assert "as when the day's submissions are used up" in call("run", "--submit", status=2)
    account.is_full = False
    call("run", "--submit")
    assert len(account.submitted) == 1


def test_missing_folds_are_resumed(kaggle: Kaggle, account: Account, pcam: Pcam, tmp_path: Path, call: Call) -> None:
    for command in (["pipeline", "--folds", "0,2"], ["blend", "--folds", "0,2"], ["submission"]):
        assert pcam(*command).status == 0
    saved(kaggle, tmp_path / "work")
    assert re.search("missing: folds 1.*with --resume", call("run", "--submit"), re.DOTALL)
    assert account.submitted == []
    # Without --resume there is nothing to do, with it a new session gets the output of the first.
    call("run")
    assert len(account.pushed) == 1
    assert pcam("pipeline").status == 0
    saved(kaggle, tmp_path / "work")
    call("run", "--resume", "--hours", "4")
    assert len(account.pushed) == 2
    assert kaggle.bodies["SaveKernel"]["kernelDataSources"] == [f"someone/{KERNEL}"]
    # The run is complete, so no options of the session matter any more.
    call("run", "--submit")
    call("run", "--resume")
    assert (len(account.pushed), len(account.submitted)) == (2, 1)
    assert "-folds-" not in account.submitted[0]["description"]


def test_a_blend_of_fewer_seeds_is_resumed(kaggle: Kaggle, account: Account, pcam: Pcam, tmp_path: Path, call: Call) -> None:
    # What a session leaves whose time ends after the first of two seeds.
    assert pcam("pipeline", "--name", "bottleneck-seed42").status == 0
    saved(kaggle, tmp_path / "work")
    for options, pushed in (((), 1), ((), 1), (("--resume",), 2)):
        assert re.search("bottleneck-seed42:\n.*with --resume", call("run", "--seeds", "2", *options), re.DOTALL)
        assert len(account.pushed) == pushed
    call("run", "--seeds", "3", "--detach")
    assert len(account.pushed) == 3


def test_one_process_works_on_a_kernel(account: Account, home: Path, monkeypatch: MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr("pcam_kaggle.core.files.LOCK_SECONDS", 0)
    with locked(home / "sessions" / KERNEL):
        assert "another process" in call("run", status=2)
    assert account.pushed == []


def test_a_login_is_renewed(kaggle: Kaggle, account: Account, monkeypatch: MonkeyPatch, call: Call) -> None:
    use_token(monkeypatch)
    monkeypatch.setattr("pcam_kaggle.kaggle.client.LOGIN_SECONDS", 0.0)
    kaggle.replies["IntrospectToken"] = {"active": True, "username": "someone"}
    assert "next: repeat the command with --submit" in call("run")
    assert kaggle.asked.count("IntrospectToken") > 3
    assert len(account.pushed) == 1


@pytest.mark.usefixtures("account")
def test_no_request_waits_forever(kaggle: Kaggle, monkeypatch: MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr("pcam_kaggle.kaggle.client.TIMEOUT", (0.2, 0.2))
    # A server that accepts the connection and never answers.
    stop = threading.Event()
    kaggle.hook = lambda name: stop.wait(20) if name == "GetCompetition" else None
    assert "no connection to Kaggle: timed out" in call("run", status=2)
    stop.set()


@pytest.mark.parametrize(("status", "expected"), [(503, "try again later"), ({"status": "COMPLETE"}, "not scored for half an")])
def test_waiting_has_an_end(
    kaggle: Kaggle, account: Account, status: Reply, expected: str, monkeypatch: MonkeyPatch, call: Call
) -> None:
    monkeypatch.setattr(session, "PATIENCE_SECONDS", 0.1)
    account.pending = 10**6
    kaggle.replies["GetKernelSessionStatus"] = status
    assert expected in call("run", "--submit", status=2)


@pytest.mark.usefixtures("account")
def test_a_session_survives_a_lost_connection(kaggle: Kaggle, call: Call) -> None:
    replies: list[Reply] = [404, 404, {"status": "RUNNING"}, None, 502, {"status": "COMPLETE"}]
    kaggle.replies["GetKernelSessionStatus"] = lambda _: replies.pop(0) if len(replies) > 1 else replies[0]
    assert call("run").count("; the session continues") == 3


@pytest.mark.parametrize(
    ("left", "options", "hours"),
    [(30.0, (), 11.0), (6.0, (), 5.8), (0.5, (), 0.3), (3.0, ("--hours", "2"), 2.0), (None, (), 11.0)],
)
def test_a_session_gets_the_hours_that_the_quota_leaves(
    account: Account, kaggle: Kaggle, left: float | None, options: tuple[str, ...], hours: float, call: Call
) -> None:
    kaggle.replies |= quota(left) if left else {"GetAcceleratorQuotaStatistics": {}}
    call("run", "--detach", *options)
    assert f"HOURS = {hours}" in account.pushed[0]
    # The request is recognised although its hours were changed.
    kaggle.replies |= quota(0.0)
    call("run")
    assert len(account.pushed) == 1


def test_a_submission_without_a_score_can_be_repeated(kaggle: Kaggle, account: Account, call: Call) -> None:
    failed = {"status": "ERROR", "errorDescription": "Missing ids"}
    kaggle.hook = lambda name: account.submitted[0].update(failed) if name == "CreateSubmission" else None
    assert "Kaggle can't score it: Missing ids" in call("run", "--submit", status=2)
    kaggle.hook, account.pending = lambda _: None, 1
    call("run", "--submit")
    assert len(account.submitted) == 2


@pytest.mark.parametrize("status", [403, 500])
def test_a_refused_upload_is_one_line(kaggle: Kaggle, account: Account, status: int, call: Call) -> None:
    kaggle.upload_status = status
    err = call("run", "--submit", status=2)
    assert err == "error: kaggle submit: Kaggle's storage has refused the upload; try again later\n"
    assert account.submitted == []


def test_a_lost_upload_is_one_line_without_its_address(account: Account, monkeypatch: MonkeyPatch, call: Call) -> None:
    from kaggle.api.kaggle_api_extended import KaggleApi, ResumableUploadResult

    def lost(*_: object) -> object:
        # What the client prints after its ten tries, which take minutes.
        print("HTTPSConnectionPool(host='storage'): Max retries with url: /x?Signature=abc ([Errno 113] No route to host)")
        return ResumableUploadResult.INCOMPLETE

    monkeypatch.setattr(KaggleApi, "upload_complete", lost)
    err = call("run", "--submit", status=2)
    assert "no connection to Kaggle: [Errno 113] No route to host" in err
    assert "Signature" not in err
    assert account.submitted == []
