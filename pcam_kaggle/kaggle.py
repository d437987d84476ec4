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
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

import pandas as pd
from tqdm import tqdm

from pcam_kaggle.artifacts import locked, write_json
from pcam_kaggle.errors import UserError
from pcam_kaggle.paths import COMPETITION, Data

RULES = f"kaggle.com/competitions/{COMPETITION}/rules"
LOGIN = "set KAGGLE_API_TOKEN to a token from kaggle.com/settings/api, or save it as ~/.kaggle/access_token"
NO_NETWORK = re.compile(r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|NameResolutionError|ProtocolError")
# How the client prints a status that is an error.
STATUS = re.compile(r"\b([45]\d\d) (?:Client|Server) Error")
LABELS = "train_labels.csv"
REQUIRED = (LABELS, "sample_submission.csv")
# Twice what the competition's files take.
MOST_BYTES = 16 * 10**9
UNPACKED = "unpacked.json"


class BadArchive(UserError):
    """An archive that can't be this competition's, or is damaged: downloading it again may help."""


def download(data: Data) -> bool:
    """Download, verify and unpack the competition into the folder of `data`; return False if it is there already.

    All is prepared in a hidden folder beside it, where an interrupted download or unpacking resumes, and then moved; other
    files in the folder of `data`, a slide map for one, stay.

    Raises:
        UserError: the client is missing or refused, the archive is damaged or holds a path that leads out of it, or something
            of the same name as a part of it is there already.
    """
    if data.labels.is_file():
        return False
    waiting = data.root.with_name(f".{data.root.name}.download")
    unpacked, archive = waiting / "unpacked", waiting / f"{COMPETITION}.zip"
    with locked(waiting):
        try:
            if not (waiting / UNPACKED).is_file():
                _check_free(data.root, ["train", "test", *REQUIRED])
                shutil.rmtree(unpacked, ignore_errors=True)
                waiting.mkdir(exist_ok=True)
                # The client resumes from the bytes that are there, and skips an archive that is whole.
                message = _ask("competitions", "download", "-c", COMPETITION, "-p", str(waiting), shown=True)
                if not archive.is_file():
                    raise UserError(f"kaggle competitions download: {_advice(message)}")
                unpack(archive, unpacked)
                write_json(waiting / UNPACKED, {"archive": archive.name})
                archive.unlink()
            _move(unpacked, data.root)
            shutil.rmtree(waiting)
        except BadArchive:
            shutil.rmtree(waiting)
            raise
        finally:
            with suppress(OSError):
                waiting.rmdir()
    return True


def _check_free(folder: Path, names: Iterable[str]) -> None:
    """Raise UserError if `folder` is no folder, or holds one of `names`."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: exists and is not a folder; move it away")
    taken = next((folder / name for name in names if os.path.lexists(folder / name)), None)
    if taken:
        raise UserError(f"{taken}: exists and was not downloaded by this program; move it away")


def _move(source: Path, target: Path) -> None:
    """Move what is in `source` into `target`, the labels last, since they mark the rest as complete."""
    names = sorted((path.name for path in source.iterdir()), key=lambda name: (name == LABELS, name))
    _check_free(target, names)
    target.mkdir(exist_ok=True)
    for name in names:
        (source / name).replace(target / name)


def unpack(archive: Path, target: Path) -> None:
    """Unpack the ZIP `archive` into the new folder `target`, each member against its checksum.

    Raises:
        BadArchive: it is damaged, a member would lie outside `target`, it holds far more than the competition does, or its
            tables are missing.
        UserError: the disk has no room.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            unpacked = sum(member.file_size for member in file.infolist())
            if unpacked > MOST_BYTES:
                raise BadArchive(f"{archive.name}: would unpack to {unpacked / 1e9:,.0f} GB; it is not this competition's")
            for name in names:
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or "\\" in name:
                    raise BadArchive(f"{archive.name}: member {name!r} leads out of the archive; nothing was unpacked")
            if len(set(names)) < len(names):
                raise BadArchive(f"{archive.name}: holds a member twice; run the same command to download it again")
            missing = [name for name in REQUIRED if name not in names]
            if missing:
                raise BadArchive(f"{archive.name}: holds no {' and no '.join(missing)}; is it this competition's?")
            free = shutil.disk_usage(archive.parent).free
            if unpacked > free:
                raise UserError(f"{archive}: needs {unpacked / 1e9:.1f} GB to unpack, {free / 1e9:.1f} GB are free; make room")
            for name in tqdm(names, "unpack", delay=2, disable=None):
                file.extract(name, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise BadArchive(f"{archive.name}: damaged ({error}); run the same command to download it again") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"{archive}: the disk is full; make room and run the same command again") from None
        # Such as an offset in it that leads nowhere.
        raise BadArchive(f"{archive.name}: can't be unpacked ({error}); run the same command to download it again") from None


def owner() -> str:
    """Return the name of the user that the client's credentials belong to."""
    printed = _ask("config", "view")
    name = re.search(r"^- username: (\S+)$", printed, re.MULTILINE)
    if not name or name[1] == "None":
        raise UserError(f"kaggle config view: no user name; {LOGIN}")
    return name[1]


def push(folder: Path) -> str:
    """Push the kernel in `folder` and return the line that says so; raises UserError where Kaggle refuses it or a source."""
    printed = _ask("kernels", "push", "-p", str(folder))
    # An error can come with exit status 0, and so does a source that Kaggle leaves out.
    pushed = "successfully pushed" in printed
    if not pushed or "not valid" in printed:
        running = f"; it runs without: {printed.strip().splitlines()[-1]}" if pushed else ""
        raise UserError(f"kaggle kernels push: {_advice(printed)}{running}")
    return printed.strip().splitlines()[-1]


def status(kernel: str) -> str:
    """Return in words how `kernel`, owner/slug, stands."""
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
    """Submit `file` with `message` as its description; raises UserError where Kaggle does not take it."""
    printed = _ask("competitions", "submit", "-q", "-f", str(file), "-m", message, COMPETITION)
    if "uccess" not in printed:
        raise UserError(f"kaggle competitions submit: {_advice(printed)}")


def scores() -> pd.DataFrame:
    """Return the user's submissions: `description`, and `publicScore` and `privateScore` as numbers, NaN where unknown."""
    printed = _ask("competitions", "submissions", "-q", "--csv", "--page-size", "200", COMPETITION)
    columns = ["description", "publicScore", "privateScore"]
    start = printed.find("ref,fileName")
    if start < 0:
        return pd.DataFrame(columns=columns)
    table = pd.read_csv(io.StringIO(printed[start:]), dtype=str, keep_default_na=False)[columns]
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in columns[1:]})


def _ask(*arguments: str, shown: bool = False) -> str:
    """Call the client and return all that it printed, but for its progress bar where that is `shown` on a terminal.

    Raises UserError with its reason where it fails.
    """
    errors = None if shown and sys.stderr.isatty() else subprocess.STDOUT
    command = [_client(), "--no-warn", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
    if done.returncode:
        raise UserError(f"kaggle {' '.join(arguments[:2])}: {_advice(done.stdout)}")
    return done.stdout


def _client() -> str:
    beside = Path(sys.executable).with_name("kaggle")
    found = str(beside) if beside.is_file() else shutil.which("kaggle")
    if not found:
        raise UserError("Kaggle's client is not installed; `make data` installs it, or pip install kaggle")
    return found


def _advice(output: str) -> str:
    """Return in one line what went wrong and the one thing to do, from all that the client printed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    failure = next((line for line in reversed(lines) if NO_NETWORK.search(line)), None)
    if failure:
        return f"no connection to Kaggle ({failure[:160]}); check the network and run the same command again"
    status = STATUS.search(output)
    code = int(status[1]) if status else 0
    if code == 401 or "Authentication required" in output:
        return f"Kaggle does not accept the login, or there is none; {LOGIN}"
    if code == 403:
        return f"Kaggle refuses this (403); join the competition first: {RULES}"
    if code == 404:
        return "Kaggle knows no such competition or kernel (404); check its name"
    if code >= 500:
        return f"Kaggle has a problem ({code}); try again later"
    return next((line for line in lines if "rror" in line or "not valid" in line), lines[-1] if lines else "it printed nothing")
