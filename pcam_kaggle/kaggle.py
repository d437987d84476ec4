"""The competition's data through Kaggle's own client."""

import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from pcam_kaggle.errors import UserError
from pcam_kaggle.paths import COMPETITION, Data

RULES = f"kaggle.com/competitions/{COMPETITION}/rules"
REQUIRED = ("train_labels.csv", "sample_submission.csv")


def download(data: Data) -> bool:
    """Download, verify and unpack the competition into the folder of `data`; return False where it stands already.

    Raises UserError where the client is missing or refused, or where the archive is damaged or holds a path that leads out of
    it; the folder appears whole or not at all.
    """
    if data.labels.is_file():
        return False
    client = _client()
    data.root.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=data.root.parent, prefix=f".{data.root.name}."))
    try:
        command = [client, "competitions", "download", "-c", COMPETITION, "-p", str(building)]
        # The client's progress bar goes to its standard error, which a terminal is there to show.
        errors = None if sys.stderr.isatty() else subprocess.STDOUT
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        archive = building / f"{COMPETITION}.zip"
        if done.returncode or not archive.is_file():
            raise UserError(f"kaggle competitions download: {_advice(done.stdout)}")
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

    Raises UserError on a damaged archive, on a member that would lie outside `target`, and where the competition's tables are
    missing.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            for name in names:
                path = PurePosixPath(name)
                if path.is_absolute() or ".." in path.parts or "\\" in name:
                    raise UserError(f"{archive.name}: member {name!r} leads out of the archive; nothing was unpacked")
            missing = [name for name in REQUIRED if name not in names]
            if missing:
                raise UserError(f"{archive.name}: holds no {' and no '.join(missing)}; is it this competition's?")
            for name in tqdm(names, "unpack", delay=2, disable=None):
                file.extract(name, target)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive.name}: damaged ({error}); download it again") from None


def _client() -> str:
    beside = Path(sys.executable).with_name("kaggle")
    found = str(beside) if beside.is_file() else shutil.which("kaggle")
    if not found:
        raise UserError("Kaggle's client is not installed; `make data` installs it, or pip install kaggle")
    return found


def _advice(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = next((line for line in lines if "rror" in line), lines[-1] if lines else "it said nothing")
    if "403" in output:
        return f"{said}; join the competition first: {RULES}"
    if "token" in output or "authenticate" in output:
        return f"{said}; set KAGGLE_USERNAME and KAGGLE_KEY to a token from kaggle.com/settings"
    return said
