"""The competition's archive: downloaded, verified and unpacked; each step resumes."""

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.logs import progress
from pcam_kaggle.core.paths import COMPETITION, Data
from pcam_kaggle.kaggle.client import Client

# Contents of the competition's archive.
PARTS = ("test", "train", "sample_submission.csv", "train_labels.csv")


class ArchiveError(UserError):
    """The archive is damaged or not the competition's, and has to be downloaded again."""


def download(data: Data) -> bool:
    """Download, verify and unpack the competition into the folder of `data`; an interrupted call is resumed.

    Unfinished work is in its hidden folder `.download`, on the same file system: a partial download, which the client resumes,
    then the archive, then the verified files. These are moved to their places with train_labels.csv last: its presence means
    that the data are complete. Other files in the folder of `data` are not touched.

    Returns:
        False if the data were complete already.

    Raises:
        UserError: The client is missing or fails, the archive is damaged (it is then deleted) or does not fit on the disk, or
            a file or folder that the archive contains exists already, which is checked before the download.
    """
    waiting = data.root / ".download"
    if data.labels.is_file():
        shutil.rmtree(waiting, ignore_errors=True)
        return False
    if os.path.lexists(data.root) and not data.root.is_dir():
        raise UserError(f"{data.root}: is a file or a broken link; move it away")
    with locked(data.root):
        unpacked = waiting / "unpacked"
        # With what an earlier call has moved from there, it must be the complete competition.
        if not all((unpacked / part).exists() or (data.root / part).exists() for part in PARTS):
            shutil.rmtree(unpacked, ignore_errors=True)
        if not unpacked.is_dir():
            _refuse_existing(data.root / part for part in PARTS)
            _fetch(waiting, unpacked)
        parts = sorted(unpacked.iterdir(), key=lambda part: (part.name == data.labels.name, part.name))
        _refuse_existing(data.root / part.name for part in parts)
        for part in parts:
            part.rename(data.root / part.name)
        shutil.rmtree(waiting)
    return True


def _refuse_existing(paths: Iterable[Path]) -> None:
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        raise UserError(f"{examples(existing)}: exists already and was not downloaded by this program; move it away", existing)


def _fetch(waiting: Path, unpacked: Path) -> None:
    """Download the archive if necessary, and unpack it; the folder `unpacked` exists once all files are verified."""
    archive, unpacking = waiting / f"{COMPETITION}.zip", waiting / "unpacking"
    if not archive.is_file():
        Client().download_archive(waiting / "partial").rename(archive)
    shutil.rmtree(unpacking, ignore_errors=True)
    try:
        unpack(archive, unpacking)
        unpacking.rename(unpacked)
    except ArchiveError as error:
        shutil.rmtree(waiting)
        raise UserError(f"{error}; it is deleted, and the next call downloads it again") from None
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def unpack(archive: Path, target: Path) -> None:
    """Unpack the ZIP `archive` into the new folder `target`, whose parent exists, verifying checksums.

    Raises:
        ArchiveError: The archive is damaged, or lacks a part of the competition.
        UserError: The disk is full or fails.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            names = file.namelist()
            missing = [part for part in PARTS if part not in {name.partition("/")[0] for name in names}]
            if missing:
                raise ArchiveError(f"{archive.name}: lacks {examples(missing)}, so it is not the competition's")
            size = sum(member.file_size for member in file.infolist())
            free = shutil.disk_usage(target.parent).free
            if size > free:
                raise UserError(
                    f"{target.parent}: {archive.name} needs {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free; make room "
                    "and run the command again, which does not download it again"
                )
            for name in progress(names, "unpack"):
                file.extract(name, target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ArchiveError(f"{archive.name}: damaged ({error})") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{archive}: cannot be unpacked ({reason}); fix that or delete it, and run the command again") from None
