"""The competition's archive: downloaded, verified and unpacked; each step resumes."""

import os
import shutil
import zipfile
import zlib
from pathlib import Path

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import building, locked
from pcam_kaggle.core.logs import progress
from pcam_kaggle.core.paths import COMPETITION, Data
from pcam_kaggle.kaggle.client import Client

# Contents of the competition's archive, in the order in which they are installed.
PARTS = ("sample_submission.csv", "test", "train", "train_labels.csv")


def download(data: Data) -> bool:
    """Download, verify and unpack the competition into the folder of `data`; return False if it was complete already.

    An interrupted call is resumed: the hidden folder `.download` has the partial download, then the archive, then the verified
    files. These are moved to their places with train_labels.csv last: its presence means that the data are complete.

    Raises UserError if the archive is damaged (it is then deleted) or does not fit on the disk, or if one of `PARTS` exists.
    """
    waiting = data.root / ".download"
    if data.labels.is_file():
        shutil.rmtree(waiting, ignore_errors=True)
        return False
    with locked(data.root):
        unpacked = waiting / "unpacked"
        new = [part for part in PARTS if not unpacked.is_dir() or (unpacked / part).exists()]
        existing = [str(data.root / part) for part in new if os.path.lexists(data.root / part)]
        if existing:
            raise UserError(f"{', '.join(existing)}: exists already and was not downloaded by this program; move it away")
        if not unpacked.is_dir():
            _fetch(waiting, unpacked)
        for part in new:
            (unpacked / part).rename(data.root / part)
        shutil.rmtree(waiting)
    return True


def _fetch(waiting: Path, unpacked: Path) -> None:
    """Download the archive if necessary, and unpack it; the folder `unpacked` exists once all files are verified."""
    archive = waiting / f"{COMPETITION}.zip"
    if not archive.is_file():
        Client().download_archive(waiting / "partial").rename(archive)
    try:
        with building(unpacked, lambda _: True) as unpacking:
            unpack(archive, unpacking)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        shutil.rmtree(waiting)
        raise UserError(f"{archive.name}: damaged ({error}); it is deleted, and the next call downloads it again") from None


def unpack(archive: Path, target: Path) -> None:
    """Unpack the ZIP `archive` into `target`, verifying checksums; raises what zipfile does, or ValueError, if damaged."""
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        if missing := sorted({*PARTS} - {name.partition("/")[0] for name in names}):
            raise ValueError(f"lacks {examples(missing)}, so it is not the competition's")
        size = sum(member.file_size for member in file.infolist())
        free = shutil.disk_usage(target.parent).free
        if size > free:
            needed = f"{archive.name} needs {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
            raise UserError(f"{target.parent}: {needed}; make room and run the command again, which resumes")
        for name in progress(names, "unpack"):
            file.extract(name, target)
