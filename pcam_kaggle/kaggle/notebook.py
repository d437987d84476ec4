"""The notebook that contains the package."""

import ast
import json
import re
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pcam_kaggle.core.experiments import DEFAULT, DEMO, EXPERIMENTS
from pcam_kaggle.core.files import write
from pcam_kaggle.kaggle.cells import CHECK, CHECK_TEXT, FOLDERS, INTRODUCTION, PACKAGE_TEXT, SETTINGS_TEXT, STAGES

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
NOTEBOOK = Path("notebooks") / "pcam_submission.ipynb"
# Characters that a phone shows of a line of code.
COMMENT_WIDTH = 41


_WITH_WEIGHTS = [name for name, each in EXPERIMENTS.items() if each.members or each.config.weights]
_EXPERIMENTS = ", ".join(name for name in EXPERIMENTS if name not in (DEMO, *_WITH_WEIGHTS))
_EXPERIMENTS += f"; with attached weights: {', '.join(_WITH_WEIGHTS)}"
# Kaggle's editor, JupyterLab and exporters that remove cells by tag fold these cells. Kaggle needs the underscore.
FOLDED = {
    "_kg_hide-input": True,
    "_kg_hide-output": True,
    "jupyter": {"source_hidden": True, "outputs_hidden": True},
    "tags": ["package"],
}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in the notebook: each field with the comment above it."""

    experiment: Annotated[str, _EXPERIMENTS] = DEFAULT
    changes: Annotated[tuple[str, ...], 'fields of its config, such as ["epochs=10", "batch_size=64"]; none for blend'] = ()
    hours: Annotated[float, "longest duration of the session; Kaggle allows 12"] = 11.0
    seeds: Annotated[int, "number of seeds to train and to blend, from 1; 1 for blend"] = 1
    internet: Annotated[bool, "True if the session has internet, to download weights"] = False

    def code(self) -> str:
        """Return the code of the settings cell."""
        comments = {name: hint.__metadata__[0] for name, hint in get_type_hints(Settings, include_extras=True).items()}
        lines = []
        for key, value in asdict(self).items():
            lines += [*textwrap.wrap(comments[key], COMMENT_WIDTH, initial_indent="# ", subsequent_indent="# ")]
            lines += [f"{key.upper()} = {_literal(value)}", ""]
        return "\n".join(lines[:-1])


def _literal(value: Any) -> str:
    """Return `value` as Python with double quotes."""
    return repr(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


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
    cells = [
        new_markdown_cell(INTRODUCTION.format(contents=_contents()).strip(), id="introduction"),
        new_markdown_cell(CHECK_TEXT.strip(), id="check-text"),
        new_code_cell(CHECK.strip(), id="check"),
        new_markdown_cell(SETTINGS_TEXT.strip(), id="settings-text"),
        new_code_cell("\n".join([settings.code(), *([f"# {mark}"] if mark else [])]), id="settings"),
        # JupyterLab folds the section of such a heading.
        new_markdown_cell(PACKAGE_TEXT.strip(), id="package", metadata={"jp-MarkdownHeadingCollapsed": True}),
        new_code_cell(FOLDERS.format(folders=json.dumps(folders)).strip(), id="folders", metadata=FOLDED),
    ]
    for name in modules:
        source = f"%%writefile {Path('pcam_kaggle') / _path(name)}\n{_source(name)}".rstrip("\n")
        cells.append(new_code_cell(source, id=f"file-{name.replace('.', '-')}", metadata=FOLDED))
    for name, text, code in STAGES:
        cells += [new_markdown_cell(text.strip(), id=f"{name}-text")] if text else []
        cells.append(new_code_cell(code.strip(), id=name))
    language = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    made = new_notebook(cells=cells, metadata=language | {"language_info": {"name": "python"}})
    return (nbformat.writes(made) + "\n").encode()


def _contents() -> str:
    """Return a list of links to the headings.

    On Kaggle, in JupyterLab and in nbconvert's HTML, the anchor of a heading is its text with dashes for spaces.
    """
    texts = "".join([CHECK_TEXT, SETTINGS_TEXT, PACKAGE_TEXT, *(text for _, text, _ in STAGES)])
    headings = re.findall(r"^## (.+)$", texts, flags=re.MULTILINE)
    return "\n".join(f"- [{heading}](#{heading.replace(' ', '-')})" for heading in headings)


def build(root: Path) -> Path:
    """Write the notebook into the repository at `root` and return its file."""
    write(root / NOTEBOOK, lambda file: file.write(notebook()))
    return root / NOTEBOOK
