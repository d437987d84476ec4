"""The sub-packages import each other only as listed, and one of them knows the files of a run."""

import ast
from pathlib import Path

import pytest

import pcam_kaggle

PACKAGE = Path(pcam_kaggle.__file__).parent
# The cells of the notebook count as a sub-package.
KERNEL = PACKAGE.parent / "notebooks" / "kernel.py"
ARROWS = {
    "core": set(),
    "data": {"core"},
    "models": {"core"},
    "scoring": {"core"},
    "runs": {"core", "data", "scoring"},
    "training": {"core", "data", "models", "runs", "scoring"},
    "pipeline": {"core", "data", "runs", "scoring", "training"},
    "report": {"core", "data", "runs", "scoring", "training"},
    "kaggle": {"core", "runs"},
    "cli": {"core", "kaggle", "pipeline", "report", "runs", "scoring"},
    "kernel": {"core", "pipeline", "report"},
    "__main__": {"core", "cli"},
}
RUN_FILES = (
    *("metrics.json", "log.csv", "predictions.json", "best.pt", "last.pt", "oof.csv", "test.csv"),
    *("environment.json", "teacher.json"),
)
SOURCES = {path.relative_to(PACKAGE): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}


def imported(source: str) -> set[str]:
    """Return the sub-packages that Python `source` imports, also inside of functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pcam_kaggle."):
            names.add((node.module or "").split(".")[1])
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("pcam_kaggle")}
    return names


@pytest.mark.parametrize("name", ARROWS)
def test_a_sub_package_imports_what_is_listed(name: str) -> None:
    own = [source for path, source in SOURCES.items() if path.parts[0].removesuffix(".py") == name]
    sources = [KERNEL.read_text(encoding="utf-8")] if name == "kernel" else own
    assert sources
    assert set().union(*map(imported, sources)) - {name} == ARROWS[name]


def test_the_list_is_short_and_names_every_sub_package() -> None:
    assert sum(map(len, ARROWS.values())) - len(ARROWS["__main__"]) <= 32
    assert {path.parts[0].removesuffix(".py") for path in SOURCES} - {"__init__"} == ARROWS.keys() - {"kernel"}


def test_tables_of_ids_are_read_as_text_by_one_function() -> None:
    others = {path: path.read_text(encoding="utf-8") for path in (PACKAGE.parent / "benchmarks").glob("*.py")}
    readers = sorted(str(path) for path, source in (SOURCES | others).items() if "read_csv(" in source)
    # A log has no ids.
    assert readers == ["data/tables.py", "runs/fold.py"]


def test_one_function_names_the_program_in_messages() -> None:
    assert [str(path) for path, source in SOURCES.items() if "python -m pcam" in source] == ["__main__.py", "core/errors.py"]


def test_only_runs_spells_the_names_of_files_in_a_run_folder() -> None:
    literals = ('/ f"fold_', *(f'"{name}"' for name in RUN_FILES))
    others = {path: source for path, source in SOURCES.items() if path.parts[0] != "runs"}
    assert not [(str(path), literal) for path, source in others.items() for literal in literals if literal in source]
