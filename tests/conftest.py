"""Small sets in the competition's layout, and the command line as a test calls it."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from pcam_kaggle.cli.main import main
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.layout import Data

# Tests hold bytes, which a GPU does not repeat, and make believe in two GPUs where there may be one.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

TINY = [
    *("width=4", "n_blocks=2", "side=32", "hidden=8", "batch_size=8", "epochs=2", "warmup_epochs=0.5", "average_epochs=0.5"),
    *("n_splits=3", "tta=4", "precision=fp32", "memory_format=channels_last"),
]


class Outcome(NamedTuple):
    """What a command left: its exit status, its standard output and error."""

    status: int
    out: str
    err: str


def write_tif(path: Path, patch: NDArray[np.uint8]) -> None:
    """Write an RGB patch as the competition does: uncompressed, the pixels last."""
    Image.fromarray(patch).save(path)


def sha1(patch: NDArray[np.uint8]) -> str:
    """Return the id of a patch."""
    return hashlib.sha1(patch.tobytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def data(tmp_path: Path) -> Data:
    """Return 36 train and 7 test patches whose ids are their SHA-1s; a positive one is darker."""
    made = Data(tmp_path / "data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 36), ("test", 7)):
        made.patches(split).mkdir(parents=True)
        rows = []
        for number in range(count):
            label = number % 3 == 0
            patch = rng.integers(0, 160 if label else 256, (96, 96, 3), dtype=np.uint8)
            write_tif(made.patches(split) / f"{sha1(patch)}.tif", patch)
            rows.append((sha1(patch), int(label)))
        table = pd.DataFrame(rows, columns=["id", "label"])
        table.to_csv(made.labels if split == "train" else made.sample, index=False)
    return made


@pytest.fixture
def tiny() -> Config:
    """Return a net and a training that take a second."""
    return Config().changed(TINY)


@pytest.fixture
def pcam(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return the command line, working on `data` in a folder of its own, with the tiny config."""

    def call(command: str, *arguments: str) -> Outcome:
        fields = [part for field in TINY for part in ("--set", field)]
        capsys.readouterr()
        status = main([command, "--data", str(data.root), "--work", str(tmp_path / "work"), *fields, *arguments])
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def real() -> Data:
    """Return the real patches that PCAM_DATA points to, or skip."""
    folder = os.environ.get("PCAM_DATA")
    if not folder:
        pytest.skip("PCAM_DATA is not set")
    return Data(Path(folder))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)
