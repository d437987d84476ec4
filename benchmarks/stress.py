"""Killed runs and damaged files.

`python -m benchmarks.stress kills [COUNT]` kills runs at random moments; each must resume and be bit-identical to an
uninterrupted run.

`python -m benchmarks.stress damages [COUNT]` damages one file at a time, inputs and files that the pipeline reads again; each
must end in a one-line error, or in the result of the undamaged file. A number always means the same damage.
"""

import argparse
import contextlib
import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np

from benchmarks.mutations import mutated
from benchmarks.synthetic import make
from pcam_kaggle.cli.main import main as run_command
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import PART
from pcam_kaggle.core.paths import Data, Workspace
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.data.tables import read_text
from pcam_kaggle.pipeline.stages import STAGES
from pcam_kaggle.runs.import_run import import_runs

# Takes seconds, and has every state that a checkpoint must restore: schedule, EMA, dropout, momentum of Muon.
KILLED = (
    *("width=16", "max_width=32", "n_blocks=2", "side=32", "hidden=8", "batch_size=16", "epochs=4", "n_splits=3", "tta=4"),
    *("average_epochs=1", "optimizer=muon", "precision=fp32"),
)
DAMAGED = (
    *("width=4", "n_blocks=2", "side=32", "hidden=8", "batch_size=8", "epochs=2", "n_splits=2", "tta=1", "average_epochs=0.5"),
    "precision=fp32",
)
SUBMISSION = "submissions/bottleneck.csv"
SECONDS = 10
# Of the full size: 24 train and 6 test patches.
SHARE = 9000


def options(stage: str, folder: Path, config: tuple[str, ...], work: str = "work") -> list[str]:
    changes = [part for change in config for part in ("--set", change)]
    # Results are bit-identical for a fixed number of threads.
    return [stage, "--data", str(folder / "data"), "--work", str(folder / work), "--threads", "1", *changes]


def kills(folder: Path, count: int, seed: int = 0) -> Iterator[str]:
    """Yield a line for each of `count` runs in `folder`, killed at a random moment of one stage after the other.

    Raises:
        RuntimeError: A run does not resume, or its results differ from those of the uninterrupted run.
    """
    make_demo(Data(folder / "data"))
    python = [sys.executable, "-m", "pcam_kaggle"]
    rng = np.random.default_rng(seed)
    uninterrupted = folder / "uninterrupted"
    uninterrupted.mkdir()
    seconds = {}
    for stage in STAGES:
        shutil.copytree(uninterrupted, folder / f"before_{stage}")
        start = time.perf_counter()
        subprocess.run([*python, *options(stage, folder, KILLED, "uninterrupted")], check=True, capture_output=True)
        seconds[stage] = time.perf_counter() - start
    for number in range(count):
        stage = list(STAGES)[number % len(STAGES)]
        work = Path(shutil.copytree(folder / f"before_{stage}", folder / f"killed_{number}"))
        moment = rng.uniform(0.3, 1.0) * seconds[stage]
        line = [*python, *options(stage, folder, KILLED, work.name)]
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
        killed = process.returncode < 0
        line = [*python, *options("pipeline", folder, KILLED, work.name)]
        resumed = subprocess.run(line, check=False, capture_output=True, text=True)
        for name in (SUBMISSION, "runs/bottleneck/oof.csv"):
            if resumed.returncode or (work / name).read_bytes() != (uninterrupted / name).read_bytes():
                raise RuntimeError(f"{stage}, killed after {moment:.2f} s: {name} differs; {resumed.stderr}")
        yield f"{stage} {'killed' if killed else 'ended'} after {moment:.2f} s: identical results"
        shutil.rmtree(work)


@dataclass(frozen=True, slots=True)
class Target:
    """A file to damage (`0.tif` is the first patch), and the commands that read it.

    `is_correct` checks their result, given the folder and the undamaged one; `removed` files are deleted before.
    """

    file: str
    steps: tuple[str, ...]
    is_correct: Callable[[Path, Path], bool]
    removed: tuple[str, ...] = ()


def same_patches(now: Path, before: Path) -> bool:
    keys = ("train_sha256", "test_sha256", "train", "test")
    made, was = (json.loads((folder / "work/store/manifest.json").read_text()) for folder in (now, before))
    return all(made[key] == was[key] for key in keys)


def same_submission(now: Path, before: Path) -> bool:
    return (now / "work" / SUBMISSION).read_bytes() == (before / "work" / SUBMISSION).read_bytes()


def same_labels(now: Path, _: Path) -> bool:
    """Return whether the folds have the ids and labels that another CSV reader finds in the table."""
    with (now / "data/train_labels.csv").open(encoding="utf-8-sig", newline="") as file:
        listed = {row["id"].strip(): float(row["label"]) for row in csv.DictReader(file)}
    folds = read_text(next((now / "work/folds").glob("*_2_42.csv")))
    return listed == dict(zip(folds["id"], folds["label"].astype(float), strict=True))


def no_parts(now: Path, _: Path) -> bool:
    return not list(now.rglob(f"*{PART}"))


SCORES = "kaggle scores bottleneck --public 0.9"
RUN, IMPORTED = "work/runs/bottleneck", "download/runs/bottleneck"
PREDICTED = f"{RUN}/fold_0/predictions.json"
FINISHED = (f"{RUN}/fold_0/metrics.json", PREDICTED, f"{RUN}/metrics.json")
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
    *(Target(f"{RUN}/fold_0/{name}", ("pipeline",), same_submission, FINISHED) for name in ("log.csv", "last.pt")),
    Target(f"{RUN}/fold_0/best.pt", ("pipeline",), same_submission, (PREDICTED,)),
    Target("work/submissions/bottleneck.json", ("pipeline", SCORES), same_submission),
    *(Target(f"{IMPORTED}/{name}", ("import",), no_parts) for name in ("config.json", "metrics.json", "oof.csv")),
    *(
        Target(f"{IMPORTED}/fold_0/{name}", ("import", "pipeline"), same_submission)
        for name in ("last.pt", "best.pt", "oof.csv", "log.csv", "predictions.json", "metrics.json")
    ),
)


def run(step: str, folder: Path) -> int:
    if step in ("compare", SCORES):
        return run_command([*step.split(), "--work", str(folder / "work")])
    if step != "import":
        return run_command(options(step, folder, DAMAGED))
    shutil.rmtree(folder / RUN)
    import_runs(folder / "download", Workspace(folder / "work", folder / "work" / "store"))
    return 0


def _time_out(*_: Any) -> NoReturn:
    raise TimeoutError(f"more than {SECONDS} s")


def attempt(folder: Path, before: Path, number: int) -> str:
    """Return the outcome of damage `number`, tried in `folder` on a copy of `before`.

    Raises:
        RuntimeError: It ends in a traceback, in more than one line or in a wrong result, or takes more than 10 seconds.
    """
    target = TARGETS[number % len(TARGETS)]
    now = Path(shutil.copytree(before, folder / f"{number}"))
    file = now / target.file
    if file.name == "0.tif":
        file = min(file.parent.iterdir())
    file.write_bytes(mutated(file, np.random.default_rng((0, number))))
    for name in target.removed:
        (now / name).unlink()
    errors, status = io.StringIO(), 0
    signal.signal(signal.SIGALRM, _time_out)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            for step in target.steps:
                status = status or run(step, now)
    except UserError as error:
        status = 2
        errors.write(f"error: {error}")
    except BaseException as error:
        raise RuntimeError(f"damage {number}, {target.file}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    # A damaged submission is also left out of the ledger, with a warning.
    lines = [line for line in errors.getvalue().splitlines() if not line.startswith(("  ", "warning: left out: "))]
    is_one_line = len(lines) == 1 and lines[0].startswith("error: ")
    is_expected = is_one_line if status == 2 else status == 0 and target.is_correct(now, before)
    if not (is_expected and no_parts(now, before)):
        raise RuntimeError(
            f"damage {number}, {target.file}: status {status} with {errors.getvalue()[:500] or 'a wrong result'}"
        )
    shutil.rmtree(now)
    return f"{target.file}: {lines[0] if status else 'same result'}"


def damages(folder: Path, count: int) -> Iterator[str]:
    """Yield a line for each of `count` damages, tried in `folder`; raises RuntimeError as `attempt` does."""
    before = folder / "before"
    data = Data(before / "data")
    make(data, SHARE)
    data.declaration.write_text('{"ids": "sha1"}\n')
    for file in data.patches("test").iterdir():
        # Unlike the files of the competition, these do not end in their pixels and must be decoded.
        cv2.imwrite(str(file), cv2.imread(str(file)), [cv2.IMWRITE_TIFF_COMPRESSION, 1])
    with contextlib.redirect_stdout(io.StringIO()):
        if run("pipeline", before):
            raise RuntimeError("the undamaged run failed")
    for name in ("runs", "folds", "submissions"):
        shutil.copytree(before / "work" / name, before / "download" / name)
    for number in range(count):
        yield attempt(folder, before, number)


CHECKS = {"kills": (kills, 30), "damages": (damages, 500)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("count", nargs="?", type=int, help="how many (kills: 30, damages: 500)")
    given = parser.parse_args()
    check, default = CHECKS[given.check]
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(check(Path(folder), given.count or default)):
            print(f"{number:>3} {line}", flush=True)
