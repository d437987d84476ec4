"""Two processes train a fold together: a batch is shared out, every row is predicted once, a lost worker is made good."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TINY

import pcam_kaggle
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.training import augment
from pcam_kaggle.training.loader import TrainBatches

RUN = Path("runs") / "bottleneck"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
SHARED_STEP = """
import torch
from pcam_kaggle.core.process import rank
from pcam_kaggle.training.distributed import average_gradients, process_group, world_size
torch.manual_seed(0)
net, images = torch.nn.Linear(5, 1), torch.randn(8, 5)
with process_group():
    whole = torch.autograd.grad(net(images).square().mean(), list(net.parameters()))
    net(images[rank() :: world_size()]).square().mean().backward()
    average_gradients(net)
    assert world_size() == 2
    assert all(torch.allclose(parameter.grad, to, atol=1e-6) for parameter, to in zip(net.parameters(), whole))
"""


def launch(data: Data, work: Path) -> subprocess.Popen[str]:
    """Start the pipeline on small settings in two processes, which are started again should one be lost."""
    changes = [part for change in (*TINY, "epochs=8", "lr=0.01") for part in ("--set", change)]
    line = [*TORCHRUN, "-m", "pcam_kaggle", "pipeline", "--data", str(data.root), "--work", str(work), *changes]
    options = {"text": True, "start_new_session": True, "env": {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def test_two_processes_share_a_batch(store: PatchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "MAX_SHIFT", 0)
    config = replace(Config().changed(TINY), side=96, stain_jitter=0.0, color_jitter=0.0)
    rows = np.arange(24)

    def sums(rank: int, size: int) -> list[int]:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(size))
        return [int(patch.sum()) for patch in TrainBatches(store, rows, np.zeros(24), config, 0)[4][0]]

    alone, parts = sums(0, 1), [sums(rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [4, 4]
    assert parts[0] + parts[1] == alone


@pytest.mark.slow
def test_two_halves_of_a_batch_have_the_gradient_of_the_whole(tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(SHARED_STEP)
    environment = {**os.environ, "PYTHONPATH": str(Path(pcam_kaggle.__file__).parent.parent)}
    line = [*TORCHRUN, str(tmp_path / "step.py")]
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_end_where_one_does_and_a_lost_worker_changes_nothing(data: Data, tmp_path: Path) -> None:
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    process = launch(data, whole)
    printed, _ = process.communicate(timeout=240)
    assert (process.returncode, printed.count("submission: ")) == (0, 1), printed
    oof, labels = pd.read_csv(whole / RUN / "oof.csv"), pd.read_csv(data.labels)
    assert sorted(oof["id"]) == sorted(labels["id"])

    process = launch(data, lost)
    try:
        while not (lost / RUN / "fold_1" / "last.pt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        printed, _ = process.communicate(timeout=240)
        assert process.returncode == 0, printed
        assert "(up to date)" in printed
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    for name in (RUN / "oof.csv", Path("submissions") / "bottleneck.csv"):
        assert (lost / name).read_bytes() == (whole / name).read_bytes()
