"""A killed run resumes and is bit-identical to an uninterrupted one."""

from pathlib import Path

import pytest
from conftest import REAL_DATA

from benchmarks.torture import torture
from pcam_kaggle.pipeline.stages import STAGES


@pytest.mark.slow
def test_a_kill_in_any_stage_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if REAL_DATA:
        monkeypatch.setenv("PCAM_DATA", REAL_DATA)
    assert len(list(torture(tmp_path, len(STAGES)))) == len(STAGES)
