"""Notebooks are stored without outputs, and run from top to bottom."""

from pathlib import Path

import nbformat
import pytest
from conftest import Pcam
from nbclient import NotebookClient

from pcam_kaggle.core.paths import Data

FOLDER = Path(__file__).parent.parent / "notebooks"


def executed(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(FOLDER / name, as_version=4)
    NotebookClient(notebook, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return notebook


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_output_is_kept(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.slow
def test_runs_are_inspected_and_compared(pcam: Pcam, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCAM_WORK", str(finished_run))
    notebook = executed("inspect_run.ipynb")
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output["data"]["text/html"].count("<figure") for output in outputs if "data" in output]
    assert [count for count in pictures if count] == [16, 4, 16]
    assert [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"] == []

    assert pcam("pipeline", "--set", "seed=1", "--name", "other").status == 0
    text = str([cell.get("outputs") for cell in executed("compare.ipynb").cells])
    assert "other" in text
    assert "difference" in text


@pytest.mark.slow
def test_the_exploration_runs_and_names_what_is_damaged(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = min(data.patches("train").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:1000])
    monkeypatch.setenv("PCAM_DATA", str(data.root))
    notebook = executed("explore.ipynb")
    outputs = {cell.id: str(cell.get("outputs", "")) for cell in notebook.cells}
    assert damaged.stem in outputs["damaged"]
    assert "36 labelled patches" in outputs["imports"]
    assert all(kind in outputs[name] for name, kind in (("patches", "image/jpeg"), ("stain", "image/png")))
