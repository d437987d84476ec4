"""Kaggle, through its own client: the competition's data, kernels, submissions and their scores."""

import errno
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pandas as pd
from tqdm import tqdm

from pcam_kaggle import UserError, examples
from pcam_kaggle.data.atomic_io import locked
from pcam_kaggle.data.layout import COMPETITION, Data

RULES = f"kaggle.com/competitions/{COMPETITION}/rules"
NO_CREDENTIALS = (
    "no valid credentials; put a token from kaggle.com/settings/api into KAGGLE_API_TOKEN or ~/.kaggle/access_token"
)
# What the competition's archive holds.
PARTS = ("test/", "train/", "sample_submission.csv", "train_labels.csv")
# Twice what the competition's files take.
MOST_BYTES = 16 * 10**9
# What the operating system says of impossible offsets and names, which only a damaged archive holds.
DAMAGE = (errno.EINVAL, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
# Kinds of failure by what the client prints, the first that is found, and what to tell the user. The client has one text for
# a kernel that does not exist and for one that the account may not see.
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


class ArchiveError(UserError):
    """The archive is damaged or is not the competition's: it has to be downloaded again."""


def download(data: Data) -> bool:
    """Download, verify and unpack the competition into the folder of `data`; return False if it is there already.

    Unfinished work is in the hidden folder `.download` within it, and so on the same file system: a partial download, which the
    client resumes, then the archive, then the verified files. These are moved to their places with train_labels.csv last: its
    presence means that the data are complete. The next call continues an interrupted one; success deletes the hidden folder.
    Other files in the folder of `data` are left alone.

    Raises UserError if the client is missing or fails, if the archive is damaged, which deletes it, or does not fit on the
    disk, and, before anything is downloaded, if a file or folder that the archive brings exists already.
    """
    waiting = data.root / ".download"
    if data.labels.is_file():
        shutil.rmtree(waiting, ignore_errors=True)
        return False
    if os.path.lexists(data.root) and not data.root.is_dir():
        raise UserError(f"{data.root}: is a file or a broken link; move it away")
    with locked(data.root):
        unpacked = waiting / "unpacked"
        if not _installable(unpacked, data):
            shutil.rmtree(unpacked, ignore_errors=True)
            _refuse_existing(data.root / part for part in PARTS)
            _fetch(waiting, unpacked)
        parts = sorted(unpacked.iterdir(), key=lambda part: (part.name == data.labels.name, part.name))
        _refuse_existing(data.root / part.name for part in parts)
        for part in parts:
            part.rename(data.root / part.name)
        shutil.rmtree(waiting)
    return True


def _installable(unpacked: Path, data: Data) -> bool:
    """Return whether `unpacked` and what an earlier call has moved from there make up the competition's files."""
    return (unpacked / data.labels.name).is_file() and all(
        (unpacked / part).exists() or (data.root / part).exists() for part in PARTS
    )


def _refuse_existing(paths: Iterable[Path]) -> None:
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        raise UserError(f"{examples(existing)}: exists already and was not downloaded by this program; move it away", existing)


def _fetch(waiting: Path, unpacked: Path) -> None:
    """Download the archive, unless an earlier call has, and unpack it; the folder `unpacked` appears when it is verified."""
    archive, partial, unpacking = waiting / f"{COMPETITION}.zip", waiting / "partial", waiting / "unpacking"
    if not archive.is_file():
        printed = _ask("competitions", "download", "-c", COMPETITION, "-p", str(partial), shown=True)
        if not (partial / archive.name).is_file():
            raise _failure("competitions download", printed)
        (partial / archive.name).rename(archive)
    shutil.rmtree(unpacking, ignore_errors=True)
    try:
        unpack(archive, unpacking)
        unpacking.rename(unpacked)
    except ArchiveError as error:
        shutil.rmtree(waiting)
        raise UserError(f"{error}; it is deleted, and the next call downloads it again", error.details) from None
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def unpack(archive: Path, target: Path) -> None:
    """Unpack the ZIP `archive` into the new folder `target`, whose parent exists, each member verified by its checksum.

    Raises ArchiveError if the archive is damaged, has a member that would be outside `target` or a member twice, is far larger
    than the competition, or lacks one of its parts; UserError if the disk is full or fails.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            size = sum(member.file_size for member in file.infolist())
            _verify(archive.name, names, size)
            free = shutil.disk_usage(target.parent).free
            if size > free:
                raise UserError(
                    f"{target.parent}: {archive.name} needs {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; make room "
                    "and run the command again, which does not download it again"
                )
            for name in tqdm(names, "unpack", delay=2, disable=None):
                file.extract(name, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ArchiveError(f"{archive.name}: damaged ({error})") from None
    except OSError as error:
        if error.errno in DAMAGE:
            raise ArchiveError(f"{archive.name}: damaged ({error.strerror})") from None
        raise UserError(
            f"{archive}: cannot be unpacked ({error.strerror or error}); fix that and run the command again"
        ) from None


def _verify(archive: str, names: list[str], size: int) -> None:
    """Raise ArchiveError unless the members `names`, `size` bytes in all, can be the competition's."""
    if size > MOST_BYTES:
        raise ArchiveError(f"{archive}: would unpack to {size / 1e9:,.0f} GB, so it is not the competition's")
    paths = {name: PurePosixPath(name) for name in names}
    outside = [repr(name) for name, path in paths.items() if path.is_absolute() or ".." in path.parts or "\\" in name]
    if outside:
        raise ArchiveError(f"{archive}: members that lead out of it: {len(outside):,} ({examples(outside)})", outside)
    repeated = [repr(name) for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ArchiveError(f"{archive}: members that it holds twice: {len(repeated):,} ({examples(repeated)})", repeated)
    held = {*names, *(f"{path.parts[0]}/" for path in paths.values() if len(path.parts) > 1)}
    missing = [part for part in PARTS if part not in held]
    if missing:
        raise ArchiveError(f"{archive}: lacks {examples(missing)}, so it is not the competition's")


def owner() -> str:
    """Return the name of the user that the client's credentials belong to; for a token, the client asks Kaggle."""
    printed = _ask("config", "view")
    name = re.search(r"^- username: (\S+)$", printed, re.MULTILINE)
    if not name or name[1] == "None":
        raise UserError(f"kaggle config view: {NO_CREDENTIALS}")
    return name[1]


def push(folder: Path) -> str:
    """Push the kernel in `folder` and return the line that says so; raises UserError if Kaggle refuses it or a source."""
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
    """Return in words the status of `kernel`, owner/slug."""
    return _ask("kernels", "status", kernel).strip()


def logs(kernel: str) -> str:
    """Return the log of the last session of `kernel`, owner/slug."""
    return _ask("kernels", "logs", kernel)


def output(kernel: str, folder: Path) -> None:
    """Download into `folder` what the last session of `kernel`, owner/slug, has saved."""
    _ask("kernels", "output", kernel, "-p", str(folder), "--file-pattern", r"^(runs|folds|submissions)/")
    if not (folder / "runs").is_dir():
        raise UserError(f"{kernel}: has saved no runs; look at its log with `make kernel-logs`")


def send(file: Path, message: str) -> None:
    """Submit `file` with `message` as its description; raises UserError if Kaggle does not accept it."""
    printed = _ask("competitions", "submit", "-q", "-f", str(file), "-m", message, COMPETITION)
    if "uccess" not in printed:
        raise _failure("competitions submit", printed)


def scores() -> pd.DataFrame:
    """Return the user's submissions: `description`, and `publicScore` and `privateScore` as numbers, NaN where unknown."""
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
    """Call the client and return all that it printed; on a terminal, `shown` repeats its progress bar meanwhile.

    Raises UserError with the reason if it fails, and KeyboardInterrupt if it was stopped, which it reports as success.
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
    """Return the error for a call `action` of the client that failed and `printed` something: one line and what to do."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    message = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "it printed nothing")
    # Addresses of downloads are long and hold signatures; an error that the client does not handle begins with its class.
    message = re.sub(r"^\S+Error: (?=\d{3} )| for url: .*$", "", message)
    cause = ", ".join(dict.fromkeys(CAUSE.findall(printed))) or "it broke off"
    advice = next(advice for kind, advice in FAILURES if re.search(kind, f"{action}\n{printed}"))
    return UserError(f"kaggle {action}: {advice.format(message=message, cause=cause)}")
