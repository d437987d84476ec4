"""Imports between the sub-packages point one way, and one sub-package knows the files of a run."""

from pathlib import Path

import pytest

import pcam_kaggle
from pcam_kaggle.kaggle.notebook import imported_modules

PACKAGE = Path(pcam_kaggle.__file__).parent
LAYERS = ("core", "data", "models", "runs", "scoring", "training", "kaggle", "report", "pipeline", "cli", "__main__")
LAYER = {name: number for number, name in enumerate(LAYERS)}
RUN_FILES = (
    *("metrics.json", "log.csv", "predictions.json", "best.pt", "last.pt", "oof.csv", "test.csv"),
    *("environment.json", "teacher.json"),
)


@pytest.mark.parametrize("name", LAYER)
def test_imports_point_down(name: str) -> None:
    files = [PACKAGE / f"{name}.py"] if name == "__main__" else list((PACKAGE / name).glob("*.py"))
    assert files
    used = {module.partition(".")[0] for file in files for module in imported_modules(file.read_text(encoding="utf-8"))}
    assert not [other for other in used - {name} if LAYER[other] >= LAYER[name]]


def test_every_entry_of_the_package_has_a_layer() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.name not in ("__init__.py", "__pycache__")}
    assert entries == set(LAYER)


def test_only_runs_spells_the_names_of_files_in_a_run_folder() -> None:
    literals = ('/ f"fold_', *(f'"{name}"' for name in RUN_FILES))
    sources = {
        path.relative_to(PACKAGE): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).parts[0] != "runs"
    }
    assert not [(str(path), literal) for path, source in sources.items() for literal in literals if literal in source]
