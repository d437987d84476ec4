"""Inputs as a disk, a transfer or a hand may change them: one line, or the result of the input as it was."""

from pathlib import Path

from benchmarks.fuzz import TARGETS, fuzz


def test_a_mutated_input_is_one_line_or_changes_nothing(tmp_path: Path) -> None:
    assert len(list(fuzz(tmp_path, 6 * len(TARGETS)))) == 6 * len(TARGETS)
