"""Speed against common implementations and against the limit of the hardware; writes the tables of RESULTS.md.

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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results import RESULTS, comparison, markdown, provenance, replace_block, spread
from benchmarks.turns import Bench, Turn
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import read_json
from pcam_kaggle.core.paths import Data, find_data, find_workspace
from pcam_kaggle.core.process import ENVIRONMENT, MALLOC_OPTIONS
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.training.device import find_device, precisions

NET = "bottleneck"
# Which peers train which net.
TRAINED = {NET: ("loop", "lightning"), "plain": ("loop",)}
GPU_NETS = (*TRAINED, "best")
GPU_ROUNDS = 5
# Competing programs of one thread each: their number and priority.
LOADS = {"nothing": (0, 0), **{f"{count} at nice {nice}": (count, nice) for nice in (0, 5, 19) for count in (1, 2)}}
# Without it albumentations asks the network for its newest version during the measurement.
COMMON = {"NO_ALBUMENTATIONS_UPDATE": ENVIRONMENT["NO_ALBUMENTATIONS_UPDATE"]}
# The allocator settings of our command line, as environment variables: freed memory is reused, in huge pages.
TUNABLES = dict(zip(("trim_threshold", "top_pad", "mmap_max"), MALLOC_OPTIONS.values(), strict=True))
TUNED = ENVIRONMENT | {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}


def settings() -> dict[str, dict[str, Any]]:
    """Return how peers compute, by the suffix of their names: with default settings, and fully tuned.

    bf16 is chosen where the processor has instructions for it; elsewhere it is slower.
    """
    tuned = {"precision": precisions("cpu")[0], "channels_last": True, "environment": TUNED}
    return {"": {"precision": "fp32", "channels_last": False, "environment": COMMON}, ", fully tuned": tuned}


def peer_turns(bench: Bench, measure: str, shown: str, **arguments: Any) -> dict[str, Turn]:
    """Return the turns of a peer that the table calls `shown`, by that name with each suffix of `settings`."""
    return {shown + suffix: partial(bench.turn, measure, **arguments, **given) for suffix, given in settings().items()}


def training(bench: Bench) -> str:
    """Training speed against peers and against the limit, our own step on one batch in memory."""
    tables = []
    for net, peers in TRAINED.items():
        turns: dict[str, Turn] = {"ours": partial(bench.turn, "training", ENVIRONMENT, name=net)}
        for peer in peers:
            turns |= peer_turns(bench, "peer_training", peer, name=net, peer=peer)
        values = bench.rounds(turns)
        tables.append(f"`{net}`, ours on {values.pop('backend')[0]}:\n\n{comparison('images/s', values)}")
    return "\n\n".join(tables)


def pipeline(bench: Bench) -> str:
    """Seconds from TIFs to the OOF table and a submission: two folds, one epoch, one view."""
    aucs, memory = {}, []

    def ours() -> dict[str, float]:
        changes = [part for change in ("epochs=1", "n_splits=2", "tta=1", "norm=train") for part in ("--set", change)]
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak = bench.command(Path(folder), "pipeline", "-e", NET, *changes)
            aucs["ours"] = read_json(Path(folder) / "runs" / NET / "metrics.json")["pooled"]["value"]
        memory.append(peak / 1e9)
        return {"rate": seconds}

    def timed(name: str, turn: Turn) -> dict[str, float]:
        start = time.perf_counter()
        aucs[name] = turn()["auc"]
        return {"rate": time.perf_counter() - start}

    loops = peer_turns(bench, "loop_pipeline", "loop", name=NET, epochs=1, n_splits=2)
    values = bench.rounds({"ours": ours, **{name: partial(timed, name, turn) for name, turn in loops.items()}})
    reached = ", ".join(f"{name} {value:.4f}" for name, value in aucs.items())
    return f"{comparison('seconds', values)}\n\nOOF AUC: {reached}. Our largest process: {spread(memory, '.2f')} GB."


def prediction(bench: Bench) -> str:
    """Prediction speed under eight views against ttach and against the limit, the net alone on one batch in memory."""
    ours = partial(bench.turn, "prediction", ENVIRONMENT, name=NET)
    return comparison("patches/s", bench.rounds({"ours": ours, **peer_turns(bench, "ttach_prediction", "ttach", name=NET)}))


def prepare(bench: Bench) -> str:
    """Speed of `prepare` against reading every byte and against decoding by cv2, which checks nothing."""
    kinds = {"ours": "ours", "read bytes": "bytes", "`cv2.imread`": "cv2"}
    kinds |= {"`cv2.imread`, pixels written": "written", "`cv2.imread`, pixels written and flushed": "flushed"}
    turns = {name: partial(bench.turn, "preparation", COMMON, kind=kind) for name, kind in kinds.items()}
    return comparison("patches/s", bench.rounds(turns))


def contention(bench: Bench) -> str:
    """Training speed beside other programs that compute, against the fully tuned loop."""
    loop = peer_turns(bench, "peer_training", "loop", name=NET, peer="loop")["loop, fully tuned"]
    turns: dict[str, Turn] = {"ours": partial(bench.turn, "training", ENVIRONMENT, name=NET), "loop": loop}
    lines = []
    for load, (programs, nice) in LOADS.items():
        with competing(programs, nice):
            values = bench.rounds(turns)
        ratios = list(np.divide(values["ours"], values["loop"]))
        lines.append((load, spread(values["ours"], ".0f"), spread(values["loop"], ".0f"), spread(ratios, ".2f")))
    return markdown(("competing programs", "ours, images/s", "loop, fully tuned, images/s", "ratio"), lines)


@contextmanager
def competing(programs: int, nice: int) -> Iterator[None]:
    """Run as many `programs` at priority `nice` that each keep one thread busy."""
    line = [sys.executable, "-c", f"import os\nos.nice({nice})\nwhile True: pass"]
    with ExitStack() as stack:
        for _ in range(programs):
            stack.callback(stack.enter_context(subprocess.Popen(line)).kill)
        yield


def gpu(bench: Bench) -> str:
    """Training speed on a GPU against the limit, the replayed step on one batch in its memory, and how busy it is."""
    if find_device() != "cuda":
        raise UserError("gpu: torch finds no GPU; run this section on a machine with one")
    lines = []
    for name in GPU_NETS:
        values = bench.rounds({"ours": partial(bench.turn, "training", ENVIRONMENT, name=name)}, GPU_ROUNDS)
        rates = (spread(values[kind], ",.0f") for kind in ("limit", "ours"))
        ratio = spread(list(np.divide(values["ours"], values["limit"])), ".2f")
        lines.append((f"`{name}`", values["backend"][0], *rates, ratio, spread(values["gpu_busy"], ".0%")))
    return markdown(("net", "on", "limit, images/s", "ours, images/s", "ours / limit", "GPU busy"), lines)


# The first sections bring the files of the pipeline into the system's cache.
DEFAULT = {"prepare": prepare, "prediction": prediction, "pipeline": pipeline, "training": training}
SECTIONS: dict[str, Callable[[Bench], str]] = {**DEFAULT, "contention": contention, "gpu": gpu}


def main() -> None:
    """Measure the sections that are named, or those of `DEFAULT`, and write their tables.

    Raises:
        UserError: If there are no patches, or a section does not fit the device.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="one short round on the demo; writes nothing")
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"{', '.join(sorted(unknown))}: no such section; choose from {', '.join(SECTIONS)}")
    chosen = given.sections or list(DEFAULT)
    if find_device() != "cpu" and set(chosen) - {"gpu"}:
        raise UserError("the peers compute on the CPU; hide the GPU with CUDA_VISIBLE_DEVICES= or name only the section gpu")
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
