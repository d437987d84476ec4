"""Time and memory of comparing 20 runs of 201,799 patches on 200 slides. Run: python -m benchmarks.compare"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.data.atomic_io import file_sha256, write_csv, write_json
from pcam_kaggle.scoring.blend import score

PATCHES, SLIDES, RUNS, FOLDS = 201_799, 200, 20, 5


def write_runs(work: Path) -> None:
    """Write finished runs of simulated predictions, and the fold file that knows their slides."""
    rng = np.random.default_rng(0)
    label, fold = (rng.random(PATCHES) < 0.4).astype(int), np.arange(PATCHES) % FOLDS
    base = pd.DataFrame({"id": [f"{number:040x}" for number in range(PATCHES)], "label": label, "fold": fold})
    groups = [f"slide_{slide}" for slide in rng.integers(0, SLIDES, PATCHES)]
    write_csv(work / "folds" / "slides_5_42.csv", base.assign(group=groups))
    shared = rng.normal(size=PATCHES)
    for number in range(RUNS):
        run = work / "runs" / f"run_{number:02d}"
        logits = 2 * label + shared + 0.3 * rng.normal(size=PATCHES)
        oof = base.assign(probability=1 / (1 + np.exp(-logits)))
        write_csv(run / "oof.csv", oof)
        config = {"n_splits": FOLDS, "seed": number}
        write_json(run / "config.json", {"config": config, "folds": "slides_5_42", "folds_sha256": "same"})
        write_json(run / "metrics.json", {"folds_sha256": "same", "oof_sha256": file_sha256(run / "oof.csv"), **score(oof)})
        for k in range(FOLDS):
            write_json(run / f"fold_{k}" / "predictions.json", {})
            write_json(run / f"fold_{k}" / "metrics.json", {"seconds": 1.0, "parameters": 1, "images_per_second": 1.0})


def main() -> None:
    """Print the wall clock of the whole command and the most memory that it held."""
    with tempfile.TemporaryDirectory() as folder:
        write_runs(Path(folder))
        command = [sys.executable, "-m", "pcam_kaggle", "compare", "--work", folder, "--format", "csv"]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"compare, {RUNS} runs of {PATCHES:,} patches on {SLIDES} slides: {seconds:.1f} s, {peak:.2f} GB at the most")


if __name__ == "__main__":
    main()
