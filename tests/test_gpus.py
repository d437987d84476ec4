"""Folds over GPUs: every epoch once, in order, none at the same time as another of its fold, and all GPUs end together."""

import itertools
import math
import multiprocessing
from functools import partial
from pathlib import Path

import pytest

from pcam_kaggle.training.gpus import assign_epochs, run_on_gpus

CASES = [
    (dict.fromkeys(range(5), 0), 32, 2),
    (dict.fromkeys(range(3), 0), 1, 2),
    (dict.fromkeys(range(3), 0), 2, 2),
    ({0: 0}, 8, 4),
    ({0: 8, 1: 8}, 8, 2),
    ({0: 5, 2: 0, 4: 8}, 8, 2),
    ({3: 7, 1: 2, 0: 0, 2: 4}, 9, 3),
    ({fold: fold for fold in range(10)}, 10, 4),
    (dict.fromkeys(range(5), 0), 3, 8),
]


@pytest.mark.parametrize(("done", "epochs", "gpus"), CASES)
def test_every_epoch_is_trained_once_and_gpus_end_together(done: dict[int, int], epochs: int, gpus: int) -> None:
    assignments = assign_epochs(done, epochs, gpus)
    assert len(assignments) <= gpus
    assert all(assignments)
    left = {fold: epochs - finished for fold, finished in done.items()}
    limit = max(math.ceil(sum(left.values()) / gpus), *left.values())
    trained: dict[int, list[tuple[int, int, int, int]]] = {fold: [] for fold in done}
    for assignment in assignments:
        clock = 0
        for segment in assignment:
            count = segment.until - segment.start
            trained[segment.fold].append((clock, clock + count, segment.start, segment.until))
            clock += count
        assert clock <= limit
    for fold, parts in trained.items():
        parts.sort()
        assert (parts[0][2], parts[-1][3]) == (done[fold], epochs)
        for before, after in itertools.pairwise(parts):
            # The next epochs begin when those before them have ended, on another GPU.
            assert before[1] <= after[0]
            assert before[3] == after[2]
    split = {segment.fold for assignment in assignments for segment in assignment if segment.is_split}
    assert split == {fold for fold, parts in trained.items() if len(parts) > 1}


def _note_start_method(folder: Path, items: list[int]) -> None:
    (folder / str(items[0])).write_text(multiprocessing.get_start_method())


@pytest.mark.slow
def test_loaders_of_a_gpus_process_start_as_those_of_this_process(tmp_path: Path) -> None:
    run_on_gpus(partial(_note_start_method, tmp_path), [[0], [1]])
    assert {file.read_text() for file in tmp_path.iterdir()} == {multiprocessing.get_start_method()}
