"""Damaged input files: each must end in a one-line error, or in the result of the undamaged input.

`python -m benchmarks.fuzz [MUTATIONS]` damages one file at a time: inputs, and files that the pipeline reads again. The seed is
fixed, so that a number always means the same mutation.
"""

import contextlib
import csv
import io
import json
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.mutations import mutated
from pcam_kaggle.cli.main import main as run_command
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import PART
from pcam_kaggle.core.paths import Data, Workspace
from pcam_kaggle.kaggle.archive import unpack
from pcam_kaggle.runs.import_run import import_runs

MUTATIONS = 500
SEED = 0
SECONDS = 10
MAX_BYTES = 2 * 10**9
CONFIG = (
    *("width=4", "n_blocks=2", "side=32", "hidden=8", "batch_size=8", "epochs=2", "n_splits=2", "tta=1", "average_epochs=0.5"),
    "precision=fp32",
)
SUBMISSION = Path("work") / "submissions" / "bottleneck.csv"
Check = Callable[[Path, Path], bool]


@dataclass(frozen=True, slots=True)
class Target:
    """A file to mutate and how to check it.

    Attributes:
        file: Path in the folder; `0.tif` is the first patch.
        steps: Commands that read the file.
        is_correct: Whether the result is correct, given the folder and the undamaged one.
        removed: Files that are deleted first, so that `file` is needed.
    """

    file: str
    steps: tuple[str, ...]
    is_correct: Check
    removed: tuple[str, ...] = ()


def same_patches(now: Path, before: Path) -> bool:
    """Return whether the store has the same pixels."""
    keys = ("train_sha256", "test_sha256", "train", "test")
    made, was = (json.loads((folder / "work/store/manifest.json").read_text()) for folder in (now, before))
    return all(made[key] == was[key] for key in keys)


def same_submission(now: Path, before: Path) -> bool:
    """Return whether the submission is bit-identical."""
    return (now / SUBMISSION).read_bytes() == (before / SUBMISSION).read_bytes()


def same_labels(now: Path, _: Path) -> bool:
    """Return whether the folds have the ids and labels that another CSV reader finds in the table."""
    with (now / "data/train_labels.csv").open(encoding="utf-8-sig", newline="") as file:
        listed = {row["id"].strip(): float(row["label"]) for row in csv.DictReader(file)}
    folds = pd.read_csv(next((now / "work/folds").glob("*_2_42.csv")), dtype={"id": str})
    return listed == dict(zip(folds["id"], folds["label"].astype(float), strict=True))


def same_archive(now: Path, before: Path) -> bool:
    """Return whether all packed files were unpacked unchanged."""
    files = [path.relative_to(before / "data") for path in (before / "data").rglob("*") if path.is_file()]
    return all((now / "unpacked" / path).read_bytes() == (before / "data" / path).read_bytes() for path in files)


def no_parts(now: Path, _: Path) -> bool:
    """Return whether there are no partly written files."""
    return not list(now.rglob(f"*{PART}"))


RUN = "work/runs/bottleneck"
FINISHED = (f"{RUN}/fold_0/metrics.json", f"{RUN}/fold_0/predictions.json", f"{RUN}/metrics.json")
UNPREDICTED = (f"{RUN}/fold_0/predictions.json",)
TARGETS = (
    *(Target(f"data/{split}/0.tif", ("prepare",), same_patches) for split in ("train", "test")),
    *(Target(f"data/{name}.csv", ("prepare", "folds"), same_labels) for name in ("train_labels", "patch_id_wsi")),
    Target("data/sample_submission.csv", ("prepare",), no_parts),
    Target("data/dataset.json", ("prepare",), same_patches),
    *(Target(f"work/store/{name}", ("pipeline",), same_submission) for name in ("manifest.json", "index.csv")),
    *(Target(f"work/folds/slides_2_42.{kind}", ("pipeline",), same_submission) for kind in ("csv", "json")),
    *(Target(f"{RUN}/{name}", ("pipeline", "compare"), same_submission) for name in ("config.json", "environment.json")),
    *(Target(f"{RUN}/fold_0/{name}", ("pipeline",), same_submission) for name in ("oof.csv", "test.csv", "predictions.json")),
    *(Target(f"{RUN}/{name}", ("pipeline", "compare"), same_submission) for name in ("oof.csv", "test.csv", "metrics.json")),
    Target(f"{RUN}/metrics.json", ("submission",), same_submission),
    Target(f"{RUN}/fold_0/metrics.json", ("compare",), no_parts),
    Target(f"{RUN}/fold_0/log.csv", ("pipeline",), same_submission, FINISHED),
    Target(f"{RUN}/fold_0/last.pt", ("pipeline",), same_submission, FINISHED),
    Target(f"{RUN}/fold_0/best.pt", ("pipeline",), same_submission, UNPREDICTED),
    Target("work/submissions/bottleneck.json", ("pipeline", "kaggle ledger"), same_submission),
    Target("archive.zip", ("unpack",), same_archive),
    *(Target(f"download/runs/bottleneck/{name}", ("import",), no_parts) for name in ("config.json", "metrics.json", "oof.csv")),
    *(
        Target(f"download/runs/bottleneck/fold_0/{name}", ("import", "pipeline"), same_submission)
        for name in ("last.pt", "best.pt", "oof.csv", "log.csv", "predictions.json", "metrics.json")
    ),
)


def small_set(data: Data) -> None:
    """Write 24 train and 5 test patches, named by their SHA-1, their tables and a slide map."""
    rng = np.random.default_rng(SEED)
    for split, count in (("train", 24), ("test", 5)):
        data.patches(split).mkdir(parents=True)
        rows = []
        for number in range(count):
            patch = rng.integers(0, 200 + 50 * (number % 2), (96, 96, 3), dtype=np.uint8)
            name = sha1(patch.tobytes(), usedforsecurity=False).hexdigest()
            file = data.patches(split) / f"{name}.tif"
            if split == "train":
                Image.fromarray(patch).save(file)
            else:
                # Unlike the files of the competition, this one does not end in its pixels and must be decoded.
                cv2.imwrite(str(file), cv2.cvtColor(patch, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_TIFF_COMPRESSION, 1])
            rows.append((name, number % 2, f"slide_{number % 8}"))
        table = pd.DataFrame(rows, columns=["id", "label", "wsi"])
        table[["id", "label"]].to_csv(data.table(split), index=False)
        if split == "train":
            table[["id", "wsi"]].to_csv(data.root / "patch_id_wsi.csv", index=False)
    data.declaration.write_text('{"ids": "sha1"}\n')


def resolve(folder: Path, file: str) -> Path:
    """Return the path of a target's file."""
    path = folder / file
    return min(path.parent.glob("*.tif")) if path.name == "0.tif" else path


def run(step: str, folder: Path) -> int:
    """Run one step in `folder`; return its exit status."""
    if step in ("unpack", "import"):
        try:
            if step == "unpack":
                unpack(folder / "archive.zip", folder / "unpacked")
            else:
                shutil.rmtree(folder / RUN)
                import_runs(folder / "download", Workspace(folder / "work", folder / "work" / "store"))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    if step in ("compare", "kaggle ledger"):
        return run_command([*step.split(), "--work", str(folder / "work")])
    changes = [part for change in CONFIG for part in ("--set", change)]
    return run_command([step, "--data", str(folder / "data"), "--work", str(folder / "work"), *changes])


def _time_out(*_: Any) -> NoReturn:
    raise TimeoutError(f"more than {SECONDS} s")


def prepare(folder: Path) -> Path:
    """Fill `folder` with a small data set, a finished run, a copy of the run to import, and the data set as an archive."""
    data = Data(folder / "data")
    small_set(data)
    if run("pipeline", folder):
        raise RuntimeError("the undamaged run failed")
    for name in ("runs", "folds", "submissions"):
        shutil.copytree(folder / "work" / name, folder / "download" / name)
    with zipfile.ZipFile(folder / "archive.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(data.root.rglob("*")):
            file.write(path, str(path.relative_to(data.root)))
    return folder


def _most_resident() -> int:
    """Return the most bytes of memory that this process has held since its mark was reset."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


def attempt(folder: Path, before: Path, number: int) -> str:
    """Return the outcome of mutation `number`, tried in `folder` on a copy of `before`.

    Raises:
        RuntimeError: If it ends in a traceback, in more than one line or in a wrong result, takes more than 10 seconds, or more
            than 2 GB.
    """
    target = TARGETS[number % len(TARGETS)]
    now = Path(shutil.copytree(before, folder / f"{number}"))
    file = resolve(now, target.file)
    file.write_bytes(mutated(file, np.random.default_rng((SEED, number))))
    for name in target.removed:
        (now / name).unlink()
    errors, status = io.StringIO(), 0
    # Linux forgets the most memory that this process has ever held, for example in other tests.
    Path("/proc/self/clear_refs").write_text("5")
    resident = _most_resident()
    signal.signal(signal.SIGALRM, _time_out)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            for step in target.steps:
                status = status or run(step, now)
    except BaseException as error:
        raise RuntimeError(f"mutation {number}, {target.file}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith("  ")]
    failures = {
        "not a one-line error": status and (len(lines) != 1 or not lines[0].startswith("error: ")),
        f"status {status}": status not in (0, 2),
        "wrong result": not status and not target.is_correct(now, before),
        "partly written file": not no_parts(now, before),
        "too much memory": _most_resident() - resident > MAX_BYTES,
    }
    if any(failures.values()):
        listed = ", ".join(failure for failure, found in failures.items() if found)
        raise RuntimeError(f"mutation {number}, {target.file}: {listed}; {errors.getvalue()[:500]}")
    shutil.rmtree(now)
    return f"{number} {target.file}: {lines[0] if status else 'same result'}"


def fuzz(folder: Path, count: int) -> Iterator[str]:
    """Yield a line for each of `count` mutations, tried in `folder`.

    Raises:
        RuntimeError: If a mutation fails, as in `attempt`.
    """
    (folder / "before").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        before = prepare(folder / "before")
    for number in range(count):
        yield attempt(folder, before, number)


def main(count: int) -> None:
    """Print the outcome of each mutation."""
    with tempfile.TemporaryDirectory() as folder:
        for line in fuzz(Path(folder), count):
            print(line, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else MUTATIONS)
