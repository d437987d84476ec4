"""Killed runs resume bit-identically; damaged files end in a one-line error or change nothing."""

from pathlib import Path

import pytest

from benchmarks.stress import TARGETS, damages, kills
from pcam_kaggle.pipeline.stages import STAGES


@pytest.mark.slow
def test_a_kill_in_any_stage_changes_nothing(tmp_path: Path) -> None:
    assert len(list(kills(tmp_path, len(STAGES)))) == len(STAGES)


@pytest.mark.slow
def test_a_damaged_file_is_one_line_or_changes_nothing(tmp_path: Path) -> None:
    assert len(list(damages(tmp_path, 6 * len(TARGETS)))) == 6 * len(TARGETS)
