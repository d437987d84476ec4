"""Kaggle, through its own client: the competition's data, kernels, submissions and their scores."""

import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import pandas as pd
from tqdm import tqdm

from pcam_kaggle.errors import UserError
from pcam_kaggle.paths import COMPETITION, Data

RULES = f"kaggle.com/competitions/{COMPETITION}/rules"
NO_CREDENTIALS = "set KAGGLE_USERNAME and KAGGLE_KEY to a token from kaggle.com/settings"
REQUIRED = ("train_labels.csv", "sample_submission.csv")
# Twice what the competition's files take.
MOST_BYTES = 16 * 10**9


def download(data: Data) -> bool:
    """Download, verify and unpack the competition into the folder of `data`; return False where it stands already.

    Raises UserError where the client is missing or refused, or where the archive is damaged or holds a path that leads out of
    it; the folder appears whole or not at all.
    """
    if data.labels.is_file():
        return False
    data.root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=data.root.parent, prefix=f".{data.root.name}."))
    try:
        said = _ask("competitions", "download", "-c", COMPETITION, "-p", str(building), shown=True)
        archive = building / f"{COMPETITION}.zip"
        if not archive.is_file():
            raise UserError(f"kaggle competitions download: {_advice(said)}")
        unpacked = building / "unpacked"
        unpack(archive, unpacked)
        if data.root.exists():
            shutil.rmtree(data.root)
        unpacked.replace(data.root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return True


def unpack(archive: Path, target: Path) -> None:
    """Unpack the ZIP `archive` into the new folder `target`, each member against its checksum.

    Raises UserError on a damaged archive, on a member that would lie outside `target`, on one that holds far more than the
    competition does, and where its tables are missing.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            unpacked = sum(member.file_size for member in file.infolist())
            if unpacked > MOST_BYTES:
                raise UserError(f"{archive.name}: would unpack to {unpacked / 1e9:,.0f} GB; it is not this competition's")
            for name in names:
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or "\\" in name:
                    raise UserError(f"{archive.name}: member {name!r} leads out of the archive; nothing was unpacked")
            if len(set(names)) < len(names):
                raise UserError(f"{archive.name}: holds a member twice; download it again")
            missing = [name for name in REQUIRED if name not in names]
            if missing:
                raise UserError(f"{archive.name}: holds no {' and no '.join(missing)}; is it this competition's?")
            for name in tqdm(names, "unpack", delay=2, disable=None):
                file.extract(name, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UserError(f"{archive.name}: damaged ({error}); download it again") from None
    except OSError as error:
        # A full disk, or an offset that leads nowhere.
        raise UserError(f"{archive.name}: can't be unpacked ({error}); make room, or download it again") from None


def owner() -> str:
    """Return the name of the user that the client's credentials belong to."""
    said = _ask("config", "view")
    name = re.search(r"^- username: (\S+)$", said, re.MULTILINE)
    if not name or name[1] == "None":
        raise UserError(f"kaggle config view: {NO_CREDENTIALS}")
    return name[1]


def push(folder: Path) -> str:
    """Push the kernel in `folder` and return the line that says so; raises UserError where Kaggle refuses it or a source."""
    said = _ask("kernels", "push", "-p", str(folder))
    # An error can come with exit status 0, and so does a source that Kaggle leaves out.
    pushed = "successfully pushed" in said
    if not pushed or "not valid" in said:
        running = f"; it runs without: {said.strip().splitlines()[-1]}" if pushed else ""
        raise UserError(f"kaggle kernels push: {_advice(said)}{running}")
    return said.strip().splitlines()[-1]


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
    said = _ask("competitions", "submit", "-q", "-f", str(file), "-m", message, COMPETITION)
    if "uccess" not in said:
        raise UserError(f"kaggle competitions submit: {_advice(said)}")


def scores() -> pd.DataFrame:
    """Return the user's submissions: `description`, and `publicScore` and `privateScore` as numbers, NaN where unknown."""
    said = _ask("competitions", "submissions", "-q", "--csv", "--page-size", "200", COMPETITION)
    columns = ["description", "publicScore", "privateScore"]
    start = said.find("ref,fileName")
    if start < 0:
        return pd.DataFrame(columns=columns)
    table = pd.read_csv(io.StringIO(said[start:]), dtype=str, keep_default_na=False)[columns]
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
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = next((line for line in lines if "rror" in line or "not valid" in line), lines[-1] if lines else "it said nothing")
    if "403" in output:
        return f"{said}; join the competition first: {RULES}"
    if "token" in output or "authenticate" in output:
        return f"{said}; {NO_CREDENTIALS}"
    return said
