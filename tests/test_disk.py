"""A full disk and Ctrl-C: a one-line message, no damaged file, and the same command resumes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY

from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import make_demo

SIZE = 60 * 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 60 MB, or skip where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can't be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def command(stage: str, data: Data, work: Path) -> list[str]:
    """Return the command line of a stage, of a model whose checkpoints take a megabyte and more."""
    fields = [part for field in (*TINY, "width=64", "max_width=128", "groups=none") for part in ("--set", field)]
    return [sys.executable, "-m", "pcam_kaggle", stage, "--data", str(data.root), "--work", str(work), *fields]


def run_stage(stage: str, data: Data, work: Path) -> tuple[int, list[str]]:
    """Return the exit status of a stage and the lines of its errors."""
    done = subprocess.run(command(stage, data, work), capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


def fill(disk: Path, left: int) -> Path:
    """Fill `disk` up to `left` free bytes with a file; return the file."""
    filler = disk / "filler"
    room = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - left)
    return filler


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_run_resumes(small_disk: Path, tmp_path: Path) -> None:
    data, work, alone = Data(tmp_path / "data"), small_disk / "work", tmp_path / "alone"
    make_demo(data)
    for stage, left in (("prepare", 2**20), ("folds", 0), ("train", 2**18), ("predict", 0), ("blend", 0), ("submission", 0)):
        # `train` has predicted, too.
        for record in work.rglob("predictions.json") if stage == "predict" else ():
            record.unlink()
        filler = fill(small_disk, left)
        kept = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
        status, lines = run_stage(stage, data, work)
        assert (stage, status, len(lines)) == (stage, 2, 1), lines
        assert "No space left" in lines[0] or "GB are free" in lines[0]
        assert str(small_disk) in lines[0]
        assert all(path.read_bytes() == content for path, content in kept.items())
        assert not list(small_disk.rglob("*.part"))
        filler.unlink()
        assert run_stage(stage, data, work) == (0, [])
    assert run_stage("pipeline", data, alone)[0] == 0
    target = Path("submissions") / "bottleneck.csv"
    assert (work / target).read_bytes() == (alone / target).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "stage", "started"),
    [
        ([], "prepare", lambda work: list(work.glob(".store.*/patches.npy")) or (work / "store").exists()),
        (["prepare", "folds"], "train", lambda work: (work / "runs/bottleneck/fold_0/log.csv").exists()),
    ],
)
def test_an_interrupt_is_one_line(before: list[str], stage: str, started: Callable[[Path], object], tmp_path: Path) -> None:
    data, work = Data(tmp_path / "data"), tmp_path / "work"
    make_demo(data)
    assert all(run_stage(name, data, work)[0] == 0 for name in before)
    # A shell starts its background jobs with SIGINT ignored, and their processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    arguments = [*command(stage, data, work), "--set", "epochs=1000"]
    # Like a terminal, which signals the whole process group.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        while not started(work):
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate()
    if process.returncode:
        assert process.returncode == 130
        assert errors == "stopped; the same command resumes\n"
    assert not list(work.glob(".store*.part"))
    again = [*command("pipeline", data, work), "--set", "epochs=1000", "--hours", "0.001"]
    assert subprocess.run(again, capture_output=True, check=False).returncode == 0
