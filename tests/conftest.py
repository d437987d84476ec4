"""Small data sets in the competition's layout, a finished run, and the command line as a test calls it."""

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import shutil
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from kaggle_server import SECRET, Kaggle
from numpy.typing import NDArray
from PIL import Image

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.folds import Folds, Scheme, make_folds
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.task import Task

# Tests compare bytes, which a GPU does not reproduce, and simulate two GPUs.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Kaggle's client reads this when it is imported: no test can reach Kaggle itself.
os.environ["KAGGLE_API_ENVIRONMENT"] = "LOCALHOST"

# The real patches, where there are any. Tests do not see the variables themselves.
REAL_DATA = os.environ.get("PCAM_DATA")

TINY = [
    *("width=4", "n_blocks=2", "side=32", "hidden=8", "batch_size=8", "epochs=2", "average_epochs=0.5"),
    *("n_splits=3", "tta=4", "precision=fp32"),
]


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


Call = Callable[..., str]
Pcam = Callable[..., Outcome]


def write_tif(path: Path, patch: NDArray[np.uint8]) -> None:
    Image.fromarray(patch).save(path)


def sha1(patch: NDArray[np.uint8]) -> str:
    return hashlib.sha1(patch.tobytes(), usedforsecurity=False).hexdigest()


def first_tif(data: Data, split: str = "train") -> Path:
    return min(data.patches(split).glob("*.tif"))


@contextlib.contextmanager
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Make standard error a terminal of 80 columns; what it has shown is appended to the list at the end."""
    shown: list[str] = []
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with os.fdopen(end, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        yield shown
    # Once everything is read, a terminal without a writer is an error.
    content = b""
    with os.fdopen(terminal, "rb", buffering=0) as file, contextlib.suppress(OSError):
        while piece := file.read(1 << 12):
            content += piece
    shown.append(content.decode())


class Others:
    """Twelve held-out patches: a folder of TIFs and a CSV beside it; `options` of `evaluate` name them."""

    def __init__(self, root: Path, names: list[str] | None = None) -> None:
        self.patches, self.labels = root / "patches", root / "labels.csv"
        self.patches.mkdir(parents=True)
        rng = np.random.default_rng(7)
        made = [rng.integers(0, 200 if number % 2 else 256, (96, 96, 3), dtype=np.uint8) for number in range(12)]
        self.table = pd.DataFrame({"id": names or [sha1(patch) for patch in made], "label": [n % 2 for n in range(12)]})
        for name, patch in zip(self.table["id"], made, strict=True):
            write_tif(self.patches / f"{name}.tif", patch)
        self.save()

    def save(self) -> None:
        self.table.to_csv(self.labels, index=False)

    @property
    def options(self) -> list[str]:
        return ["--patches", str(self.patches), "--labels", str(self.labels)]


def run_tiny(data: Data, work: Path, command: str, *arguments: str) -> int:
    fields = [part for field in TINY for part in ("--set", field)]
    return main([command, "--data", str(data.root), "--work", str(work), *fields, *arguments])


def run_quietly(data: Data, work: Path, *arguments: str) -> None:
    """Run the pipeline as `run_tiny` does, for fixtures that outlive a test and can't use capsys."""
    with contextlib.redirect_stdout(io.StringIO()):
        assert run_tiny(data, work, "pipeline", *arguments) == 0


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Return the patches of `data`, which no test may change, as the workspace of `finished_run`."""
    made = Data(tmp_path_factory.mktemp("shared") / "data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 36), ("test", 7)):
        made.patches(split).mkdir(parents=True)
        rows = []
        for number in range(count):
            label = number % 3 == 0
            patch = rng.integers(0, 160 if label else 256, (96, 96, 3), dtype=np.uint8)
            write_tif(made.patches(split) / f"{sha1(patch)}.tif", patch)
            rows.append((sha1(patch), int(label)))
        pd.DataFrame(rows, columns=["id", "label"]).to_csv(made.table(split), index=False)
    return made


@pytest.fixture(scope="session")
def shared_work(shared_data: Data) -> Path:
    work = shared_data.root.with_name("work")
    run_quietly(shared_data, work)
    return work


@pytest.fixture
def package_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Capture what the package logs; a test before may have configured its logger."""
    monkeypatch.setattr(logging.getLogger("pcam_kaggle"), "propagate", True)
    caplog.set_level(logging.DEBUG, logger="pcam_kaggle")
    return caplog


@pytest.fixture
def data(shared_data: Data, tmp_path: Path) -> Data:
    """Return 36 train and 7 test patches whose ids are their SHA-1s; a positive one is darker."""
    return Data(shutil.copytree(shared_data.root, tmp_path / "data"))


@pytest.fixture
def store(data: Data, tmp_path: Path) -> PatchStore:
    prepare(data, tmp_path / "store")
    return PatchStore(tmp_path / "store")


@pytest.fixture
def folds(data: Data, tmp_path: Path) -> Folds:
    return make_folds(read_labels(data.labels), Scheme(3, "stratified"), None, tmp_path / "folds")[0]


@pytest.fixture
def finished_run(data: Data, shared_work: Path, tmp_path: Path) -> Path:
    """Return the workspace of `pcam` after `pcam("pipeline")`: a run of three folds and its submission."""
    return shutil.copytree(shared_work, tmp_path / "work")


@pytest.fixture
def tiny() -> Config:
    return Config().changed(TINY)


@pytest.fixture
def task(store: PatchStore, folds: Folds, tiny: Config, tmp_path: Path) -> Task:
    """Return the task of the run `tmp_path / "run"`, with the tiny config."""
    return Task(Run(tmp_path / "run"), "tiny", tiny, store, folds)


@pytest.fixture
def pcam(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Pcam:
    """Return the command line, working on `data` in the workspace `tmp_path / "work"`, with the tiny config."""

    def call(command: str, *arguments: str) -> Outcome:
        capsys.readouterr()
        status = run_tiny(data, tmp_path / "work", command, *arguments)
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def real() -> Data:
    """Return the real patches in the folder PCAM_DATA, or skip the test."""
    if not REAL_DATA:
        pytest.skip("PCAM_DATA is not set")
    return Data(Path(REAL_DATA))


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kaggle]:
    """Start a server in Kaggle's place and point the client at it; nothing leaves the machine."""
    for name in ("NO_PROXY", "no_proxy", "http_proxy", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setenv("KAGGLE_KEY", SECRET)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with Kaggle() as server:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def session(finished_run: Path, tmp_path: Path) -> Path:
    """Return the folder that a session on Kaggle has saved."""
    return finished_run.rename(tmp_path / "session")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def call(home: Path, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return `kaggle` of the command line in `home`: it returns the output, or the one line of the error if it must fail."""

    def call(*arguments: str, status: int = 0, work: Path = home) -> str:
        capsys.readouterr()
        assert main(["kaggle", *arguments, "--work", str(work)]) == status
        out, err = capsys.readouterr()
        if status != 2:
            return out
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert SECRET not in err
        return err

    return call


@pytest.fixture
def others(tmp_path: Path) -> Others:
    return Others(tmp_path / "others")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    # In a context of its own: a test that undoes its patches does not undo this.
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PCAM_DATA", "PCAM_WORK", "PCAM_DEBUG", "PCAM_DEVICE", "PCAM_WORKERS"):
            patch.delenv(name, raising=False)
        yield
