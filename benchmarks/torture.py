"""Runs killed at random moments: each must resume and be bit-identical to an uninterrupted run.

`python -m benchmarks.torture [KILLS]`, on 240 real patches if PCAM_DATA names the competition's folder, otherwise on the demo.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.core.files import write_csv
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.pipeline.stages import STAGES

KILLS = 30
TRAIN, TEST = 240, 60
# Takes seconds, and has every state that a checkpoint must restore: schedule, weight average, dropout, momentum of Muon.
CONFIG = (
    *("width=16", "max_width=32", "n_blocks=2", "side=32", "hidden=8", "batch_size=16", "epochs=4", "n_splits=3", "tta=4"),
    *("average_epochs=1", "optimizer=muon", "precision=fp32"),
)
RESULTS = (Path("submissions") / "bottleneck.csv", Path("runs") / "bottleneck" / "oof.csv")


def small_data(folder: Path) -> Data:
    """Return a small data set in `folder`: links to patches of PCAM_DATA, or the demo."""
    small = Data(folder)
    root = os.environ.get("PCAM_DATA")
    if not root:
        make_demo(small)
        return small
    source = Data(Path(root).resolve())
    for split, table, count in (("train", "labels", TRAIN), ("test", "sample", TEST)):
        rows = pd.read_csv(getattr(source, table), dtype={"id": str}).head(count)
        write_csv(getattr(small, table), rows)
        small.patches(split).mkdir()
        for name in rows["id"]:
            (small.patches(split) / f"{name}.tif").symlink_to(source.patches(split) / f"{name}.tif")
    return small


def command(stage: str, data: Data, work: Path) -> list[str]:
    """Return the command that runs `stage`."""
    changes = [part for change in CONFIG for part in ("--set", change)]
    return [sys.executable, "-m", "pcam_kaggle", stage, "--data", str(data.root), "--work", str(work), *changes]


def torture(folder: Path, kills: int, seed: int = 0) -> Iterator[str]:
    """Yield a line for each of `kills` runs in `folder`, killed at a random moment of one stage after the other.

    Raises:
        RuntimeError: If a run does not resume, or its results differ from those of the uninterrupted run.
    """
    data = small_data(folder / "data")
    rng = np.random.default_rng(seed)
    before, uninterrupted = {}, folder / "uninterrupted"
    uninterrupted.mkdir()
    seconds = {}
    for stage in STAGES:
        before[stage] = folder / f"before_{stage}"
        shutil.copytree(uninterrupted, before[stage])
        start = time.perf_counter()
        subprocess.run(command(stage, data, uninterrupted), check=True, capture_output=True)
        seconds[stage] = time.perf_counter() - start
    for number in range(kills):
        stage = list(STAGES)[number % len(STAGES)]
        work = folder / f"killed_{number}"
        shutil.copytree(before[stage], work)
        moment = rng.uniform(0.3, 1.0) * seconds[stage]
        with subprocess.Popen(command(stage, data, work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
        killed = process.returncode < 0
        resumed = subprocess.run(command("pipeline", data, work), check=False, capture_output=True, text=True)
        differing = [
            str(name)
            for name in RESULTS
            if resumed.returncode or (work / name).read_bytes() != (uninterrupted / name).read_bytes()
        ]
        if differing:
            raise RuntimeError(f"{stage}, killed after {moment:.2f} s: {', '.join(differing)} differ; {resumed.stderr}")
        yield f"{stage} {'killed' if killed else 'ended'} after {moment:.2f} s: identical results"
        shutil.rmtree(work)


def main(kills: int) -> None:
    """Print the outcome of each run."""
    with tempfile.TemporaryDirectory() as folder:
        for number, line in enumerate(torture(Path(folder), kills), 1):
            print(f"{number:>3} of {kills}: {line}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else KILLS)
