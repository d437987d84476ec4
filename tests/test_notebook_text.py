"""What the notebook for Kaggle shows before and around the training: contents, settings, folded cells and the package check."""

import ast
import importlib.metadata
import re
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nbformat
import pytest

from pcam_kaggle.core.experiments import DEMO, EXPERIMENTS
from pcam_kaggle.kaggle.notebook import Settings, notebook

ROOT = Path(__file__).parent.parent
# The distributions of imported modules whose names differ.
DISTRIBUTIONS = {"cv2": "opencv", "PIL": "pillow", "sklearn": "scikit-learn", "pydantic_core": "pydantic"}
# Names and versions of Kaggle's image.
IMAGE = {"torch": "2.10.0+cu128", "timm": "1.0.26", "albumentations": "2.0.8", "opencv-python-headless": "4.13.0.92"}
IMAGE |= {"numpy": "2.0.2", "pandas": "2.2.2", "scikit-learn": "1.6.1", "scipy": "1.14.1", "pydantic": "2.12.3"}
IMAGE |= {
    "matplotlib": "3.10.0",
    "pillow": "11.3.0",
    "tqdm": "4.67.1",
    "joblib": "1.5.2",
    "filelock": "3.20.0",
    "psutil": "5.9.5",
    "jinja2": "3.1.6",
}
PINS = [(ROOT / name).read_text().splitlines() for name in ("requirements-kaggle.txt", "requirements-kaggle-next.txt")]
Cells = dict[str, nbformat.NotebookNode]
MonkeyPatch = pytest.MonkeyPatch


def cells_of(settings: Settings) -> Cells:
    return {cell.id: cell for cell in nbformat.reads(notebook(settings).decode(), as_version=4).cells}


@pytest.fixture(scope="module")
def cells() -> Cells:
    return cells_of(Settings())


def check(cells: Cells, installed: dict[str, str], monkeypatch: MonkeyPatch) -> dict[str, Any]:
    """Run the package check where the distributions in `installed` exist, and return its variables."""

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    magic, _, code = cells["check"].source.partition("\n")
    assert magic == "%xmode Minimal"
    variables: dict[str, Any] = {}
    exec(code, variables)  # noqa: S102
    return variables


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ({}, ""),
        *((dict(pin.split("==") for pin in pins), "") for pins in PINS),
        ({"torch": "2.11.0a0+git1234567", "timm": "1.1.0.dev0"}, ""),
        ({"opencv-python-headless": None, "opencv-contrib-python": "5.0.0.93"}, ""),
        ({"numpy": "2.10.0", "pandas": "3.0"}, ""),
        ({"torch": "2.9.1+cu128"}, "torch 2.9.1+cu128 (needed: 2.10)"),
        ({"numpy": "2.0+cpu9"}, "numpy 2.0+cpu9 (needed: 2.0.2)"),
        ({"timm": None}, "timm missing (needed: 1.0.26)"),
        ({"opencv-python-headless": None}, "opencv missing (needed: 4.13)"),
        ({"pandas": "2.2"}, "pandas 2.2 (needed: 2.2.2)"),
        ({"filelock": None, "timm": "1.0.9"}, "timm 1.0.9 (needed: 1.0.26), filelock missing (needed: 3)"),
    ],
)
def test_missing_and_old_packages_are_named_in_one_line(
    change: dict[str, str | None], problems: str, cells: Cells, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = {name: release for name, release in (IMAGE | change).items() if release}
    wanted = f"^{re.escape(problems)}.*Always use latest environment.*$"
    with pytest.raises(RuntimeError, match=wanted) if problems else nullcontext():
        check(cells, installed, monkeypatch)
    printed = f"Python {sys.version.split()[0]}, torch {installed['torch']}; all packages are recent enough\n"
    assert capsys.readouterr().out == ("" if problems else printed)


def test_the_check_covers_what_the_notebook_imports(cells: Cells, monkeypatch: MonkeyPatch) -> None:
    imported = {DISTRIBUTIONS.get(name, name) for name in third_party(list(cells.values()))}
    assert check(cells, IMAGE, monkeypatch)["NEEDED"].keys() == imported
    # The check itself is the first code and needs none of them.
    first = next(cell for cell in cells.values() if cell.cell_type == "code")
    assert first.id == "check"
    assert third_party([first]) == set()


def third_party(cells: list[nbformat.NotebookNode]) -> set[str]:
    """Return the top-level modules that code cells import, apart from the standard library and what every notebook has."""
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    code = "\n".join(source for source in sources if not source.partition("\n")[0].endswith(".html"))
    nodes = list(ast.walk(ast.parse(re.sub(r"^%.*$", "", code, flags=re.MULTILINE))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    found = {name.partition(".")[0] for name in names}
    return found - sys.stdlib_module_names - {"pcam_kaggle", "IPython"}


def test_the_contents_link_to_every_section_in_order(cells: Cells) -> None:
    texts = [cell.source for cell in cells.values() if cell.cell_type == "markdown"]
    headings = re.findall(r"^## (.+)$", "\n".join(texts), flags=re.MULTILINE)
    links = re.findall(r"^- \[(.+)\]\(#(\S+)\)$", texts[0], flags=re.MULTILINE)
    assert [text for text, _ in links] == headings
    assert [anchor for _, anchor in links] == [heading.replace(" ", "-") for heading in headings]
    # Other characters become different anchors in different programs.
    assert all(re.fullmatch(r"[A-Za-z ]+", heading) for heading in headings)
    assert len(set(headings)) == len(headings) > 5


def test_the_packages_cells_are_folded_and_no_others(cells: Cells) -> None:
    folded = {"_kg_hide-input": True, "_kg_hide-output": True, "jupyter": {"source_hidden": True, "outputs_hidden": True}}
    for name, cell in cells.items():
        is_package = name.startswith("file-") or name == "folders"
        assert {key: value for key, value in cell.metadata.items() if key in folded} == (folded if is_package else {})
        assert cell.metadata.get("tags", []) == (["package"] if is_package else [])
    # nbconvert shows folded cells, and gives them the class of their tag.
    assert cells["environment"].source.count(".celltag_package ") == 2
    assert cells["package"].metadata["jp-MarkdownHeadingCollapsed"] is True


def test_settings_are_python_with_a_comment_each() -> None:
    settings = Settings("blend", ('model_args={"a": "é"}', "epochs=3"), 2.5, 3, "them/maps", allow_cpu=True)
    code = cells_of(settings)["settings"].source
    variables: dict[str, Any] = {}
    exec(code, variables)  # noqa: S102
    values = asdict(settings) | {"changes": list(settings.changes)}
    assert {name: variables[name.upper()] for name in values} == values
    blocks = code.split("\n\n")
    assert len(blocks) == len(values)
    for block in blocks:
        *comments, assigned = block.splitlines()
        assert comments
        # As many characters as a phone shows of a line of code.
        assert all(line.startswith("# ") and len(line) <= 41 for line in comments)
        assert re.match(r"[A-Z_]+\b.* = ", assigned)


def test_the_comment_of_the_experiment_names_all_but_the_demo(cells: Cells) -> None:
    # The script has the defaults of the settings.
    assert cells["settings"].source in (ROOT / "notebooks" / "kernel.py").read_text()
    comment = " ".join(line.removeprefix("# ") for line in cells["settings"].source.split("\nEXPERIMENT")[0].splitlines())
    without, _, needs = comment.partition("; with internet or attached weights: ")
    assert {*without.split(", "), *needs.split(", ")} == set(EXPERIMENTS) - {DEMO}
    assert needs == "lite0, pretrained, dinov2, bottleneck_distilled, blend"
