"""Files that are written whole or not at all, and the hashes that tell whether they still belong together."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from pcam_kaggle.errors import UserError

PART = ".part"
AGAIN = "delete it and run the command again"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of `folder` for a while, by a lock beside it; what a killed one left half-written is deleted.

    The lock is the process's own: it ends with it, and workers that outlive it for seconds do not hold it. Raises UserError
    where another process works there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, who held it may have ended and deleted the file, and another taken a new one.
            taken = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, PermissionError, FileNotFoundError):
            taken = False
        if not taken:
            raise UserError(f"{folder}: another process works there; wait for it, or write elsewhere")
        try:
            for left in folder.rglob(f".*{PART}"):
                left.unlink()
            yield
        finally:
            path.unlink()


def write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Let `save` fill a temporary file beside `path`, flush it to the disk and rename it to `path`.

    Raises UserError where the disk does not take it; what stood at `path` still does.
    """
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
        raise UserError(f"{path}: {error.strerror or error}; mend that, and the same command goes on") from None


def csv_bytes(table: pd.DataFrame) -> bytes:
    """Return `table` as UTF-8 CSV without its index, floats in the shortest form that reads back equal."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write `table` as by `csv_bytes`, whole or not at all."""
    write(path, lambda file: file.write(csv_bytes(table)))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as indented UTF-8 JSON, whole or not at all; raises ValueError on NaN or infinity."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write(path, lambda file: file.write(text.encode()))


def read_json(path: Path, **kinds: type) -> dict[str, Any]:
    """Return the JSON object in `path`.

    Raises UserError where it is missing, is none, or lacks a key of `kinds` or has another type of value there.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); {AGAIN}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; {AGAIN}")
    missing = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}, or has something else there; {AGAIN}")
    return content


@contextmanager
def reading(path: Path, advice: str = AGAIN) -> Iterator[None]:
    """Raise UserError with `advice` where a reader that relies on the form of the file at `path` meets another one."""
    try:
        yield
    except (AttributeError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not what this version writes ({type(error).__name__}: {said}); {advice}") from None


def sha256(content: bytes) -> str:
    """Return the SHA-256 of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file at `path` in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
