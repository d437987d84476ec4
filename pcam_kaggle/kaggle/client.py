"""Kaggle through its own command line client: kernels, submissions and scores."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd

from pcam_kaggle import UserError, examples
from pcam_kaggle.data.layout import COMPETITION

RULES = f"kaggle.com/competitions/{COMPETITION}/rules"
NO_CREDENTIALS = (
    "no valid credentials; put a token from kaggle.com/settings/api into KAGGLE_API_TOKEN or ~/.kaggle/access_token"
)
# Patterns in what the client prints, of which the first match counts, and the message for the user. The client prints the same
# text for a kernel that does not exist and for one that the account may not see.
FAILURES = (
    (
        r"Max retries exceeded|Connection (aborted|broken)|Response ended prematurely|Read timed out|407 Client Error",
        "no connection to Kaggle: {cause}; check the network and try again",
    ),
    (r"Authentication required|401 Client Error|Unauthori[sz]ed|Unauthenticated", NO_CREDENTIALS),
    (
        r"Cannot access kernel|^kernels (?!push)(?s:.*)404 Client Error",
        "Kaggle shows no such kernel to this account; create it with make kernel-push",
    ),
    (r"^kernels push(?s:.*)404 Client Error", "{message}; correct the sources in kernel-metadata.json"),
    (r"404 Client Error", f"{{message}}; see whether kaggle.com/competitions/{COMPETITION} exists"),
    (
        r"403 Client Error|accept this competition's rules|Permission '\S+' was denied",
        f"{{message}}; accept the competition's rules at {RULES}",
    ),
    (r"5\d\d Server Error|429 Client Error", "{message}; Kaggle cannot answer now, try again later"),
    (r"", "{message}"),
)
# How requests and urllib3 name the cause of a failed connection.
CAUSE = re.compile(
    r"\w+ connect to proxy|Proxy Authentication Required|Tunnel connection failed: [\w ]+|Failed to resolve '[^']*'"
    r"|\[Errno -?\d+\] [\w ]*\w|timed out|Connection reset by peer|Remote end closed connection|CERTIFICATE_VERIFY_FAILED"
    r"|Response ended prematurely|IncompleteRead"
)


def owner() -> str:
    """Return the user name of the client's credentials; for a token, the client asks Kaggle."""
    printed = _ask("config", "view")
    name = re.search(r"^- username: (\S+)$", printed, re.MULTILINE)
    if not name or name[1] == "None":
        raise UserError(f"kaggle config view: {NO_CREDENTIALS}")
    return name[1]


def download_archive(folder: Path) -> Path:
    """Download the competition's archive into `folder`, resuming a partial download, and return its file.

    Raises:
        UserError: The client fails or leaves no archive.
    """
    printed = _ask("competitions", "download", "-c", COMPETITION, "-p", str(folder), shown=True)
    archive = folder / f"{COMPETITION}.zip"
    if not archive.is_file():
        raise _failure("competitions download", printed)
    return archive


def push(folder: Path) -> str:
    """Push the kernel in `folder`.

    Returns:
        The line in which the client confirms it, with the kernel's address.

    Raises:
        UserError: Kaggle refuses the kernel or one of its sources.
    """
    printed = _ask("kernels", "push", "-p", str(folder))
    # The client exits with status 0 on some errors, and if Kaggle leaves a source out.
    if "successfully pushed" not in printed:
        raise _failure("kernels push", printed)
    lines = printed.strip().splitlines()
    left_out = [name for line in lines if "not valid" in line for name in re.findall(r"'([^']+)'", line) or [line]]
    if left_out:
        reason = f"Kaggle left out {len(left_out):,} of the sources as not valid: {examples(left_out)}"
        advice = f"stop the session at {lines[-1].split()[-1]}, correct the sources and push again"
        raise UserError(f"kaggle kernels push: {reason}; {advice}", left_out)
    return lines[-1]


def status(kernel: str) -> str:
    """Return the status of `kernel` (owner/slug) as the client prints it."""
    return _ask("kernels", "status", kernel).strip()


def logs(kernel: str) -> str:
    """Return the log of the last session of `kernel` (owner/slug)."""
    return _ask("kernels", "logs", kernel)


def output(kernel: str, folder: Path) -> None:
    """Download the output of the last session of `kernel` (owner/slug) into `folder`."""
    _ask("kernels", "output", kernel, "-p", str(folder), "--file-pattern", r"^(runs|folds|submissions)/")
    if not (folder / "runs").is_dir():
        raise UserError(f"{kernel}: has saved no runs; read its log with `make kernel-logs`")


def submit_file(file: Path, message: str) -> None:
    """Submit `file` with `message` as its description.

    Raises:
        UserError: Kaggle does not accept it.
    """
    printed = _ask("competitions", "submit", "-q", "-f", str(file), "-m", message, COMPETITION)
    if "uccess" not in printed:
        raise _failure("competitions submit", printed)


def scores() -> pd.DataFrame:
    """Return the user's submissions.

    Returns:
        Columns description, publicScore and privateScore; scores are float64, NaN if unknown.
    """
    printed = _ask("competitions", "submissions", "-q", "--csv", "--page-size", "200", COMPETITION)
    columns = ["description", "publicScore", "privateScore"]
    start = printed.find("ref,fileName")
    if start < 0 and "No submissions found" not in printed:
        raise _failure("competitions submissions", printed)
    if start < 0:
        return pd.DataFrame(columns=columns)
    table = pd.read_csv(io.StringIO(printed[start:]), dtype=str, keep_default_na=False)[columns]
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in columns[1:]})


def _ask(*arguments: str, shown: bool = False) -> str:
    """Call the client.

    Args:
        *arguments: Its arguments.
        shown: Whether to repeat its progress bar on a terminal.

    Returns:
        Everything that it printed.

    Raises:
        UserError: It fails; the message has the reason.
        KeyboardInterrupt: It was interrupted, which it reports as success.
    """
    shown = shown and sys.stderr.isatty()
    command = [_client(), "--no-warn", *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as client:
        try:
            # Each state of the bar ends in a carriage return, which is read as the end of a line.
            for line in client.stdout or ():
                lines.append(line)
                if shown and "%|" in line:
                    print(f"\r{line.rstrip()}", end="", file=sys.stderr, flush=True)
        except BaseException:
            client.kill()
            raise
    if shown:
        print(file=sys.stderr)
    printed = "".join(lines)
    if printed.endswith("User cancelled operation\n"):
        raise KeyboardInterrupt
    if client.returncode:
        raise _failure(" ".join(arguments[:2]), printed)
    return printed


def _client() -> str:
    beside = Path(sys.executable).with_name("kaggle")
    found = str(beside) if beside.is_file() else shutil.which("kaggle")
    if not found:
        raise UserError("Kaggle's client is not installed; run pip install kaggle")
    return found


def _failure(action: str, printed: str) -> UserError:
    """Return the error for the failed call `action` of the client, from what it `printed`: one line with advice."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    message = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "it printed nothing")
    # Addresses of downloads are long and hold signatures; an error that the client does not handle begins with its class.
    message = re.sub(r"^\S+Error: (?=\d{3} )| for url: .*$", "", message)
    cause = ", ".join(dict.fromkeys(CAUSE.findall(printed))) or "it broke off"
    advice = next(advice for kind, advice in FAILURES if re.search(kind, f"{action}\n{printed}"))
    return UserError(f"kaggle {action}: {advice.format(message=message, cause=cause)}")
