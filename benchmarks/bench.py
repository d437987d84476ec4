"""How fast and how small, against what people use and against the limit: prints one table, writes RESULTS.md.

`python -m benchmarks.bench [SECTION …]`, with PCAM_DATA naming the competition's folder; sections are training, pipeline,
prediction and prepare, and where there is a GPU, gpu. Only ratios of one run mean anything: machines differ, and a shared one
differs from itself.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.results import PEERS, Rows, keep, middle, page, pipeline_table, rates_table
from pcam_kaggle import UserError
from pcam_kaggle.config.process import ENVIRONMENT
from pcam_kaggle.data.atomic_io import read_json
from pcam_kaggle.data.layout import find_data, find_workspace
from pcam_kaggle.training.device import MALLOC_OPTIONS, find_device, precisions

HERE = Path(__file__).parent

NET = "bottleneck"
# Seconds for all sections, so that a slow machine too has made `make bench` within 40 minutes, installation included.
SECONDS = 2100
# Seconds for the rounds of a comparison. Training has what the others leave of all.
PIPELINE_SECONDS, PREDICTION_SECONDS, PREPARE_SECONDS = 800, 100, 60
# The shares of that time of the peers as people use them, whose processes differ most on `plain`, and with every switch on.
TRAINING_SHARES = {NET: (0.28, 0.17), "plain": (0.45, 0.10)}
# Processes of ours, beside each of which the others take their turns.
PROCESSES = 2
GPU_ROUNDS = 5
# What else computes on the machine: programs of one thread, and their priority.
SITUATIONS = {"nothing": (0, 0), **{f"{count} at nice {nice}": (count, nice) for nice in (0, 5, 19) for count in (1, 2)}}
CONTENTION_ROUNDS = 3
PATCHES = 256
EPOCHS, SPLITS = 2, 2
GPU_NETS = (*TRAINING_SHARES, "best")
# Else albumentations asks the network for its newest version while the clock runs.
COMMON = {"NO_ALBUMENTATIONS_UPDATE": ENVIRONMENT["NO_ALBUMENTATIONS_UPDATE"]}
# Memory is kept from step to step, in huge pages, as our command line has it: PyTorch's tuning guide advises other allocators
# to the same end.
TUNABLES = dict(zip(("trim_threshold", "top_pad", "mmap_max"), MALLOC_OPTIONS.values(), strict=True))
TUNED = ENVIRONMENT | {"GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())}

Turn = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Bench:
    """The patches to measure on, a folder with a store of them, and when all is to have ended, by the monotonic clock."""

    data: Path
    work: Path
    end: float = math.inf

    @contextmanager
    def contender(self, measure: str, environment: dict[str, str] = COMMON, **arguments: Any) -> Iterator[Turn]:
        """Yield what lets `measure`, in a process of its own, take one turn, and returns what it saw."""
        line = [sys.executable, "-m", "benchmarks.measures", measure, json.dumps({"data": str(self.data), **arguments})]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": HERE.parent}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(line, stderr=errors, env=os.environ | environment, **pipes) as process,
        ):

            def turn() -> dict[str, Any]:
                with suppress(BrokenPipeError):
                    print(file=process.stdin, flush=True)
                seen = process.stdout.readline()
                if not seen:
                    errors.seek(0)
                    lines = [f"ended with status {process.wait()}", *errors.read().strip().splitlines()]
                    raise UserError(f"{measure} {arguments}: {lines[-1]}")
                return json.loads(seen)

            yield turn

    def once(self, measure: str, **arguments: Any) -> dict[str, Any]:
        """Return what `measure`, in a process of its own, saw in its first turn."""
        with self.contender(measure, **arguments) as turn:
            return turn()

    @contextmanager
    def contenders(self, chosen: dict[str, dict[str, Any]]) -> Iterator[dict[str, Turn]]:
        """Yield the turns of all that are `chosen`, by name; each has taken a first one, which is slow."""
        with ExitStack() as stack:
            turns = {kind: stack.enter_context(self.contender(**options)) for kind, options in chosen.items()}
            for turn in turns.values():
                turn()
            yield turns

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


def shares(end: float, weights: Sequence[float]) -> Iterator[float]:
    """Yield when each of several parts is to end, which share by their `weights` what is left until `end` as each begins."""
    for index, weight in enumerate(weights):
        now = time.monotonic()
        yield now + (end - now) * weight / sum(weights[index:])


def processes(end: float) -> Iterator[float]:
    """Yield when each process of ours is to end; after the first, none where `end` has passed."""
    for moment in shares(end, [1] * PROCESSES):
        yield moment
        if time.monotonic() > end:
            return


def compare(rows: Rows, ours: Turn, others: dict[str, Turn], end: float) -> None:
    """Add to `rows` the rates of `others`, in rounds that lie between two turns of `ours`, and ours as a multiple of each.

    So a machine that changes in between favours none, and since it is slower for a minute now and then, turns are short. The
    last round ends as close to `end` as can be, and is one at least where `rows` has none yet. What a turn of `ours` measures
    beside it is added turn by turn.
    """

    def note(kind: str, rate: float, beside: float) -> None:
        row = rows.setdefault(kind, {"rates": [], "ratios": []})
        row["rates"].append(rate)
        row["ratios"].append(beside / rate)

    def own() -> float:
        seen = ours()
        rate = seen.pop("rate")
        for kind, each in {"ours": rate, **seen}.items():
            note(kind, each, rate)
        return rate

    before = own()
    took = 0.0
    while not rows.keys() >= others.keys() or time.monotonic() + took / 2 < end:
        start = time.monotonic()
        rates = {kind: turn()["rate"] for kind, turn in others.items()}
        after = own()
        for kind, rate in rates.items():
            note(kind, rate, (before + after) / 2)
        before, took = after, time.monotonic() - start


def ways() -> dict[str, dict[str, Any]]:
    """Return how a peer computes as people use it, and with every switch on, by what that adds to its name.

    bf16 is a switch where the processor has units for it: where it has none, it is slower.
    """
    return {
        "": {"precision": "fp32", "channels_last": False},
        ", every switch": {"precision": precisions("cpu")[0], "channels_last": True, "environment": TUNED},
    }


def training(bench: Bench) -> dict[str, Any]:
    """Measure the images/s of our training, of its limit and of every peer.

    A process that does not keep its memory faults in anew what it gave back, more or less of it from its start to its end: so
    each turn of a peer is another process, and most are of those that do not.
    """
    seen: dict[str, Any] = {}
    of_nets = [sum(weights) for weights in TRAINING_SHARES.values()]
    for end, (name, weights) in zip(shares(bench.end, of_nets), TRAINING_SHARES.items(), strict=True):
        rows: Rows = {}
        for moment in processes(end):
            with bench.contender("training", ENVIRONMENT, work=str(bench.work), name=name) as ours:
                backend = ours()["backend"]
                ours()
                for until, (switches, options) in zip(shares(moment, weights), ways().items(), strict=True):
                    turn = partial(bench.once, "peer_training", name=name, **options)
                    compare(rows, ours, {peer + switches: partial(turn, peer=peer) for peer in PEERS}, until)
        seen[name] = {"backend": backend, "rows": rows}
        say(f"training {name}, {backend}:\n{rates_table(rows)}")
    return seen


def pipeline(bench: Bench) -> dict[str, Any]:
    """Measure the runs/s from TIFs to OOF table and submission, with one view, on the same folds for as many epochs."""
    aucs: dict[str, float] = {}

    def ours() -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            options = [f"epochs={EPOCHS}", f"n_splits={SPLITS}", "tta=1"]
            changes = [part for option in options for part in ("--set", option)]
            seconds, _ = bench.command(Path(folder), "pipeline", "-e", NET, *changes)
            aucs["ours"] = read_json(Path(folder) / "runs" / NET / "metrics.json")["pooled"]["value"]
        return {"rate": 1 / seconds}

    def theirs(peer: str, switches: str) -> dict[str, float]:
        options = {"epochs": EPOCHS, "n_splits": SPLITS, **ways()[switches]}
        start = time.perf_counter()
        aucs[peer + switches] = bench.once("peer_pipeline", name=NET, peer=peer, **options)["auc"]
        return {"rate": 1 / (time.perf_counter() - start)}

    rows: Rows = {}
    as_used, every = ways()
    measured = [*((peer, as_used) for peer in PEERS), (PEERS[0], every)]
    end = time.monotonic() + PIPELINE_SECONDS
    # Turns of minutes, in which a shared machine changes: ours has another between the halves of a round.
    for until, half in zip(shares(end, [1, 1]), (measured[:2], measured[2:]), strict=True):
        compare(rows, ours, {"".join(each): partial(theirs, *each) for each in half}, until)
    seen = {"rows": rows, "auc": aucs}
    say(f"pipeline:\n{pipeline_table(seen)}")
    return seen


def together(bench: Bench, chosen: dict[str, dict[str, Any]], seconds: float) -> Rows:
    """Return the rows of all that are `chosen`, by turns for `seconds`, in several sets of processes one after the other."""
    rows: Rows = {}
    for end in processes(time.monotonic() + seconds):
        with bench.contenders(chosen) as turns:
            compare(rows, turns.pop("ours"), turns, end)
    return rows


def prediction(bench: Bench) -> dict[str, Any]:
    """Measure the patches/s of prediction under eight views, of ttach's and of the limit."""
    own = {"measure": "prediction", "environment": ENVIRONMENT, "work": str(bench.work), "count": 2 * PATCHES}
    ttach = {"measure": "ttach_prediction", "name": NET, "count": PATCHES}
    chosen = {
        "ours": {**own, "name": NET, "views": 8},
        **{f"ttach{switches}": {**ttach, **options} for switches, options in ways().items()},
        "bottleneck_d4, one view": {**own, "name": "bottleneck_d4", "views": 1},
    }
    rows = together(bench, chosen, PREDICTION_SECONDS)
    say(f"prediction:\n{rates_table(rows)}")
    return rows


def prepare(bench: Bench) -> dict[str, Any]:
    """Measure `prepare` against reading and decoding alone, and the peak memory of every stage."""
    chosen = {kind: {"measure": "preparation", "kind": kind} for kind in ("ours", "bytes", "cv2")}
    rows = together(bench, chosen, PREPARE_SECONDS)
    seen: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        changes = [part for option in ("epochs=1", "n_splits=2", "tta=1", "batch_size=64") for part in ("--set", option)]
        for stage in ("prepare", "folds", "train", "predict", "blend", "submission"):
            seen[stage] = bench.command(Path(folder), stage, "-e", NET, *changes)[1]
        seen["compare"] = bench.command(Path(folder), "compare")[1]
    say(f"prepare:\n{rates_table(rows)}\n{seen}")
    return {"rows": rows, "memory": seen}


def gpu(bench: Bench) -> dict[str, Any]:
    """Measure the images/s of our training on a GPU and of its limit, and how busy both keep the GPU."""
    if find_device() != "cuda":
        raise UserError("gpu: there is none here that torch can compute on")
    seen: dict[str, Any] = {}
    for name in GPU_NETS:
        rows: Rows = {}
        with bench.contender("training", ENVIRONMENT, work=str(bench.work), name=name) as ours:
            backend = ours()["backend"]
            ours()
            with gpu_shares() as shares:
                for _ in range(GPU_ROUNDS):
                    # Without peers that is one turn of ours, beside its limit.
                    compare(rows, ours, {}, 0)
        seen[name] = {"backend": backend, "rows": rows, "busy": middle(shares)}
        say(f"gpu {name}, {backend}, busy {seen[name]['busy']:.2f}:\n{rates_table(rows)}")
    return seen


def contention(bench: Bench) -> dict[str, Any]:
    """Measure the images/s of our training and of a fully tuned plain loop, beside other programs that compute."""
    ours = {"measure": "training", "environment": ENVIRONMENT, "work": str(bench.work), "name": NET, "with_limit": False}
    loop = {"measure": "peer_training", "name": NET, "peer": PEERS[0], **ways()[", every switch"]}
    seen: dict[str, dict[str, list[float]]] = {}
    with bench.contenders({"ours": ours, "loop": loop}) as turns:
        for situation, (programs, nice) in SITUATIONS.items():
            with busy(programs, nice):
                rounds = [{kind: turn()["rate"] for kind, turn in turns.items()} for _ in range(CONTENTION_ROUNDS)]
            seen[situation] = {kind: [rates[kind] for rates in rounds] for kind in turns}
            say(f"contention, {situation}: {seen[situation]}")
    return seen


@contextmanager
def busy(programs: int, nice: int) -> Iterator[None]:
    """Run as many `programs` at priority `nice` that each keep one thread busy."""
    line = [sys.executable, "-c", f"import os\nos.nice({nice})\nwhile True: pass"]
    with ExitStack() as stack:
        for _ in range(programs):
            stack.callback(stack.enter_context(subprocess.Popen(line)).kill)
        yield


@contextmanager
def gpu_shares() -> Iterator[list[float]]:
    """Yield a list that at the end holds, for each tenth of a second, how busy nvidia-smi then took the GPU to be, in [0, 1].

    It tells in which share of its own last sixth of a second, or more, any kernel ran.
    """
    line = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "--loop-ms=100"]
    shares: list[float] = []
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield shares
        finally:
            process.terminate()
        shares.extend(float(percent) / 100 for percent in process.stdout.read().split())


# The end to end run has no turn to warm up in, so it comes when others have loaded what it reads.
ON_CPU: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "prediction": prediction,
    "prepare": prepare,
    "pipeline": pipeline,
    "training": training,
}
SECTIONS = {**ON_CPU, "contention": contention, "gpu": gpu}


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
    chosen = [name for name in SECTIONS if name in (names or ON_CPU)]
    if find_device() != "cpu" and set(chosen) - {"gpu"}:
        raise UserError(
            "the peers compute on the CPU; hide other devices, by CUDA_VISIBLE_DEVICES= for one, or name the section gpu"
        )
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(data.root.resolve(), Path(folder), time.monotonic() + SECONDS)
        bench.command(bench.work, "prepare")
        for name in chosen:
            keep(name, SECTIONS[name](bench))
    say(page())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
