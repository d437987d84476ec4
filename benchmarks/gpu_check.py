"""Does everything that needs CUDA work, and how fast? About five minutes on one GPU.

`python -m benchmarks.gpu_check --pack FOLDER` copies patches of PCAM_DATA, 16 kB each, for a machine without data.
`python -m benchmarks.gpu_check --patches FOLDER [STAGE …]` runs the stages on them, each in a process of its own with a time
limit, and appends what each finds to gpu_check.jsonl in the folder OUT at once. `--stand-in` runs them on a CPU, with tiny
models on drawn patches and with the eager step in place of a CUDA graph.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import torch
from torch.autograd import DeviceType

from benchmarks.measures import Source, images_per_second, new_learner, resident
from benchmarks.synthetic import make
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import experiment
from pcam_kaggle.core.files import write_csv
from pcam_kaggle.core.logs import configure_logging
from pcam_kaggle.core.paths import Data, find_data
from pcam_kaggle.core.process import ENVIRONMENT
from pcam_kaggle.data.folds import Scheme, make_folds
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels, read_text
from pcam_kaggle.runs import checkpoint
from pcam_kaggle.runs.provenance import versions
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training import cuda_graph, distributed, engine, gpus, train
from pcam_kaggle.training.device import choose_backend, configure_torch
from pcam_kaggle.training.learner import EpochRow, Learner
from pcam_kaggle.training.loader import batches
from pcam_kaggle.training.task import Task

Row = dict[str, Any]
# Train patches to pack, with a tenth as many of the test set.
PACKED = 2500
ENCODING = {".webp": [cv2.IMWRITE_WEBP_QUALITY, 101], ".tif": [cv2.IMWRITE_TIFF_COMPRESSION, 1]}
# Steps that are compared, or profiled, for each second of a measurement.
STEPS = 20
VIT = Config(model="timm:vit_tiny_patch16_224", batch_size=32)
# Changes, for all models and by model, with which a CPU takes a step in milliseconds.
TINY = ("side=32", "batch_size=8", "n_splits=3")
TINY_MODELS = {
    "cnn": ("n_blocks=2", "width=16", "max_width=32", "hidden=8"),
    "timm:tf_efficientnet_lite0": ("model=timm:lcnet_035", "resize=32"),
    VIT.model: ('model_args={"img_size": 32, "depth": 2}',),
}


def config_of(name: str, *changes: str) -> Config:
    config = VIT if name == "vit" else experiment(name).config
    return config.changed([*(() if torch.cuda.is_available() else TINY + TINY_MODELS[config.model]), *changes])


def new_task(source: Source, run: str, *changes: str) -> Task:
    """Return the task of a new run of the default experiment, with `changes` to its config."""
    config, work = config_of("bottleneck", *changes), source.store.parent
    folds, _ = make_folds(read_labels(source.data.labels), Scheme(config.n_splits, "stratified"), None, work / "folds")
    return Task(Run(work / "runs" / run), "bottleneck", config, PatchStore(source.store), folds)


def as_graph(learner: Learner) -> tuple[cuda_graph.Work | None, str]:
    """Return the graph of the step, None if it is refused, and why. On a CPU the eager step stands in for it."""
    replay, reason = cuda_graph.compared(learner, cuda_graph.capture if torch.cuda.is_available() else lambda work: work)
    print("graph:" if replay else "eager:", reason, flush=True)
    return replay, reason


def model(source: Source, name: str, changes: tuple[str, ...] = (), loaders: tuple[int, ...] = ()) -> Iterator[Row]:
    """Is the step of a model a graph, and why? Speed on one batch on the device and by loader processes, and differences."""
    config, steps = config_of(name, *changes), max(1, round(STEPS * source.seconds))
    learner, data = new_learner(source, config)
    replay, reason = as_graph(learner)
    yield {"backend": str(learner.backend), "is graph": replay is not None, "because": reason}
    rows = data.rows[: engine.PREDICT_BATCH]
    engine.predict_logits(learner.ema.eval(), data.store, rows, config, learner.backend, 1, "validate")
    yield {"validated": len(rows)}
    for workers, learner.replay in itertools.product((0, *loaders), dict.fromkeys((replay, None))):
        stream = batches(data, 0, workers) if workers else resident(learner, data)
        rate = images_per_second(learner, stream, config, source.seconds)
        with torch.profiler.profile() as profile:
            engine.train_epoch(learner, stream, steps, 0, config)
        events = [each for each in profile.key_averages() if not each.is_user_annotation]
        busy = sum(each.self_device_time_total for each in events if each.device_type == DeviceType.CUDA) / 1e6
        values = {
            "images/s": round(rate),
            "busy": round(busy / steps / config.batch_size * rate, 3),
            "loss": float(learner.loss),
        }
        yield {
            "step": "graph" if learner.replay else "eager",
            "loaders": workers,
            **values,
            "scale": learner.scaler.get_scale(),
        }
    with patch.object(cuda_graph, "CHECKED_STEPS", steps):
        for step, work in {"graph": replay or learner.compute, "eager": learner.compute}.items():
            yield {f"{step} against eager": cuda_graph.compared(learner, lambda _, work=work: work)[1]}


def finish(task: Task, choice: str, is_repeatable: bool = False) -> list[EpochRow]:
    """Train fold 0 of `task` to its end; if `is_repeatable`, by deterministic algorithms that are not chosen by their time."""
    configure_torch()
    torch.use_deterministic_algorithms(is_repeatable, warn_only=True)
    torch.backends.cudnn.benchmark &= not is_repeatable
    workers = gpus.loader_processes(1)
    with patch.object(train, "fastest_step", lambda learner: as_graph(learner)[0] if choice == "graph" else None):
        return list(train.train_fold(task, 0, choose_backend(task.config.precision), workers))


def auc(source: Source) -> Iterator[Row]:
    for choice in ("graph", "eager"):
        rows = finish(new_task(source, choice, "epochs=3"), choice)
        yield {"step": choice, **{key: [row[key] for row in rows] for key in ("valid_auc", "train_loss", "images_per_second")}}


def resume(source: Source) -> Iterator[Row]:
    """Largest difference of weights of a run from a second one, and from one that is killed and resumes: 0 if bit-identical."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    whole, again, killed = (new_task(source, name, "epochs=4") for name in ("whole", "again", "killed"))
    process = multiprocessing.get_context("spawn").Process(target=finish, args=(killed, "graph", True))
    process.start()
    while process.is_alive() and killed.run.fold(0).log().empty:
        time.sleep(0.001)
    process.kill()
    process.join()
    yield {"killed after epochs": len(killed.run.fold(0).log()), "of": killed.config.epochs}
    nets = []
    for task in (whole, again, killed):
        finish(task, "graph", True)
        nets.append(checkpoint.load(task.run.fold(0).last_checkpoint)["net"])
    for name, net in (("again", nets[1]), ("killed and resumed", nets[2])):
        yield {name: max(float((nets[0][key].double() - net[key]).abs().max()) for key in net)}


def on_first_gpu(_: int, *arguments: Any) -> None:
    gpus._run_on_gpu(0, *arguments)


def processes(source: Source) -> Iterator[Row]:
    """Two folds in one process, and in two that share a GPU as if it were two."""
    for count in (1, 2):
        task, start = new_task(source, f"processes_{count}", "epochs=2"), time.perf_counter()
        devices = patch.object(torch.cuda, "device_count", lambda count=count: count)
        with devices, patch.object(gpus, "_run_on_gpu", on_first_gpu):
            train.train(task, [0, 1])
        aucs = [task.run.fold(number).metrics().valid_auc for number in (0, 1)]
        yield {"processes": count, "seconds": time.perf_counter() - start, "valid_auc": aucs}


def one_rank(source: Source) -> Iterator[Row]:
    """A rank of torchrun's, which communicates as if it were one of two."""
    with patch.object(distributed, "world_size", lambda: 2), distributed.process_group():
        rows = finish(new_task(source, "one_rank", "epochs=1"), "eager")
        yield {"communicates by": torch.distributed.get_backend(), "valid_auc": rows[0]["valid_auc"]}


# What yields the rows of each stage, and its time limit in seconds on a GPU.
STAGES: dict[str, tuple[Callable[[Source], Iterator[Row]], int]] = {
    **{
        name: (partial(model, name=name), 45) for name in ("bottleneck", "plain", "bottleneck_d4", "lite0", "pretrained", "vit")
    },
    "fp16": (partial(model, name="bottleneck", changes=("precision=fp16",)), 45),
    "loaders": (partial(model, name="bottleneck", loaders=(1, 4, 16)), 90),
    **{work.__name__: (work, 90) for work in (auc, resume, processes, one_rank)},
}


def copy_patches(source: Data, target: Data, before: str, after: str) -> None:
    """Write the first patches of `source`, files that end in `before`, to `target` without loss, as files in `after`."""
    for split, count in (("train", PACKED), ("test", PACKED // 10)):
        table = read_text(source.table(split))[:count]
        target.patches(split).mkdir(parents=True)
        for name in table["id"]:
            pixels = cv2.imread(str(source.patches(split) / f"{name}{before}"))
            cv2.imwrite(str(target.patches(split) / f"{name}{after}"), pixels, ENCODING[after])
        write_csv(target.table(split), table)


def note(out: Path, **row: Any) -> None:
    """Append a row to the results, and print it."""
    with (out / "gpu_check.jsonl").open("a") as file:
        for to in (file, sys.stdout):
            print(json.dumps(row), file=to, flush=True)


def run(stage: str, work: Path, out: Path) -> None:
    """Run a stage in this process, on the data and their store in `work`."""
    configure_logging()
    try:
        for row in STAGES[stage][0](Source(Data(work / "data"), work / "store", 1.0 if torch.cuda.is_available() else 0.05)):
            used, reserved = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
            note(out, stage=stage, **row, most_used_mb=used, most_reserved_mb=reserved)
    except Exception as error:
        note(out, stage=stage, error=f"{type(error).__name__}: {error}")
        raise


def attempt(work: Path, out: Path, patience: int, stage: str) -> bool:
    """Run a stage in a process of its own, for its time limit times `patience`; return whether it succeeded."""
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m") if stage == "one_rank" else ()
    line = [sys.executable, "-m", *launcher, "benchmarks.gpu_check", stage, "--within", str(work), "--out", str(out)]
    start, status = time.perf_counter(), "out of time"
    with suppress(subprocess.TimeoutExpired):
        limit = STAGES[stage][1] * patience
        status = subprocess.run(line, check=False, cwd=Path(__file__).parent.parent, timeout=limit).returncode
    note(out, stage=stage, status=status, seconds=round(time.perf_counter() - start, 1))
    return status == 0


def main() -> int:
    """Pack patches, or run the stages that are named, or all; return 1 if one has failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="copy patches of PCAM_DATA to the new FOLDER, and exit")
    parser.add_argument("--patches", type=Path, metavar="FOLDER", help="what --pack has written")
    parser.add_argument("--stand-in", action="store_true", help="tiny models on drawn patches, on the CPU")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "."), help="folder for the results [OUT, or .]")
    parser.add_argument("--within", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.stages) - STAGES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: no such stage; choose from {', '.join(STAGES)}")
    if given.within:
        run(given.stages[0], given.within, given.out)
        return 0
    if given.pack:
        data = find_data(os.environ.get("PCAM_DATA"), Path())
        copy_patches(data or parser.error("set PCAM_DATA"), Data(given.pack), ".tif", ".webp")
        return 0
    if not (given.stand_in or (given.patches and torch.cuda.is_available())):
        parser.error("needs a GPU and --patches; --stand-in needs neither")
    # Two stages at a time where each has a core.
    os.environ.update(ENVIRONMENT | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if given.stand_in else {}))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, ThreadPoolExecutor(1 + given.stand_in) as pool:
        work, packed = Path(folder), given.patches or Path(folder) / "packed"
        if given.stand_in:
            make(Data(work / "drawn"), 1000)
            copy_patches(Data(work / "drawn"), Data(packed), ".tif", ".webp")
        copy_patches(find_data(str(packed), work), Data(work / "data"), ".webp", ".tif")
        # It checks that each id is the SHA-1 of the pixels.
        prepare(Data(work / "data"), work / "store")
        given.out.mkdir(parents=True, exist_ok=True)
        note(given.out, **versions())
        ended = pool.map(partial(attempt, work, given.out, 4 if given.stand_in else 1), given.stages or STAGES)
        return 0 if all([*ended]) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
