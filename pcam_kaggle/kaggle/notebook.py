"""The notebook that contains the package: the cells of notebooks/kernel.py with settings and the package's files inserted."""

import ast
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcam_kaggle.core.experiments import DEFAULT
from pcam_kaggle.core.files import write

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
CELLS = ROOT / "notebooks" / "kernel.py"
NOTEBOOK = Path("notebooks") / "pcam_submission.ipynb"
# The id of a cell, whether it is text, and its content.
CELL = re.compile(r"^# %% ([a-z-]+)( \[markdown\])?$(.*?)(?=^# %% |\Z)", re.MULTILINE | re.DOTALL)
# Kaggle's editor, JupyterLab and exporters that remove cells by tag fold these cells. Kaggle needs the underscore.
FOLDED = {
    "_kg_hide-input": True,
    "_kg_hide-output": True,
    "jupyter": {"source_hidden": True, "outputs_hidden": True},
    "tags": ["package"],
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in the notebook; notebooks/kernel.py says what they mean."""

    experiment: str = DEFAULT
    changes: tuple[str, ...] = ()
    hours: float = 11.0
    seeds: int = 1
    internet: bool = False

    def inserted(self, code: str) -> str:
        """Return `code`, the cell of settings in notebooks/kernel.py, with these values."""
        values = {name: json.dumps(value, ensure_ascii=False) for name, value in asdict(self).items()}
        values["internet"] = str(self.internet)
        lines = []
        for line in code.splitlines():
            target = line.partition(" = ")[0]
            name = target.partition(":")[0].lower()
            lines.append(f"{target} = {values[name]}" if name in values else line)
        return "\n".join(lines)


def required_modules(names: set[str]) -> list[str]:
    """Return the modules called `names` (dotted, below the package) and all that they import, each after those it imports."""
    found: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in found:
            for other in sorted(imported_modules(_source(name))):
                visit(other)
            found[name] = None

    for name in sorted(names):
        visit(name)
    return list(found)


def imported_modules(source: str) -> set[str]:
    """Return the dotted names, below the package, of the modules that Python `source` imports, also inside of functions."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    named = [(node.module or "", alias.name) for node in nodes for alias in node.names]
    found = {part for module, name in named for part in (module, f"{module}.{name}")}
    below = {name.removeprefix("pcam_kaggle.") for name in found if name.startswith("pcam_kaggle.")}
    return {name for name in below if (PACKAGE / _path(name)).is_file()}


def _path(module: str) -> Path:
    return Path(f"{module.replace('.', '/')}.py")


def _source(module: str) -> str:
    return (PACKAGE / _path(module)).read_text(encoding="utf-8")


def notebook(settings: Settings = Settings(), mark: str = "") -> bytes:
    """Return the notebook with `settings`, as UTF-8 JSON; the same package gives the same bytes.

    `mark` is a text by which the version is found on Kaggle, which the cell of settings then shows as a comment.
    """
    source = CELLS.read_text(encoding="utf-8")
    cells = []
    for name, kind, text in re.findall(CELL, source):
        if kind:
            cells.append(_cell("markdown", name, re.sub(r"^# ?", "", text.strip(), flags=re.MULTILINE)))
        elif name == "settings":
            cells.append(_cell("code", name, settings.inserted(text.strip()) + (f"\n# {mark}" if mark else "")))
        else:
            # A magic is a comment there.
            cells.append(_cell("code", name, re.sub(r"^# (?=%)", "", text.strip(), flags=re.MULTILINE)))
        if name == "package":
            # JupyterLab folds the section of such a heading.
            cells[-1]["metadata"] = {"jp-MarkdownHeadingCollapsed": True}
            cells += _package_cells(required_modules(imported_modules(source)))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return (json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _package_cells(modules: list[str]) -> list[dict[str, Any]]:
    """Return the cells that write the files of `modules`."""
    folders = sorted({name.rpartition(".")[0] for name in modules})
    make = f"""from pathlib import Path

for folder in {json.dumps(folders)}:
    Path("pcam_kaggle", folder).mkdir(parents=True, exist_ok=True)"""
    cells = [_cell("code", "folders", make, FOLDED)]
    for name in ["__init__", *(f"{folder}.__init__" for folder in folders), *modules]:
        code = f"%%writefile {Path('pcam_kaggle') / _path(name)}\n{_source(name)}".rstrip("\n")
        cells.append(_cell("code", f"file-{name.replace('.', '-')}", code, FOLDED))
    return cells


def _cell(kind: str, name: str, source: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    cell = {"cell_type": kind, "id": name, "metadata": metadata or {}, "source": source.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def build(root: Path) -> Path:
    """Write the notebook into the repository at `root` and return its file."""
    write(root / NOTEBOOK, lambda file: file.write(notebook()))
    return root / NOTEBOOK
