"""Speed against the loop of PyTorch's tutorials and against the limit of the hardware; writes the tables of RESULTS.md.

`python -m benchmarks.bench [--quick] [SECTION …]`, with PCAM_DATA naming the competition's folder. Each section is one
question. Every implementation has one turn per round, in a new process, and ratios are taken within a round, because the
speed of a shared machine changes. `--quick` checks that the benchmark runs: one short round on the demo, nothing is written.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from benchmarks.results import RESULTS, comparison, markdown, provenance, replace_block, spread
from benchmarks.turns import Bench, Turn
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import read_json
from pcam_kaggle.core.paths import Data, find_data, find_workspace
from pcam_kaggle.core.process import ENVIRONMENT, MALLOC_OPTIONS
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.training.device import find_device, native_precision
from pcam_kaggle.training.threads import FIXED

NET = "bottleneck"
# Without it albumentations asks the network for its newest version during the measurement.
COMMON = {"NO_ALBUMENTATIONS_UPDATE": ENVIRONMENT["NO_ALBUMENTATIONS_UPDATE"]}
# The allocator settings of our command line, as environment variables: freed memory is reused, in huge pages.
TUNABLES = dict(zip(("trim_threshold", "top_pad", "mmap_max"), MALLOC_OPTIONS.values(), strict=True))
TUNED = ENVIRONMENT | {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}


def loops(bench: Bench, measure: str, peer: str = "loop", **arguments: Any) -> dict[str, Turn]:
    """Return the turns of `peer` with default settings, and fully tuned: in bf16 if the processor has instructions for it."""
    default = {"precision": "fp32", "channels_last": False, "environment": COMMON}
    tuned = {"precision": native_precision("cpu"), "channels_last": True, "environment": TUNED}
    return {
        peer: partial(bench.turn, measure, **arguments, **default),
        f"{peer}, fully tuned": partial(bench.turn, measure, **arguments, **tuned),
    }


def training(bench: Bench) -> str:
    """Training speed against the loop and against the limit, our own step on one batch in memory; on a GPU without the loop."""
    is_on_gpu, tables = find_device() == "cuda", []
    for net in (NET, "plain"):
        turns: dict[str, Turn] = {"ours": partial(bench.turn, "training", ENVIRONMENT, name=net)}
        values = bench.rounds(turns if is_on_gpu else turns | loops(bench, "loop_training", name=net))
        tables.append(f"`{net}`, ours on {values.pop('backend')[0]}:\n\n{comparison('images/s', values)}")
    return "\n\n".join(tables)


def contention(bench: Bench) -> str:
    """Training speed beside busy programs, with threads that follow the free cores, and with a thread per core."""

    def beside(niceness: list[int], threads: int | None) -> dict[str, Any]:
        line = [sys.executable, "-c", "while True: pass"]
        environment = ENVIRONMENT | ({FIXED: str(threads)} if threads else {})
        with ExitStack() as stack:
            for nice in niceness:
                program = stack.enter_context(subprocess.Popen(["nice", "-n", str(nice), *line]))
                stack.callback(program.kill)
            return {"rate": bench.turn("training", environment, name=NET)["rate"]}

    loads = {"nothing": [], "one program at nice 0": [0], "one at nice 5": [5], "two at nice 0": [0, 0]}
    kinds = {"threads follow": None, "a thread per core": joblib.cpu_count()}
    turns = {(load, kind): partial(beside, loads[load], kinds[kind]) for load in loads for kind in kinds}
    values = bench.rounds(turns)
    free = values["nothing", "threads follow"]
    lines = []
    for load in loads:
        each = [values[load, kind] for kind in kinds]
        lines.append((load, *(spread(rates, ",.0f") for rates in each), spread(list(np.divide(each[0], free)), ".2f")))
    return markdown(("beside", *(f"{kind}, images/s" for kind in kinds), "threads follow, of the free machine"), lines)


def pipeline(bench: Bench) -> str:
    """Seconds from TIFs to the OOF table and a submission: two folds, one epoch, one view."""
    aucs = {}

    def ours() -> dict[str, float]:
        changes = [part for change in ("epochs=1", "n_splits=2", "tta=1", "norm=train") for part in ("--set", change)]
        with tempfile.TemporaryDirectory() as folder:
            seconds = bench.command(Path(folder), "pipeline", "-e", NET, *changes)
            aucs["ours"] = read_json(Path(folder) / "runs" / NET / "metrics.json")["pooled"]["value"]
        return {"rate": seconds}

    def timed(name: str, turn: Turn) -> dict[str, float]:
        start = time.perf_counter()
        aucs[name] = turn()["auc"]
        return {"rate": time.perf_counter() - start}

    turns = loops(bench, "loop_pipeline", name=NET, epochs=1, n_splits=2)
    values = bench.rounds({"ours": ours, **{name: partial(timed, name, turn) for name, turn in turns.items()}})
    return f"{comparison('seconds', values)}\n\nOOF AUC: {', '.join(f'{name} {value:.4f}' for name, value in aucs.items())}."


def prediction(bench: Bench) -> str:
    """Prediction speed under eight views against ttach and against the limit, the model alone on one batch in memory."""
    ours = partial(bench.turn, "prediction", ENVIRONMENT, name=NET)
    return comparison("patches/s", bench.rounds({"ours": ours, **loops(bench, "ttach_prediction", "ttach", name=NET)}))


def preparation(bench: Bench) -> str:
    """Speed of `prepare` against cv2 in two processes, which decodes, writes and flushes the pixels, but verifies nothing."""
    kinds = {"ours": "ours", "`cv2.imread`, pixels written": "written", "`cv2.imread`, pixels written and flushed": "flushed"}
    turns: dict[str, Turn] = {name: partial(bench.turn, "preparation", COMMON, kind=kind) for name, kind in kinds.items()}
    return comparison("patches/s", bench.rounds(turns))


CPU_SECTIONS = (preparation, prediction, pipeline, training, contention)
SECTIONS: dict[str, Callable[[Bench], str]] = {**{section.__name__: section for section in CPU_SECTIONS}, "gpu": training}


def main() -> None:
    """Measure the sections that are named, or all of the CPU, and write their tables.

    Raises:
        UserError: There are no patches, or a section does not fit the device.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="one short round on the demo; writes nothing")
    given = parser.parse_args()
    chosen = given.sections or [section.__name__ for section in CPU_SECTIONS]
    if unknown := set(chosen) - SECTIONS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such section; choose from {', '.join(SECTIONS)}")
    if {name == "gpu" for name in chosen} != {find_device() == "cuda"}:
        raise UserError("gpu needs a GPU, and the other sections compute on the CPU: hide the GPU with CUDA_VISIBLE_DEVICES=")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = Data(work / "demo") if given.quick else find_data(os.environ.get("PCAM_DATA"), find_workspace(None).root)
        if data is None:
            raise UserError("the benchmark needs the competition's patches; set PCAM_DATA")
        if given.quick:
            make_demo(data)
        bench = Bench(data.root.resolve(), work, given.quick)
        bench.command(bench.work, "prepare")
        for name in chosen:
            text = f"{provenance()}\n\n{SECTIONS[name](bench)}"
            print(f"{name}: {text}\n", flush=True)
            if not given.quick:
                replace_block(RESULTS, name, text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
