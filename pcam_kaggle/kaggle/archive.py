"""The competition's archive: downloaded, verified and unpacked; an interrupted step resumes."""

import shutil
import zipfile
import zlib
from pathlib import Path

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import building, locked
from pcam_kaggle.core.logs import progress
from pcam_kaggle.core.paths import COMPETITION, Data
from pcam_kaggle.kaggle.client import Client

# Contents of the competition's archive.
PARTS = ("sample_submission.csv", "test", "train", "train_labels.csv")


def download(data: Data) -> bool:
    """Download, verify and unpack the competition into the folder of `data`; return False if it was complete already.

    An interrupted call is resumed: `.download` beside the folder has the partial download, then the archive, until all files
    are verified. Raises UserError if the archive is damaged (it is then deleted) or does not fit on the disk, or if the folder
    exists and is not empty.
    """
    waiting = data.root.with_name(".download")
    archive = waiting / f"{COMPETITION}.zip"
    is_new = not data.labels.is_file()
    if is_new:
        with locked(data.root), building(data.root, lambda _: False) as folder:
            if not archive.is_file():
                Client().download_archive(waiting / "partial").rename(archive)
            try:
                unpack(archive, folder)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
                archive.unlink()
                raise UserError(f"{archive}: damaged ({error}); it is deleted, and the next call downloads it again") from None
    shutil.rmtree(waiting, ignore_errors=True)
    return is_new


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
