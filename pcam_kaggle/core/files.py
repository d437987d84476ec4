"""Atomic writing of files and folders, and hashes that detect changed files."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd
from filelock import FileLock, Timeout

from pcam_kaggle.core.errors import UserError

PART = ".part"
AGAIN = "delete it and run the command again"
# Loader processes live up to five seconds longer than a killed parent, and before filelock 4 they inherit its lock.
LOCK_SECONDS = 10


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, a file beside it, and delete partial files of killed processes.

    Every process that writes into a run, a store, `folds/` or `submissions/` holds its lock; UserError after ten seconds,
    or on a file system without locks.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder.with_name(f".{folder.name}.lock")).acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise UserError(f"{folder}: another process is writing there; wait until it ends, or use another folder") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"{folder}: can't be locked ({error}); use another folder") from None
    with held:
        for partial in list(folder.rglob(f".*{PART}")):
            # A folder is left to `building`, which may need it.
            if not partial.is_dir():
                partial.unlink(missing_ok=True)
        yield


@contextmanager
def building(folder: Path, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder that replaces `folder` when the block ends without an error; the caller holds its lock.

    Raises:
        UserError: `folder` exists, is not empty, and `is_ours` does not recognise it as made by this program.
    """
    target = folder.resolve()
    temporary, old = (target.with_name(f".{target.name}{kind}{PART}") for kind in ("", ".old"))
    # A process was killed between the two renames below.
    if old.exists() and is_ours(old) and not target.exists():
        old.replace(target)
    is_replaceable = folder.is_dir() and (not any(folder.iterdir()) or is_ours(folder))
    if os.path.lexists(folder) and not is_replaceable:
        raise UserError(f"{folder}: exists and was not made by this program; move it away, or use another folder with --work")
    # Leftovers of a killed process.
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # Renamed first: a partly deleted folder would no longer be recognised as ours.
        if target.exists():
            target.replace(old)
        temporary.replace(target)
    finally:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Write `path` atomically: `save` fills a temporary file, which is flushed to the disk and renamed; or raise UserError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        try:
            with os.fdopen(handle, "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; fix that and run the same command again, which resumes") from None


def csv_bytes(table: pd.DataFrame) -> bytes:
    """Return `table` as UTF-8 CSV without its index, floats in the shortest form that reads back equal."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` atomically in the format of `csv_bytes`."""
    write(path, lambda file: file.write(csv_bytes(table)))


def write_json(path: Path, content: Any) -> None:
    """Write `content`, which must not hold NaN or infinity, atomically as indented UTF-8 JSON."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`; raises UserError if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {AGAIN}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; {AGAIN}")
    return content


@contextmanager
def reading(path: Path, advice: str = AGAIN) -> Iterator[None]:
    """Convert an error of the block, which parses the file at `path`, into a UserError with `advice`."""
    try:
        yield
    except (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not in the format of this version ({type(error).__name__}: {message}); {advice}") from None


def sha256(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file at `path` in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
