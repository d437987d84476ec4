"""How fast and how small, against what people use and against the limit: prints one table, writes RESULTS.md.

`python -m benchmarks.bench [SECTION …]`, with PCAM_DATA naming the competition's folder; sections are training, pipeline,
prediction and prepare, and where there is a GPU, gpu. Only ratios of one run mean anything: machines differ, and a shared one
differs from itself.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import keep, page
from pcam_kaggle.artifacts import read_json
from pcam_kaggle.device import find_device
from pcam_kaggle.errors import UserError
from pcam_kaggle.paths import find_data, find_workspace

HERE = Path(__file__).parent

NET = "bottleneck"
# By net. The shared machine is slower for a minute now and then: a net whose turns are shorter takes more of them.
ROUNDS = {NET: 5, "plain": 3}
PEERS = ("loop", "lightning", "fastai", "timm")
AS_USED = ("fp32", False)
SWITCHES = (("fp32", True), ("bf16", True))
STEPS = 12
# A turn of these takes seconds, and the shared machine differs from one to the next: the more turns, the steadier their median.
PREDICTION_ROUNDS, PREPARE_TURNS = 5, 20
PATCHES = 256
EPOCHS, SPLITS = 2, 2
# Read when torch is imported, as the command line does it.
OURS = {"THP_MEM_ALLOC_ENABLE": "1"}


@dataclass(frozen=True, slots=True)
class Bench:
    """The patches to measure on, and a folder with a store of them."""

    data: Path
    work: Path

    def measured(self, measure: str, /, environment: dict[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
        """Return what `measure` gives in a process of its own."""
        line = [sys.executable, "-m", "benchmarks.measures", measure, json.dumps({"data": str(self.data), **arguments})]
        done = subprocess.run(
            line, check=False, capture_output=True, text=True, cwd=HERE.parent, env={**os.environ, **(environment or {})}
        )
        if done.returncode:
            raise UserError(f"{measure} {arguments}: {done.stderr.strip().splitlines()[-1]}")
        return json.loads(done.stdout.splitlines()[-1])

    def command(self, work: Path, *options: str) -> tuple[float, float]:
        """Run our command line in the folder `work`; return its seconds, and the most bytes that one of its processes held.

        Pages of mapped files, the store's, are not counted: the system takes them back whenever it needs them.
        """
        line = [sys.executable, "-m", "pcam_kaggle", *options, "--work", str(work)]
        start, most = time.perf_counter(), 0
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, env={**os.environ, "PCAM_DATA": str(self.data)}) as process:
            while process.poll() is None:
                most = max(most, *map(held, family(process.pid)))
                time.sleep(0.02)
        if process.returncode:
            raise UserError(f"{' '.join(options)}: ended with status {process.returncode}")
        return time.perf_counter() - start, most


def family(pid: int) -> list[int]:
    """Return `pid` and the processes that it and its main thread's children have started."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return [pid]
    return [pid, *(other for child in children for other in family(int(child)))]


def held(pid: int) -> int:
    """Return the bytes of the process `pid` that are no file's, 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def training(bench: Bench) -> dict[str, Any]:
    """Measure the images/s of our training, of its limit and of every peer, in rounds."""
    seen: dict[str, Any] = {}
    for name, count in ROUNDS.items():
        rounds = []
        for number in range(count):
            turns = {"environment": OURS, "work": str(bench.work), "name": name, "steps": STEPS, "turns": 2}
            before = bench.measured("training", **turns)
            row: dict[str, Any] = {"limit": before["limit"]}
            for peer in PEERS:
                # The switches are tried once: which of them is best on this machine does not change from round to round.
                known = seen.setdefault(f"{name} {peer} switches", SWITCHES)
                speeds = {
                    way: bench.measured(
                        "peer_training", name=name, peer=peer, precision=way[0], channels_last=way[1], steps=STEPS
                    )["images_per_second"]
                    for way in (AS_USED, *known)
                }
                best = max((way for way in speeds if way != AS_USED), key=lambda way: speeds[way])
                seen[f"{name} {peer} switches"] = (best,)
                row |= {peer: speeds[AS_USED], f"{peer}, {best[0]}, channels_last": speeds[best]}
            after = bench.measured("training", **turns)
            # Before and after the peers, so that a machine that changes in between favours none.
            row |= {"limit": (before["limit"] + after["limit"]) / 2, "ours": (before["ours"] + after["ours"]) / 2}
            row["ratio"] = (before["ratio"] + after["ratio"]) / 2
            rounds.append(row)
            say(f"training {name}, round {number + 1}: {row}")
        seen[name] = {key: [row[key] for row in rounds] for key in rounds[0]}
        seen[f"{name} backend"] = before["backend"]
    return seen


def pipeline(bench: Bench) -> dict[str, Any]:
    """Measure the seconds from TIFs to OOF table and submission, with one view, on the same folds for as many epochs."""
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        options = [f"epochs={EPOCHS}", f"n_splits={SPLITS}", "tta=1"]
        changes = [part for option in options for part in ("--set", option)]
        seconds, _ = bench.command(Path(folder), "pipeline", "-e", NET, *changes)
        area = read_json(Path(folder) / "runs" / NET / "metrics.json")["pooled"]["value"]
        seen["ours"] = {"seconds": seconds, "auc": area}
    say(f"pipeline ours: {seen['ours']}")
    for peer in PEERS:
        start = time.perf_counter()
        way = {"peer": peer, "precision": AS_USED[0], "channels_last": AS_USED[1], "epochs": EPOCHS, "n_splits": SPLITS}
        made = bench.measured("peer_pipeline", name=NET, **way)
        seen[peer] = {"seconds": time.perf_counter() - start, "auc": made["auc"]}
        say(f"pipeline {peer}: {seen[peer]}")
    return seen


def prediction(bench: Bench) -> dict[str, Any]:
    """Measure the patches/s of prediction under eight views, of ttach's and of the limit, in rounds."""
    seen: dict[str, list[float]] = {}
    ours = {"environment": OURS, "work": str(bench.work), "count": 2 * PATCHES}
    for number in range(PREDICTION_ROUNDS):
        row = bench.measured("prediction", name=NET, views=8, **ours)
        for precision, last in (AS_USED, *SWITCHES):
            made = bench.measured("ttach_prediction", name=NET, precision=precision, channels_last=last, count=PATCHES)
            row[f"ttach, {precision}, channels_last" if last else "ttach"] = made["ttach"]
        row["bottleneck_d4, one view"] = bench.measured("prediction", name="bottleneck_d4", views=1, **ours)["ours"]
        seen = {key: seen.get(key, []) + rates for key, rates in row.items()}
        say(f"prediction, round {number + 1}: {row}")
    return seen


def prepare(bench: Bench) -> dict[str, Any]:
    """Measure `prepare` against reading and decoding alone, and the peak memory of every stage."""
    seen: dict[str, Any] = {"rates": bench.measured("preparation", turns=PREPARE_TURNS)}
    with tempfile.TemporaryDirectory() as folder:
        changes = [part for option in ("epochs=1", "n_splits=2", "tta=1", "batch_size=64") for part in ("--set", option)]
        for stage in ("prepare", "folds", "train", "predict", "blend", "submission"):
            seen[stage] = bench.command(Path(folder), stage, "-e", NET, *changes)[1]
        seen["compare"] = bench.command(Path(folder), "compare")[1]
        seen["store"] = (Path(folder) / "store" / "patches.npy").stat().st_size
    say(f"prepare: {seen}")
    return seen


def gpu(bench: Bench) -> dict[str, Any]:
    """Measure the images/s of our training on a GPU and of its limit, which keeps the GPU busy throughout."""
    if find_device() != "cuda":
        raise UserError("gpu: there is none here that torch can compute on")
    turns = {"environment": OURS, "work": str(bench.work), "steps": 16 * STEPS, "turns": 3}
    return {name: bench.measured("training", name=name, **turns) for name in (*ROUNDS, "best")}


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "training": training,
    "pipeline": pipeline,
    "prediction": prediction,
    "prepare": prepare,
    "gpu": gpu,
}
ON_CPU = ("training", "pipeline", "prediction", "prepare")


def say(text: str) -> None:
    """Print `text` at once."""
    print(text, flush=True)


def main(names: list[str]) -> None:
    """Measure the sections called `names`, or those that need no GPU; raises UserError on another name, and without data."""
    unknown = set(names) - set(SECTIONS)
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: no such section; choose of {', '.join(SECTIONS)}")
    data = find_data(os.environ.get("PCAM_DATA"), find_workspace(None).root)
    if data is None:
        raise UserError("the benchmarks need the competition's patches; set PCAM_DATA")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(data.root.resolve(), Path(folder))
        bench.command(bench.work, "prepare")
        for name in names or ON_CPU:
            keep(name, SECTIONS[name](bench))
    say(page())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
