"""Files and folders are replaced atomically, foreign files are left alone, and writers wait for one another."""

import errno
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import Outcome, first_tif, sha1

from pcam_kaggle.core import files
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.files import locked
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.data.prepare import prepare
from pcam_kaggle.data.store import PatchStore


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_a_file_system_without_locks_is_refused(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcam_kaggle.core.files.FileLock.acquire", Mock(side_effect=error))
    with (
        pytest.raises(UserError, match=rf"store: can't be locked \(.*{error.args[-1]}\); use another"),
        locked(tmp_path / "store"),
    ):
        pass


RUN = "runs/bottleneck"
WRITES_IN = {"folds": "folds", "train": RUN, "predict": RUN, "blend": RUN, "submission": "submissions"}


@pytest.mark.parametrize("stage", WRITES_IN)
def test_every_writer_holds_the_lock(
    stage: str, pcam: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partial file of another process survives, since no stage writes there until the other process ends."""
    work = tmp_path / "work"
    stages = ["prepare", *WRITES_IN]
    for before in stages[: stages.index(stage)]:
        assert pcam(before).status == 0
    # `train` has predicted, too.
    for record in work.glob(f"{RUN}/fold_*/predictions.json") if stage == "predict" else ():
        record.unlink()
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.2)
    with locked(work / WRITES_IN[stage]):
        partial = work / WRITES_IN[stage] / f".oof.csv.x{files.PART}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        outcome = pcam(stage)
        assert outcome.status == 2
        assert "another process is writing there" in outcome.err
        assert partial.exists()
    assert pcam(stage).status == 0
    assert not partial.exists()


@pytest.mark.parametrize("make", [prepare, lambda _, folder: make_demo(Data(folder))])
def test_what_somebody_else_made_is_refused_by_name(make: Callable, data: Data, tmp_path: Path) -> None:
    folder, file, link = (tmp_path / name for name in ("folder", "file", "link"))
    folder.mkdir()
    (folder / "thesis.tex").write_text("ten years of work")
    (folder / "manifest.json").write_text('{"name": "something else"}')
    file.write_text("mine")
    link.symlink_to("nowhere")
    kept = {path: path.read_bytes() for path in (*folder.iterdir(), file)}
    for target in (folder, file, link):
        with pytest.raises(UserError, match=f"{target}: exists and was not made by this program"):
            make(data, target)
    assert {path: path.read_bytes() for path in (*folder.iterdir(), file)} == kept


def test_an_empty_folder_a_damaged_store_and_leftovers_are_replaced(data: Data, tmp_path: Path) -> None:
    target = tmp_path / "store"
    target.mkdir()
    made, _ = prepare(data, target)
    (target / "index.csv").write_text("id\n")
    (target / "patches.npy").unlink()
    assert prepare(data, target) == (made, True)
    target.rename(tmp_path / ".store.old.part")
    (tmp_path / ".store.old.part" / "manifest.json").unlink()
    (tmp_path / ".store.part").mkdir()
    (tmp_path / ".store.part" / "patches.npy").write_bytes(b"half")
    assert prepare(data, target) == (made, True)
    assert not list(tmp_path.glob(".store*.part"))


def test_of_two_processes_that_need_the_demo_one_draws_it(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        drawn = list(pool.map(make_demo, [Data(tmp_path / "data")] * 2))
    assert sorted(drawn) == [False, True]


PACK_SLOWLY = """
import sys, time
from pathlib import Path
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data import prepare as patches
def slow(*arguments):
    print("started", flush=True)
    time.sleep(60)
patches._pack_chunk = slow
patches.prepare(Data(Path(sys.argv[1])), Path(sys.argv[2]))
"""
TRAIN_SLOWLY = """
from pcam_kaggle.training.gpus import run_on_gpus
run_on_gpus(exec, ["import time; print('started', flush=True); time.sleep(60)"] * 2)
"""


@pytest.mark.parametrize("code", [PACK_SLOWLY, pytest.param(TRAIN_SLOWLY, marks=pytest.mark.slow)], ids=["prepare", "train"])
def test_child_processes_end_with_a_killed_parent_and_free_the_store(code: str, data: Data, tmp_path: Path) -> None:
    line = [sys.executable, "-c", code, str(data.root), str(tmp_path / "store")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        process.kill()
        # The pipe is closed when the last child has ended.
        process.communicate(timeout=50)
    assert prepare(data, tmp_path / "store")[1]


def test_a_worker_never_reads_another_store(data: Data, store: PatchStore) -> None:
    ids = store.ids("train")
    rows, sent = store.rows("train", ids), pickle.dumps(store)
    assert np.array_equal(pickle.loads(sent).images(rows), store.images(rows))  # noqa: S301
    os.utime(first_tif(data), (1, 1))
    assert prepare(data, store.folder)[1]
    with pytest.raises(UserError, match="replaced while it was in use"):
        pickle.loads(sent).images(rows)  # noqa: S301
    # Who had opened it before still reads the old file.
    assert [sha1(patch) for patch in store.images(rows)] == list(ids)
