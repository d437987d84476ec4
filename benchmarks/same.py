"""Do two commits compute the same? Runs a fixed list of commands at both and compares what they wrote, byte for byte.

`python -m benchmarks.same BASE` compares the commit BASE with this working tree, on the synthetic demo. Exit status 1 if
anything differs that `REASONS` does not explain.
"""

import fnmatch
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
TINY = (
    *("width=8", "max_width=16", "n_blocks=2", "side=32", "hidden=8", "batch_size=32", "epochs=2", "average_epochs=0.5"),
    *("n_splits=3", "tta=4", "norm=test", "precision=fp32"),
)
D4 = ("symmetry=d4", "width=16", "max_width=32", "head=pool")
TIMM = ("model=timm:resnet10t", "resize=64", "tta=1", "epochs=1")
DEFAULT_NET = ("side=64", "n_splits=3", "epochs=1", "batch_size=32", "precision=bf16")
WHEEL = ("side=64", "n_splits=3", "tta=1", "precision=fp32", "pool=catavgmax")
SCORES = "kaggle scores blended-not-for-kaggle --public 0.9 --private 0.8"
# The commands, each with its fields; `{held_out}` is a folder of labelled patches.
COMMANDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pipeline -e bottleneck --name adamw --set optimizer=adamw", TINY),
    ("pipeline -e bottleneck --name muon", TINY),
    ("pipeline -e bottleneck --name d4", (*TINY, *D4)),
    ("pipeline -e plain --name stratified --groups none", tuple(field for field in TINY if field != "norm=test")),
    ("pipeline -e bottleneck --name bf16", DEFAULT_NET),
    ("pipeline -e bottleneck --name timm", (*TINY, *TIMM)),
    ("pipeline -e bottleneck --name taught --set teacher=muon", TINY),
    ("pipeline -e bottleneck --name many --seeds 2", TINY),
    ("probe -e lite0 --name probe", WHEEL),
    ("blend adamw muon --name blended", ()),
    ("blend adamw muon --name ranked --method rank", ()),
    ("submission --name blended", ()),
    ("evaluate muon blended ranked --patches {held_out}/patches --labels {held_out}/labels.csv --ids names --format json", ()),
    ("compare adamw muon blended --format json", ()),
    ("compare stratified --format json", ()),
    (SCORES, ()),
)
# Names of commands at commits before they were renamed.
RENAMED = {SCORES: SCORES.replace("scores", "ledger", 1)}
# Ends of the names of measurements, and of the table that names the commit.
MEASURED = (".images_per_second", ".minutes", "ledger.csv")
# The last of several commits after which every training computes something else.
NUMBERS = ("bff5268", "logits, Adam's first steps, the last learning rate and the random numbers of crops differ")
PROBE = ("85e71e0", "a probe standardises features in float64")
SUMS = ("1a9c0b3", "statistics of the copies of a field are summed in another order")
TEACHER = ("cef54e0", "a teacher labels augmented patches of train and test")
# Patterns of files, or of values in them (`file:path.to.key`), that differ on purpose, with the commit since which they do.
REASONS = {
    "folds/*_near_duplicates.csv": ("c973a7a", "near-duplicates are not listed any more"),
    "*.json:runs*.fall": ("baeb792", "renamed drop"),
    "*.json:runs*.drop": ("baeb792", "was named fall"),
    "*.json:runs*.changed": ("baeb792", "evaluate applies no corruptions any more"),
    "*.json:words*": ("baeb792", "no sentence on statistical power any more"),
    "runs/probe/*": PROBE,
    "submissions/probe-*": PROBE,
    "runs/d4/*": SUMS,
    "submissions/d4-*": SUMS,
    "runs/taught/*": TEACHER,
    "submissions/taught-*": TEACHER,
    "runs/*": NUMBERS,
    "submissions/*": NUMBERS,
    "*output_*": NUMBERS,
}


def run_all(source: Path, work: Path, held_out: Path) -> None:
    """Run all commands with the package in `source`, writing into `work`; each output goes to `output_<number>.txt`."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    is_old = not (source / "pcam_kaggle" / "core").is_dir()
    for number, (command, fields) in enumerate(COMMANDS):
        known = RENAMED.get(command, command) if is_old else command
        words = known.format(held_out=held_out).split()
        if words[0] in ("pipeline", "probe", "blend", "submission"):
            words.append("--demo")
        words += [part for field in fields for part in ("--set", field)]
        folder = work / "demo" if words[0] == "kaggle" else work
        line = [sys.executable, "-m", "pcam_kaggle", *words, "--work", str(folder)]
        ended = subprocess.run(line, cwd=source, env=environment, capture_output=True, text=True, check=False)
        if ended.returncode:
            raise SystemExit(f"{source}: {command}: status {ended.returncode}: {ended.stderr.strip()}")
        if "--format" in words:
            (work / f"output_{number:02}.json").write_text(ended.stdout)


def differences(first: Path, second: Path) -> Iterator[str]:
    """Yield the names of files, tensors and JSON keys below `first` and `second` that differ or that one of them lacks."""
    patterns = ("folds/*.csv", "runs/**/*.csv", "runs/**/*.pt", "submissions/*.csv", "../output_*")
    names = {
        os.path.relpath(path, folder / "demo")
        for folder in (first, second)
        for pattern in patterns
        for path in (folder / "demo").glob(pattern)
    }
    for name in sorted(names):
        one, other = first / "demo" / name, second / "demo" / name
        if not (one.exists() and other.exists()):
            yield name
        elif name.endswith(".json"):
            yield from (f"{name}:{key}" for key in differing(json.loads(one.read_text()), json.loads(other.read_text())))
        elif name.endswith(".pt"):
            found = (torch.load(path, weights_only=True) for path in (one, other))
            yield from (f"{name}:{key}" for key in differing(*found) if not key.startswith("log"))
        elif name.endswith("log.csv"):
            columns = (0, 1, 2, 3)
            rows = ([[line.split(",")[c] for c in columns] for line in path.read_text().split()] for path in (one, other))
            yield from [name] if next(rows) != next(rows) else []
        elif one.read_bytes() != other.read_bytes():
            yield name


def differing(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of values that differ between two nested structures of dictionaries, lists, tensors and scalars."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in dict.fromkeys([*one, *other]):
            yield from differing(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, pair in enumerate(zip(one, other, strict=True)):
            yield from differing(*pair, f"{path}[{number}]")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        yield from [] if torch.equal(one, other) else [path]
    elif one != other:
        yield path


def reasons(base: str) -> dict[str, str]:
    """Return the `REASONS` whose commits are not in the history of the commit `base`."""
    history = subprocess.run(["git", "rev-list", base], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {pattern: reason for pattern, (commit, reason) in REASONS.items() if f"\n{commit}" not in f"\n{history}"}


def main(base: str) -> int:
    """Compare the commit `base` with the working tree; print what differs, with reasons; return the exit status."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder / "base", base], cwd=ROOT, check=True)
        try:
            held_out = folder / "held_out"
            script = (
                "import shutil, sys; from pathlib import Path\n"
                "try: from pcam_kaggle.core.paths import Data\n"
                "except ImportError: from pcam_kaggle.data.layout import Data\n"
                "from pcam_kaggle.data.demo import make_demo; make_demo(Data(Path(sys.argv[1])), seed=2)"
            )
            subprocess.run([sys.executable, "-c", script, held_out], cwd=folder / "base", check=True)
            # Under the names of the train patches they would be refused.
            (held_out / "patches").mkdir()
            for file in (held_out / "train").iterdir():
                file.rename(held_out / "patches" / f"other_{file.name}")
            labels = (held_out / "train_labels.csv").read_text()
            (held_out / "labels.csv").write_text(labels.replace("demo_", "other_demo_"))
            works = [folder / "before", folder / "after"]
            for source, work in zip((folder / "base", ROOT), works, strict=True):
                run_all(source, work, held_out)
            found = [each for each in differences(*works) if not each.endswith(MEASURED)]
            count = sum(1 for _ in works[1].rglob("*.*"))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", folder / "base"], cwd=ROOT, check=True)
    unexplained = 0
    known = reasons(base)
    for each in found:
        reason = next((reason for pattern, reason in known.items() if fnmatch.fnmatchcase(each, pattern)), None)
        unexplained += reason is None
        print(f"differs: {each}: {reason or 'no reason is known'}")
    print(f"{len(COMMANDS)} commands, {count} files: {len(found)} differences, {unexplained} without a reason")
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
