"""Folds over GPUs: each on one, so that all end at about the same time."""

import multiprocessing
from functools import partial
from pathlib import Path

import pytest

from pcam_kaggle.training.gpus import run_on_gpus, spread


@pytest.mark.parametrize(
    ("left", "gpus", "expected"),
    [
        (dict.fromkeys(range(5), 32), 2, [[0, 2, 4], [1, 3]]),
        ({0: 2, 1: 8, 2: 3, 3: 3}, 2, [[1], [0, 2, 3]]),
        ({3: 0}, 4, [[3]]),
        ({1: 5, 0: 5}, 0, [[1, 0]]),
    ],
)
def test_the_longest_queue_of_a_gpu_is_short(
    left: dict[int, int], gpus: int, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert spread(left) == expected


def _note_start_method(folder: Path, items: list[int]) -> None:
    (folder / str(items[0])).write_text(multiprocessing.get_start_method())


def test_loaders_of_a_gpus_process_start_as_those_of_this_process(tmp_path: Path) -> None:
    run_on_gpus(partial(_note_start_method, tmp_path), [[0], [1]])
    assert {file.read_text() for file in tmp_path.iterdir()} == {multiprocessing.get_start_method()}
