"""The check for a GPU runs without one, on stand-ins, and packed patches keep their ids."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import PACKED, copy_patches
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore


def test_packed_patches_keep_their_pixels(data: Data, tmp_path: Path) -> None:
    packed, unpacked = Data(tmp_path / "packed"), Data(tmp_path / "unpacked")
    copy_patches(data, packed, ".tif", ".webp")
    copy_patches(packed, unpacked, ".webp", ".tif")
    made = []
    for each in (data, unpacked):
        prepare(each, tmp_path / f"store_{each.root.name}")
        made.append(PatchStore(tmp_path / f"store_{each.root.name}").manifest)
    assert (made[0].train_sha256, made[0].test_sha256) == (made[1].train_sha256, made[1].test_sha256)
    assert made[0].train < PACKED


@pytest.mark.slow
def test_stages_run_on_a_cpu_and_write_their_results(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "benchmarks.gpu_check", "--stand-in", "--out", str(tmp_path), "vit", "resume"]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(row) for row in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert {row["stage"]: row["status"] for row in rows if "status" in row} == {"vit": 0, "resume": 0}
    values = {key: value for row in rows for key, value in row.items()}
    assert values["is graph"] is True
    assert values["killed after epochs"] < values["of"]
    assert values["killed and resumed"] == 0
