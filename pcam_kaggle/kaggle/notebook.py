"""The notebook that contains the package: the cells of notebooks/kernel.py with settings and the package's files inserted."""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcam_kaggle.core.experiments import DEFAULT

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
CELLS = ROOT / "notebooks" / "kernel.py"
NOTEBOOK = Path("notebooks") / "pcam_submission.ipynb"
MARK_FILE = "mark.txt"
# The id of a cell, whether it is text, and its content.
CELL = re.compile(r"^# %% ([a-z-]+)( \[markdown\])?$(.*?)(?=^# %% |\Z)", re.MULTILINE | re.DOTALL)
# Kaggle's editor, JupyterLab and exporters that remove cells by tag fold these cells. Kaggle needs the underscore.
FOLDED = {
    "_kg_hide-input": True,
    "_kg_hide-output": True,
    "jupyter": {"source_hidden": True, "outputs_hidden": True},
    "tags": ["package"],
}
# What Kaggle reads of a notebook that is uploaded by hand; the numbers are those of the competition and of its files.
SOURCE = {"sourceId": 11848, "databundleVersionId": 862157, "sourceType": "competition"}
UPLOADED = {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True, "isInternetEnabled": True, "dataSources": [SOURCE]}
UPLOADED |= {"language": "python", "sourceType": "notebook"}


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings in the notebook; notebooks/kernel.py says what they mean."""

    experiment: str = DEFAULT
    changes: tuple[str, ...] = ()
    hours: float = 11.0
    seeds: int = 1
    slides: str = ""
    allow_cpu: bool = False
    name: str = ""
    mark: str = ""

    def inserted(self, code: str) -> str:
        """Return `code`, the cell of settings in notebooks/kernel.py, with these values."""
        values = {name: json.dumps(value, ensure_ascii=False) for name, value in asdict(self).items()}
        values["allow_cpu"] = str(self.allow_cpu)
        return re.sub(r"^(([A-Z_]+).*) = .*$", lambda line: f"{line[1]} = {values[line[2].lower()]}", code, flags=re.MULTILINE)


def notebook(settings: Settings = Settings(), kaggle: dict[str, Any] = UPLOADED) -> bytes:
    """Return the notebook with `settings` and the metadata `kaggle`, as UTF-8 JSON."""
    cells = []
    for name, kind, text in re.findall(CELL, CELLS.read_text(encoding="utf-8")):
        if kind:
            cells.append(_cell("markdown", name, re.sub(r"^# ?", "", text, flags=re.MULTILINE)))
        elif name == "settings":
            cells.append(_cell("code", name, settings.inserted(text)))
        else:
            # A magic is a comment there.
            cells.append(_cell("code", name, re.sub(r"^# (?=%)", "", text, flags=re.MULTILINE)))
        if name == "package":
            # JupyterLab folds the section of such a heading.
            cells[-1]["metadata"] = {"jp-MarkdownHeadingCollapsed": True}
            cells += _package_cells()
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}} | ({"kaggle": kaggle} if kaggle else {})
    content = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return (json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def _package_cells() -> list[dict[str, Any]]:
    folders = sorted({file.parent.name for file in PACKAGE.glob("*/__init__.py")} - {"cli", "kaggle"})
    make = f"""from pathlib import Path

for folder in {json.dumps(folders)}:
    Path("pcam_kaggle", folder).mkdir(parents=True, exist_ok=True)"""
    cells = [_cell("code", "folders", make, FOLDED)]
    files = (file for folder in folders for file in sorted(PACKAGE.joinpath(folder).iterdir()))
    for file in [PACKAGE / "__init__.py", *(file for file in files if file.suffix in (".py", ".html"))]:
        code = f"%%writefile {file.relative_to(ROOT)}\n{file.read_text(encoding='utf-8')}"
        name = "-".join(file.relative_to(PACKAGE).parts).removesuffix(".py").replace(".", "-")
        cells.append(_cell("code", f"file-{name}", code, FOLDED))
    return cells


def _cell(kind: str, name: str, source: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    cell = {"cell_type": kind, "id": name, "metadata": metadata or {}, "source": source.strip().splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})
