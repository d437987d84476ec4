"""A run that is killed goes on, and ends in the same bytes."""

from pathlib import Path

from benchmarks.torture import torture
from pcam_kaggle.pipeline.stages import STAGES


def test_a_kill_in_any_stage_changes_nothing(tmp_path: Path) -> None:
    assert len(list(torture(tmp_path, len(STAGES)))) == len(STAGES)
