"""Mutated inputs: each ends in one line that says what is wrong, or in the very result of the input as it was.

`python -m benchmarks.fuzz [MUTATIONS]`: every file that comes in from outside or is read again, one at a time, changed as a
disk, a transfer or a hand may change it. The seed is fixed, so that a number stands for the same mutation every time.
"""

import contextlib
import csv
import io
import json
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha1
from pathlib import Path
from typing import Any, NoReturn

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from pcam_kaggle import UserError
from pcam_kaggle.cli import main as cli
from pcam_kaggle.data.atomic_io import PART
from pcam_kaggle.data.layout import Data, Workspace
from pcam_kaggle.kaggle import client as kaggle
from pcam_kaggle.runs.import_run import take_over

MUTATIONS = 500
SEED = 0
SECONDS = 10
MOST_BYTES = 2 * 10**9
VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2**63, 0.5, float("inf"), float("nan"), None, True),
    *("", "x", "../x", "x" * 300, "0", "1e999", [], {}, [1, "x"], {"x": 1}),
)
MEMBERS = ("../out", "/out", "a/../../out", "a\\..\\out", "train", "train/", "train_labels.csv")
CONFIG = (
    *("width=4", "n_blocks=2", "side=32", "hidden=8", "batch_size=8", "epochs=2", "n_splits=2", "tta=1", "average_epochs=0.5"),
    *("precision=fp32", "memory_format=channels_last"),
)
SUBMISSION = Path("work") / "submissions" / "bottleneck.csv"
Check = Callable[[Path, Path], bool]


@dataclass(frozen=True, slots=True)
class Target:
    """A file to mutate, what then reads it, and `right`, which tells from the folders as they are and as they were that it was
    read right; `without` are deleted before, so that it is needed.
    """

    file: str
    read: tuple[str, ...]
    right: Check
    without: tuple[str, ...] = ()


def same_patches(now: Path, before: Path) -> bool:
    """Tell whether the store holds the same pixels."""
    keys = ("train_sha256", "test_sha256", "train", "test")
    made, was = (json.loads((folder / "work/store/manifest.json").read_text()) for folder in (now, before))
    return all(made[key] == was[key] for key in keys)


def same_submission(now: Path, before: Path) -> bool:
    """Tell whether the submission is the same to the byte."""
    return (now / SUBMISSION).read_bytes() == (before / SUBMISSION).read_bytes()


def as_listed(now: Path, _: Path) -> bool:
    """Tell whether the folds are of the ids and labels that another reader finds in the table."""
    with (now / "data/train_labels.csv").open(encoding="utf-8-sig", newline="") as file:
        listed = {row["id"].strip(): float(row["label"]) for row in csv.DictReader(file)}
    folds = pd.read_csv(next((now / "work/folds").glob("*_2_42.csv")), dtype={"id": str})
    return listed == dict(zip(folds["id"], folds["label"].astype(float), strict=True))


def same_archive(now: Path, before: Path) -> bool:
    """Tell whether what was unpacked is what was packed."""
    files = [path.relative_to(before / "data") for path in (before / "data").rglob("*") if path.is_file()]
    return all((now / "unpacked" / path).read_bytes() == (before / "data" / path).read_bytes() for path in files)


def any_answer(now: Path, _: Path) -> bool:
    """Tell that nothing half-written lies about."""
    return not list(now.rglob(f"*{PART}"))


RUN = "work/runs/bottleneck"
FINISHED = (f"{RUN}/fold_0/metrics.json", f"{RUN}/fold_0/predictions.json", f"{RUN}/metrics.json")
UNPREDICTED = (f"{RUN}/fold_0/predictions.json",)
TARGETS = (
    *(Target(f"data/{split}/0.tif", ("prepare",), same_patches) for split in ("train", "test")),
    *(Target(f"data/{name}.csv", ("prepare", "folds"), as_listed) for name in ("train_labels", "patch_id_wsi")),
    Target("data/sample_submission.csv", ("prepare",), any_answer),
    Target("data/dataset.json", ("prepare",), same_patches),
    *(Target(f"work/store/{name}", ("pipeline",), same_submission) for name in ("manifest.json", "index.csv")),
    *(Target(f"work/folds/slides_2_42.{kind}", ("pipeline",), same_submission) for kind in ("csv", "json")),
    *(Target(f"{RUN}/{name}", ("pipeline", "compare"), same_submission) for name in ("config.json", "environment.json")),
    *(Target(f"{RUN}/fold_0/{name}", ("pipeline",), same_submission) for name in ("oof.csv", "test.csv", "predictions.json")),
    *(Target(f"{RUN}/{name}", ("pipeline", "compare"), same_submission) for name in ("oof.csv", "test.csv", "metrics.json")),
    Target(f"{RUN}/metrics.json", ("submission",), same_submission),
    Target(f"{RUN}/fold_0/metrics.json", ("compare",), any_answer),
    Target(f"{RUN}/fold_0/log.csv", ("pipeline",), same_submission, FINISHED),
    Target(f"{RUN}/fold_0/last.pt", ("pipeline",), same_submission, FINISHED),
    Target(f"{RUN}/fold_0/best.pt", ("pipeline",), same_submission, UNPREDICTED),
    Target("work/submissions/bottleneck.json", ("pipeline", "ledger"), same_submission),
    Target("archive.zip", ("unpack",), same_archive),
    *(Target(f"home/runs/bottleneck/{name}", ("take",), any_answer) for name in ("config.json", "metrics.json", "oof.csv")),
    *(
        Target(f"home/runs/bottleneck/fold_0/{name}", ("take", "pipeline"), same_submission)
        for name in ("last.pt", "best.pt", "oof.csv", "log.csv", "predictions.json", "metrics.json")
    ),
)


def pixels_first(file: Path, patch: NDArray[np.uint8]) -> None:
    """Write a TIF that has to be decoded."""
    cv2.imwrite(str(file), cv2.cvtColor(patch, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_TIFF_COMPRESSION, 1])


def pixels_last(file: Path, patch: NDArray[np.uint8]) -> None:
    """Write a TIF as the competition's are."""
    Image.fromarray(patch).save(file)


WRITERS = {"train": pixels_last, "test": pixels_first}


def small_set(data: Data) -> None:
    """Write 24 train and 5 test patches whose ids are their SHA-1s, but for one of either split, which is called 0."""
    rng = np.random.default_rng(SEED)
    tables = {"train": data.labels, "test": data.sample}
    for split, count in (("train", 24), ("test", 5)):
        data.patches(split).mkdir(parents=True)
        rows = []
        for number in range(count):
            patch = rng.integers(0, 200 + 50 * (number % 2), (96, 96, 3), dtype=np.uint8)
            name = sha1(patch.tobytes(), usedforsecurity=False).hexdigest()
            WRITERS[split](data.patches(split) / f"{name}.tif", patch)
            rows.append((name, number % 2, f"slide_{number % 8}"))
        table = pd.DataFrame(rows, columns=["id", "label", "wsi"])
        table[["id", "label"]].to_csv(tables[split], index=False)
        if split == "train":
            table[["id", "wsi"]].to_csv(data.root / "patch_id_wsi.csv", index=False)
    data.declaration.write_text('{"ids": "sha1"}\n')


def resolved(folder: Path, file: str) -> Path:
    """Return the file that a target names; `0.tif` is the first patch."""
    path = folder / file
    return min(path.parent.glob("*.tif")) if path.name == "0.tif" else path


def mutated(file: Path, rng: np.random.Generator) -> bytes:
    """Return the content of `file` with up to three places in its bytes changed or, where its form is known, one value."""
    content = file.read_bytes()
    reform = FORMS.get(file.suffix)
    if reform and rng.integers(2):
        return reform(content, rng)
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place, length = int(rng.integers(0, max(1, len(changed)))), int(rng.integers(1, 64))
        flipped = bytes([changed[place] ^ (1 << int(rng.integers(8)))]) if place < len(changed) else b"\0"
        kinds = (
            (place, place + 1, flipped),
            (place, len(changed), b""),
            (place, place + length, b""),
            (place, place, rng.bytes(length)),
            (place, place, bytes(changed[place : place + length])),
            (place, place + 1, bytes(rng.choice([b"\xff", b"\n", b",", b'"', b"../", b"\r"]))),
        )
        start, end, new = kinds[rng.integers(len(kinds))]
        changed[start:end] = new
    return bytes(changed)


def _other_value(node: Any, rng: np.random.Generator) -> Any:
    """Return `node`, dicts and lists in one another, with one value in it replaced or taken away."""
    if isinstance(node, dict) and node and rng.integers(8):
        key = list(node)[rng.integers(len(node))]
        if not rng.integers(6):
            return {other: value for other, value in node.items() if other != key}
        return node | {key: _other_value(node[key], rng)}
    if isinstance(node, list) and node and rng.integers(8):
        place = int(rng.integers(len(node)))
        return [*node[:place], _other_value(node[place], rng), *node[place + 1 :]]
    return VALUES[rng.integers(len(VALUES))]


def _other_json(content: bytes, rng: np.random.Generator) -> bytes:
    return json.dumps(_other_value(json.loads(content), rng)).encode()


def _other_checkpoint(content: bytes, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    torch.save(_other_value(torch.load(io.BytesIO(content), weights_only=True), rng), buffer)
    return buffer.getvalue()


def _other_cell(content: bytes, rng: np.random.Generator) -> bytes:
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    row = rows[rng.integers(len(rows))]
    row[rng.integers(len(row))] = str(VALUES[rng.integers(len(VALUES))])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


def _other_member(content: bytes, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr(MEMBERS[rng.integers(len(MEMBERS))], b"x")
    return buffer.getvalue()


FORMS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    ".json": _other_json,
    ".pt": _other_checkpoint,
    ".csv": _other_cell,
    ".zip": _other_member,
}


def run(step: str, folder: Path) -> int:
    """Carry out one step in `folder`; return its exit status."""
    if step in ("unpack", "take"):
        try:
            if step == "unpack":
                kaggle.unpack(folder / "archive.zip", folder / "unpacked")
            else:
                shutil.rmtree(folder / RUN)
                take_over(folder / "home", Workspace(folder / "work", folder / "work" / "store"))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    if step in ("compare", "ledger"):
        return cli.main([step, "--work", str(folder / "work")])
    changes = [part for change in CONFIG for part in ("--set", change)]
    return cli.main([step, "--data", str(folder / "data"), "--work", str(folder / "work"), *changes])


def _too_long(*_: Any) -> NoReturn:
    raise TimeoutError(f"more than {SECONDS} s")


def prepared(folder: Path) -> Path:
    """Return a folder with a small set, a finished run, its submission, the same run coming home, and the set as an archive."""
    data = Data(folder / "data")
    small_set(data)
    if run("pipeline", folder):
        raise RuntimeError("the run that is to be damaged did not succeed")
    for name in ("runs", "folds", "submissions"):
        shutil.copytree(folder / "work" / name, folder / "home" / name)
    with zipfile.ZipFile(folder / "archive.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(data.root.rglob("*")):
            file.write(path, str(path.relative_to(data.root)))
    return folder


def attempt(folder: Path, before: Path, number: int) -> str:
    """Return what became of mutation `number`, tried on a copy, in `folder`, of what `before` holds.

    Raises RuntimeError where it ends in a traceback, in more than one line, in a wrong result, after 10 seconds, or beyond
    2 GB.
    """
    target = TARGETS[number % len(TARGETS)]
    now = folder / f"{number}"
    shutil.copytree(before, now)
    file = resolved(now, target.file)
    file.write_bytes(mutated(file, np.random.default_rng((SEED, number))))
    for name in target.without:
        (now / name).unlink()
    said, status = io.StringIO(), 0
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            for step in target.read:
                status = status or run(step, now)
    except BaseException as error:
        raise RuntimeError(f"mutation {number}, {target.file}: {type(error).__name__}: {error}") from error
    finally:
        signal.alarm(0)
    lines = [line for line in said.getvalue().splitlines() if not line.startswith("  ")]
    wrong = {
        "not one line": status and (len(lines) != 1 or not lines[0].startswith("error: ")),
        f"status {status}": status not in (0, 2),
        "a wrong result": not status and not target.right(now, before),
        "half a file": not any_answer(now, before),
        "too much memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > MOST_BYTES,
    }
    if any(wrong.values()):
        found = ", ".join(what for what, is_so in wrong.items() if is_so)
        raise RuntimeError(f"mutation {number}, {target.file}: {found}; {said.getvalue()[:500]}")
    shutil.rmtree(now)
    return f"{number} {target.file}: {lines[0] if status else 'the same result'}"


def fuzz(folder: Path, count: int) -> Iterator[str]:
    """Yield a line for each of `count` mutations, tried in `folder`; raises RuntimeError as `attempt`."""
    (folder / "before").mkdir()
    with contextlib.redirect_stdout(io.StringIO()):
        before = prepared(folder / "before")
    for number in range(count):
        yield attempt(folder, before, number)


def main(count: int) -> None:
    """Print what became of each mutation."""
    with tempfile.TemporaryDirectory() as folder:
        for line in fuzz(Path(folder), count):
            print(line, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else MUTATIONS)
