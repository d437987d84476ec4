"""Damaged input files end in a one-line error, or in the result of the undamaged input."""

from pathlib import Path

import pytest

from benchmarks.fuzz import TARGETS, fuzz


@pytest.mark.slow
def test_a_mutated_input_is_one_line_or_changes_nothing(tmp_path: Path) -> None:
    assert len(list(fuzz(tmp_path, 6 * len(TARGETS)))) == 6 * len(TARGETS)
