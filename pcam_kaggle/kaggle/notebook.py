"""The notebook that contains the package."""

import ast
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pcam_kaggle.config.experiments import DEFAULT
from pcam_kaggle.data.atomic_io import write
from pcam_kaggle.kaggle.cells import FOLDERS, INTRODUCTION, PACKAGE_TEXT, SETTINGS_TEXT, STAGES

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
NOTEBOOK = Path("notebooks") / "pcam_submission.ipynb"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in the notebook.

    Attributes:
        experiment: Name of the experiment.
        changes: Assignments (`key=value`) to fields of its config.
        hours: Time after which a session must have ended.
        seeds: Number of seeds to train and to blend.
        internet: Whether the session has internet, so that weights can be downloaded.
    """

    experiment: str = DEFAULT
    changes: tuple[str, ...] = ()
    hours: float = 11.0
    seeds: int = 1
    internet: bool = False


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

    Args:
        settings: The values in its settings cell.
        mark: Text by which the version is found on Kaggle, which its settings cell then shows as a comment.
    """
    stages = "\n".join(code for _, _, code in STAGES)
    modules = required_modules(imported_modules(re.sub(r"^%.*$", "", stages, flags=re.MULTILINE)))
    folders = sorted({name.rpartition(".")[0] for name in modules})
    modules = ["__init__", *(f"{folder}.__init__" for folder in folders), *modules]
    assigned = [f"{key.upper()} = {_literal(value)}" for key, value in asdict(settings).items()]
    assigned += [f"# {mark}"] if mark else []
    cells = [
        new_markdown_cell(INTRODUCTION.strip(), id="introduction"),
        new_markdown_cell(SETTINGS_TEXT.strip(), id="settings-text"),
        new_code_cell("\n".join(assigned), id="settings"),
        new_markdown_cell(PACKAGE_TEXT.strip(), id="package"),
        new_code_cell(FOLDERS.format(folders=json.dumps(folders)).strip(), id="folders"),
    ]
    for name in modules:
        source = f"%%writefile {Path('pcam_kaggle') / _path(name)}\n{_source(name)}".rstrip("\n")
        cells.append(new_code_cell(source, id=f"file-{name.replace('.', '-')}", metadata={"_kg_hide-input": True}))
    for name, text, code in STAGES:
        cells += [new_markdown_cell(text.strip(), id=f"{name}-text"), new_code_cell(code.strip(), id=name)]
    language = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    made = new_notebook(cells=cells, metadata=language | {"language_info": {"name": "python"}})
    return (nbformat.writes(made) + "\n").encode()


def build(root: Path) -> Path:
    """Write the notebook into the repository at `root` and return its file."""
    write(root / NOTEBOOK, lambda file: file.write(notebook()))
    return root / NOTEBOOK


def _literal(value: object) -> str:
    """Return `value` as Python source; a tuple becomes a list."""
    return json.dumps(value) if not isinstance(value, bool) else str(value)
