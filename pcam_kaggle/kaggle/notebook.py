"""The Kaggle kernel: a notebook that contains the package, and its metadata."""

import ast
import json
import re
import textwrap
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pcam_kaggle import UserError
from pcam_kaggle.config.experiments import DEFAULT, DEMO, EXPERIMENTS, experiment
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import read_json, write, write_json
from pcam_kaggle.data.layout import COMPETITION
from pcam_kaggle.kaggle.cells import CHECK, CHECK_TEXT, FOLDERS, INTRODUCTION, PACKAGE_TEXT, SETTINGS_TEXT, STAGES

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
NOTEBOOK = Path("notebooks") / "pcam_submission.ipynb"
METADATA = Path("kernel-metadata.json")
MOST_BYTES = 900_000
# Characters that a phone shows of a line of code.
COMMENT_WIDTH = 41
# What the notebook relies on; Kaggle's defaults for missing fields differ.
NEEDED = {
    "code_file": str(NOTEBOOK),
    "language": "python",
    "kernel_type": "notebook",
    "is_private": True,
    "enable_gpu": True,
    "enable_tpu": False,
    "enable_internet": False,
    "machine_shape": "NvidiaTeslaT4",
    "competition_sources": [COMPETITION],
}


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


def notebook(settings: Settings = Settings()) -> bytes:
    """Return the notebook with `settings`, as UTF-8 JSON; the same package gives the same bytes."""
    stages = "\n".join(code for _, _, code in STAGES)
    modules = required_modules(imported_modules(re.sub(r"^%.*$", "", stages, flags=re.MULTILINE)))
    folders = sorted({name.rpartition(".")[0] for name in modules})
    modules = ["__init__", *(f"{folder}.__init__" for folder in folders), *modules]
    cells = [
        new_markdown_cell(INTRODUCTION.format(contents=_contents()).strip(), id="introduction"),
        new_markdown_cell(CHECK_TEXT.strip(), id="check-text"),
        new_code_cell(CHECK.strip(), id="check"),
        new_markdown_cell(SETTINGS_TEXT.strip(), id="settings-text"),
        new_code_cell(settings.code(), id="settings"),
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


def pack(root: Path, owner: str, settings: Settings, resume: bool, folder: Path, weights: str = "") -> str:
    """Write the files that Kaggle's client pushes.

    Args:
        root: The repository.
        owner: User name of the kernel's owner.
        settings: Settings in the notebook.
        resume: Whether to attach the kernel's own last output.
        folder: Where to write the notebook and its metadata.
        weights: Dataset (owner/name) or model (owner/name/framework/variation/version) with the weights to attach and to use;
            empty for those of the experiment.

    Returns:
        The kernel's id, owner/slug.

    Raises:
        UserError: The tracked notebook does not match the package, metadata are missing or not what the notebook needs, the
            title's slug is not the id's, weights are needed and none attached, the notebook is larger than 900 kB, or the
            experiment does not admit the settings. Kaggle itself would accept these and misinterpret them.
    """
    if weights:
        settings = replace(settings, changes=(*settings.changes, f"weights={weights}"))
    file = root / METADATA
    kinds = {key: type(value) for key, value in NEEDED.items()}
    metadata = read_json(file, id=str, title=str, dataset_sources=list, kernel_sources=list, model_sources=list, **kinds)
    if weights:
        key = _source_kind(weights)
        metadata[key] = list(dict.fromkeys([*metadata[key], weights]))
    configs = trained_configs(settings)
    wrong = [f"{key} must be {json.dumps(value)}" for key, value in NEEDED.items() if metadata[key] != value]
    slug = metadata["id"].rpartition("/")[2]
    if slug != slugged(metadata["title"]):
        wrong.append(f"title {metadata['title']!r} must become the id's {slug!r}, not {slugged(metadata['title'])!r}")
    if any(config.weights for config in configs) and not (metadata["dataset_sources"] or metadata["model_sources"]):
        wrong.append(f"{settings.experiment} needs pretrained weights: attach a dataset or model with --weights owner/name")
    if wrong:
        raise UserError(f"{file}: {'; '.join(wrong)}")
    if not (root / NOTEBOOK).is_file() or (root / NOTEBOOK).read_bytes() != notebook():
        raise UserError(f"{root / NOTEBOOK}: does not match the package; run `make kernel`")
    content = notebook(settings)
    if len(content) > MOST_BYTES:
        raise UserError(f"{root / NOTEBOOK}: {len(content):,} bytes, and Kaggle takes about a million; leave modules out")
    name = f"{owner}/{slug}"
    sources = [*metadata["kernel_sources"], *([name] if resume else [])]
    write(folder / NOTEBOOK.name, lambda out: out.write(content))
    write_json(folder / METADATA.name, metadata | {"id": name, "code_file": NOTEBOOK.name, "kernel_sources": sources})
    return name


def trained_configs(settings: Settings) -> list[Config]:
    """Return the configs of the runs that a session with `settings` trains.

    Raises:
        UserError: There is no such experiment, or it does not admit the changes.
    """
    chosen = experiment(settings.experiment)
    config = chosen.changed(list(settings.changes))
    parts = chosen.parts(settings.experiment, settings.experiment, config, settings.seeds)
    return [part.config for part in parts] or [config]


def _source_kind(weights: str) -> str:
    """Return the list in the metadata that `weights` belongs to."""
    kinds = {2: "dataset_sources", 5: "model_sources"}
    parts = weights.split("/")
    if len(parts) not in kinds or not all(parts):
        raise UserError(
            f"--weights {weights}: must be owner/name of a dataset or owner/name/framework/variation/version of a model"
        )
    return kinds[len(parts)]


def slugged(title: str) -> str:
    """Return the slug that Kaggle makes of `title`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
