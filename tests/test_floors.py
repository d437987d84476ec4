"""Imports go down: a room knows only rooms on lower floors."""

from pathlib import Path

import pcam_kaggle
from pcam_kaggle.kernel import imported

FLOORS = (
    "errors",
    "artifacts budget config device duplicates environment metrics p4m paths provenance saliency scalars stain svg tta world",
    "augment blocks checkpoint curves experiments kaggle ledger listing store synthetic tables",
    "engine figures folds kernel model patches",
    "resampling",
    "backbones blend compare runs submission",
    "scoreboard train transfer",
    "job mistakes predict",
    "report",
    "pipeline",
    "commands",
    "cli",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
ROOMS = {path.stem: path for path in Path(pcam_kaggle.__file__).parent.glob("*.py") if path.stem != "__init__"}


def test_every_room_has_one_floor() -> None:
    assert sorted(FLOOR) == sorted(ROOMS)
    assert sum(len(rooms.split()) for rooms in FLOORS) == len(FLOOR)


def test_imports_go_down() -> None:
    upward = {
        (room, other) for room, path in ROOMS.items() for other in imported(path.read_text()) if FLOOR[other] >= FLOOR[room]
    }
    assert not upward


def test_ground_floor_stands_alone() -> None:
    ground = FLOORS[1].split()
    assert all(imported(ROOMS[room].read_text()) <= {"errors"} for room in ground)


def test_argparse_stays_in_the_command_line() -> None:
    assert [room for room, path in ROOMS.items() if "ArgumentParser" in path.read_text()] == ["cli"]
