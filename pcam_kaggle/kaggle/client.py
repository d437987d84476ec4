"""Kaggle through the Python interface of its own client: login, quota, kernels, submissions and scores."""

import contextlib
import functools
import io
import sys
import time
from collections.abc import Collection, Iterator
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.paths import COMPETITION
from pcam_kaggle.kaggle.failures import CREDENTIALS, RULES, Refused, Unreachable, asking, disconnected, refused

# Files or submissions that Kaggle lists at once.
PAGE_SIZE = 200
# Seconds until a connection is made, and between two pieces of a reply.
TIMEOUT = (10.0, 120.0)
# Seconds after which the client logs in again.
LOGIN_SECONDS = 3600.0
SAVED_FOLDERS = ("runs", "folds", "submissions")
SUBMISSION_COLUMNS = ["description", "status", "error_description", "public_score", "private_score"]


class Quota(NamedTuple):
    """The GPU hours of a week: `left`, neither used nor reserved, of `total`, until `renewed` (None if unknown)."""

    left: float
    total: float
    renewed: datetime | None

    def __str__(self) -> str:
        until = f" until {self.renewed:%Y-%m-%d}" if self.renewed else ""
        return f"{self.left:.1f} of {self.total:.1f} GPU hours are left{until}"


class Status(NamedTuple):
    """The status of a kernel's session, such as RUNNING, and why it failed, empty if it did not."""

    name: str
    failure: str = ""

    def __str__(self) -> str:
        return f"{self.name.lower()}{f' ({self.failure})' if self.failure else ''}"

    @property
    def is_over(self) -> bool:
        """Whether the session has ended."""
        return self.name not in ("QUEUED", "RUNNING", "CANCEL_REQUESTED", "NEW_SCRIPT")


class Client:
    """Kaggle, under the account of the user, whose name is `owner`; a kernel is named by its id, owner/slug.

    A `version` is counted from 1; 0 is the latest. `tells_versions` is whether the last reply was of the version that was asked
    for: where Kaggle does not show that, it is of the latest.
    All methods raise UserError, or its subclass Unreachable where the same request may succeed later. The constructor logs in.
    """

    def __init__(self) -> None:
        self._log_in()

    def _log_in(self) -> None:
        if find_spec("kaggle") is None:
            raise UserError("Kaggle's client is not installed; run pip install kaggle")
        # The client logs in when it is imported, ignores a failure, and prints advice of its own.
        with asking("login"), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from kaggle.api.kaggle_api_extended import KaggleApi

            _limit_waiting()
            KaggleApi.already_printed_version_warning = True
            self._api: Any = KaggleApi()
            # The client ends the process if it has no credentials.
            with contextlib.suppress(SystemExit):
                self._api.authenticate()
        self.owner = self._api.get_config_value("username") or ""
        if not self.owner:
            raise UserError(f"kaggle login: {CREDENTIALS}")
        self._logged_in = time.monotonic()

    def check_rules(self) -> None:
        """Raise UserError unless the user has joined the competition and so accepted its rules."""
        from kagglesdk.competitions.types.competition_api_service import ApiGetCompetitionRequest

        request = ApiGetCompetitionRequest()
        request.competition_name = COMPETITION
        with asking("rules"), self._api.build_kaggle_client() as kaggle:
            competition = kaggle.competitions.competition_api_client.get_competition(request)
        if not competition.user_has_entered:
            raise UserError(f"kaggle rules: {self.owner} has not joined the competition; accept its rules at {RULES}")

    def quota(self) -> Quota | None:
        """Return this week's GPU quota; None if Kaggle does not tell it."""
        with asking("quota"):
            reply = self._api.quota_view()
            gpu = reply.gpu_quota
            if gpu is None or gpu.total_time_allowed is None:
                return None
            durations = (gpu.total_time_allowed, gpu.time_used, gpu.time_reserved)
            total, used, reserved = (each.total_seconds() / 3600 if each else 0.0 for each in durations)
            return Quota(max(0.0, total - used - reserved), total, reply.quota_refresh_time)

    def download_archive(self, folder: Path) -> Path:
        """Download the competition's archive into `folder`, resuming a partial download, and return its file."""
        with asking("download"), contextlib.redirect_stdout(io.StringIO()):
            self._api.competition_download_files(COMPETITION, path=str(folder), quiet=not sys.stderr.isatty())
        return folder / f"{COMPETITION}.zip"

    def push(self, folder: Path) -> tuple[int, str, list[str]]:
        """Push the kernel in `folder`, which starts its session; return version, address, and sources that Kaggle left out."""
        with asking("push"), contextlib.redirect_stdout(io.StringIO()):
            reply = self._api.kernels_push(str(folder))
        if reply.error:
            raise refused("push", reply.error)
        kinds = ("tags", "dataset_sources", "competition_sources", "kernel_sources", "model_sources")
        left_out = [name for kind in kinds for name in getattr(reply, f"invalid_{kind}") or ()]
        return reply.version_number or 0, str(reply.url), left_out

    def _ask(self, method: str, kernel: str, version: int, **fields: object) -> Any:
        """Return the reply of `method` to its request with `fields`."""
        from kagglesdk.kernels.types import kernels_api_service
        from requests import HTTPError

        request = getattr(kernels_api_service, f"Api{method.title().replace('_', '')}Request")()
        self.tells_versions = version > 0
        request.user_name, _, request.kernel_slug = kernel.partition("/")
        for name, value in (fields | ({"version_label": f"v{version}"} if version else {})).items():
            setattr(request, name, value)
        try:
            with self._api.build_kaggle_client() as kaggle:
                return getattr(kaggle.kernels.kernels_api_client, method)(request)
        except HTTPError as error:
            code = error.response.status_code if error.response is not None else 500
            if not version or code in (401, 403, 429) or code >= 500:
                raise
        return self._ask(method, kernel, 0, **fields)

    def source(self, kernel: str) -> tuple[int, str]:
        """Return the number of the latest version of `kernel`, and its notebook; 0 and empty if Kaggle shows none."""
        with contextlib.suppress(Refused), asking("status"):
            reply = self._ask("get_kernel", kernel, 0)
            return reply.metadata.current_version_number or 0, reply.blob.source or ""
        return 0, ""

    def status(self, kernel: str, version: int = 0) -> Status:
        """Return the status of the session of `version` of `kernel`."""
        # The token of an OAuth login expires within the hours of a session.
        if time.monotonic() - self._logged_in > LOGIN_SECONDS:
            self._log_in()
        with asking("status"):
            reply = self._ask("get_kernel_session_status", kernel, version)
            return Status(reply.status.name, " ".join((reply.failure_message or "").split()))

    def follow_log(self, kernel: str) -> Iterator[str]:
        """Yield the pieces of the log of the last session of `kernel`, as they are written if it is running."""
        with asking("log"):
            for event in self._api.kernels_logs_stream(kernel):
                yield str(event.get("data", ""))

    def output(self, kernel: str, folder: Path, version: int = 0, names: Collection[str] = SAVED_FOLDERS) -> None:
        """Download the files and folders `names` that the session of `version` of `kernel` has saved into `folder`."""
        page: dict[str, object] = {"page_size": PAGE_SIZE}
        with asking("fetch"):
            while page:
                reply = self._ask("list_kernel_session_output", kernel, version, **page)
                for file in reply.files or ():
                    if file.file_name.partition("/")[0] in names:
                        _save(file.url, folder / file.file_name)
                page = page | {"page_token": reply.next_page_token} if reply.next_page_token else {}

    def submit(self, file: Path, message: str) -> None:
        """Submit `file` with `message` as its description."""
        printed = io.StringIO()
        with asking("submit"), contextlib.redirect_stdout(printed):
            reply = self._api.competition_submit(str(file), message, COMPETITION, quiet=True)
        if reply.message == self._api.COMPETITION_SUBMIT_UPLOAD_FAILED_MESSAGE:
            # The client prints why a connection failed, with an address that is secret, and nothing if the upload was refused.
            if reason := printed.getvalue():
                raise disconnected("submit", reason)
            raise Unreachable("kaggle submit: Kaggle's storage has refused the upload; try again later")
        if "uccess" not in reply.message:
            raise refused("submit", reply.message or "no reason given")

    def submissions(self) -> pd.DataFrame:
        """Return the columns `SUBMISSION_COLUMNS` of the user's newest 200 submissions, the newest first.

        The status is `pending`, `complete` or `error`; scores are float64, NaN if unknown.
        """
        with asking("scores"):
            found = self._api.competition_submissions(COMPETITION, page_size=PAGE_SIZE) or []
            rows = [[getattr(each, name) for name in SUBMISSION_COLUMNS] for each in found]
            table = pd.DataFrame(rows, columns=SUBMISSION_COLUMNS)
            table["status"] = [status.name.lower() for status in table["status"]]
        for name in ("public_score", "private_score"):
            table[name] = pd.to_numeric(table[name], errors="coerce").astype("float64")
        return table.fillna({"description": "", "error_description": ""})


def _save(url: str, path: Path) -> None:
    # The client's own download does not look at the status of a reply, and saves an error's text in place of a file.
    import requests

    path.parent.mkdir(parents=True, exist_ok=True)
    with requests.get(url, stream=True, timeout=TIMEOUT) as reply, path.open("wb") as file:
        reply.raise_for_status()
        for piece in reply.iter_content(1 << 20):
            file.write(piece)


@functools.cache
def _limit_waiting() -> None:
    # The client sets no timeout, and would wait forever on a lost connection. The class is patched, since the client makes its
    # sessions, and for uploads also their adapters, itself, and requests ignores `socket.setdefaulttimeout`.
    from requests.adapters import HTTPAdapter

    send = HTTPAdapter.send

    def limited(self: Any, request: Any, stream: bool = False, timeout: Any = None, **options: Any) -> Any:
        return send(self, request, stream, timeout or TIMEOUT, **options)

    HTTPAdapter.send = limited  # type: ignore[method-assign,assignment]
