"""DeLong's variance, interval and paired p beside R's pROC on the same 20 data sets, and their time at full size.

Needs R with pROC (Debian: r-cran-proc). Run: python -m benchmarks.delong
"""

import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd

from pcam_kaggle.scoring.metrics import auc_difference, auc_interval, delong

FULL_SIZE = 201_799
TOLERANCE = 1e-6


def data_set(seed: int) -> pd.DataFrame:
    """Return one data set: sizes of 30 to 3,000, every second one with scores rounded so that most are tied."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(30, 3000))
    label = (rng.random(n) < rng.uniform(0.2, 0.6)).astype(int)
    shared = rng.normal(size=n)
    scores = {name: label * rng.uniform(0.3, 2) + shared + rng.normal(size=n) for name in ("first", "second")}
    table = pd.DataFrame({"label": label, **scores})
    return table.round(0) if seed % 2 else table


def ours(table: pd.DataFrame) -> list[float]:
    """Return AUC, variance, interval, interval of the difference and p, in the order of delong.R."""
    label, first, second = (table[column].to_numpy() for column in ("label", "first", "second"))
    _, covariance = delong(label, first[None])
    area, difference = auc_interval(label, first), auc_difference(label, first, second)
    return [area.value, covariance[0, 0], area.low, area.high, difference.low, difference.high, difference.p]


def main() -> int:
    """Print the largest deviation of each number, and the time and memory at full size; return 1 above the tolerance."""
    tables = [data_set(seed) for seed in range(20)]
    with tempfile.TemporaryDirectory() as folder:
        for number, table in enumerate(tables):
            table.to_csv(Path(folder) / f"{number:02d}.csv", index=False, float_format="%.17g")
        command = ["Rscript", str(Path(__file__).with_name("delong.R")), folder]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    theirs = np.array([[float(number) for number in line.split()] for line in printed.splitlines()])
    deviation = np.abs(np.array([ours(table) for table in tables]) - theirs).max(axis=0)
    for name, value in zip(
        ("AUC", "variance", "low", "high", "difference low", "difference high", "p"), deviation, strict=True
    ):
        print(f"largest deviation from pROC over {len(tables)} data sets, {name}: {value:.1e}")

    rng = np.random.default_rng(0)
    label = (rng.random(FULL_SIZE) < 0.4).astype(int)
    scores = label + rng.normal(size=(2, FULL_SIZE))
    start = time.perf_counter()
    auc_difference(label, *scores)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    auc_difference(label, *scores)
    peak = tracemalloc.get_traced_memory()[1]
    print(f"paired difference of {FULL_SIZE:,} patches: {seconds:.2f} s, {peak / FULL_SIZE:.0f} bytes a patch at the most")
    return int(deviation.max() > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
