"""Child processes that are started anew, the default from Python 3.14 on, give the bytes of those that are forked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY

import pcam_kaggle
from pcam_kaggle.core.paths import Data

CODE = """
import multiprocessing, sys
from pcam_kaggle.cli.main import main
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_run_has_the_same_bytes(method: str, shared_data: Data, shared_work: Path, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(CODE)
    changes = [part for field in TINY for part in ("--set", field)]
    options = ["--data", str(shared_data.root), "--work", str(tmp_path / "work"), "--folds", "0", *changes]
    environment = {**os.environ, "PYTHONPATH": str(Path(pcam_kaggle.__file__).parent.parent)}
    line = [sys.executable, str(tmp_path / "run.py"), method, "pipeline", *options]
    done = subprocess.run(line, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    fold = Path("runs/bottleneck/fold_0")
    for name in ("store/patches.npy", "store/index.csv", fold / "best.pt", fold / "oof.csv", fold / "test.csv"):
        assert (tmp_path / "work" / name).read_bytes() == (shared_work / name).read_bytes(), name
