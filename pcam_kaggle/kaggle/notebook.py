"""The Kaggle kernel: one notebook that carries the package, and the metadata that go with it."""

import ast
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from pcam_kaggle import UserError
from pcam_kaggle.config.experiments import DEFAULT, experiment
from pcam_kaggle.data.atomic_io import read_json, write, write_json
from pcam_kaggle.data.layout import COMPETITION

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent
NOTEBOOK = Path("notebooks") / "pcam_submission.ipynb"
METADATA = Path("kernel-metadata.json")
MOST_BYTES = 900_000
# What Kaggle takes for granted wrongly where it is missing, and what the notebook relies on.
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


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person sets in the notebook: the experiment, changes to its config, and the hours that a session may take."""

    experiment: str = DEFAULT
    changes: tuple[str, ...] = ()
    hours: float = 11.0


INTRODUCTION = """
# Histopathologic Cancer Detection: from the patches to a scored submission

Folds, a net per fold, its predictions, their blend, `submission.csv`. It needs the competition's data (*Add Input*), a GPU
(*Accelerator: GPU T4 x2*; both are used), and no internet. Each patch's SHA-1 is checked, the OOF AUC comes with its interval,
and what is written into `runs/` can be taken home and compared there.

**A session that is too short** ends in time, with the folds that are done, or with none and no submission. To go on, attach
this notebook's own output as an input and run it again: every fold continues after its last epoch.
"""

SETTINGS_TEXT = """
## Settings

`EXPERIMENT` is one of `quick`, `bottleneck`, `plain`, `bottleneck_d4`, `two_stream`, `best` or, with their weights attached
as a dataset, `lite0`, `lite0_stain`, `lite0_again` and `blend`. `CHANGES` are fields of its config, for example
`["epochs=10", "seed=7"]`, and stay empty for `blend`.
"""

PACKAGE_TEXT = """
## The package

The files that a kernel needs, from the ground up, as they are in the repository.
"""

FOLDERS = """
from pathlib import Path

for folder in {folders}:
    Path("pcam_kaggle", folder).mkdir(parents=True, exist_ok=True)
"""

STAGES: tuple[tuple[str, str, str], ...] = (
    (
        "environment",
        """
## The stages

First the variables that packages read when they are imported.
""",
        """
%xmode Minimal
import os

from pcam_kaggle.config.process import set_environment

set_environment()
os.environ["HF_HUB_OFFLINE"] = "1"
""",
    ),
    (
        "job",
        """
The data are found under `/kaggle/input`, in either of Kaggle's layouts. The runs in an attached output of this notebook are
imported.
""",
        """
import shutil

import matplotlib.pyplot as plt
import pandas as pd
from sklearn.metrics import RocCurveDisplay

from pcam_kaggle.pipeline.job import kernel_job
from pcam_kaggle.pipeline.stages import finished, run_blend, run_folds, run_predict, run_prepare, run_submission, run_train

job = kernel_job(EXPERIMENT, CHANGES, HOURS)
job.config
""",
    ),
    ("prepare", "### Patches and folds", "run_prepare(job)\nrun_folds(job);"),
    ("train", "### Training", "run_train(job)\njob = finished(job)"),
    (
        "learning",
        "Valid AUC of each fold after each epoch.",
        """
if job:
    runs = [(part.name, fold, part.run / f"fold_{fold}" / "log.csv") for part in job.parts() for fold in job.folds()]
    curves = {f"{name}, fold {fold}": pd.read_csv(log, index_col="epoch")["valid_auc"] for name, fold, log in runs}
    pd.DataFrame(curves).plot(figsize=(7, 4), ylabel="valid AUC", grid=True)
""",
    ),
    ("blend", "### Out of fold", "if job:\n    run_predict(job)\n    run_blend(job)"),
    (
        "roc",
        "ROC of each fold on patches that its net did not see.",
        """
if job:
    figure, ax = plt.subplots(figsize=(5, 5))
    for fold, part in pd.read_csv(job.run / "oof.csv").groupby("fold"):
        RocCurveDisplay.from_predictions(part["label"], part["probability"], name=f"fold {fold}", ax=ax)
""",
    ),
    (
        "submission",
        "### Submission",
        """
if job:
    run_submission(job)
    shutil.copy(job.target(), "submission.csv")
    display(pd.read_csv("submission.csv").describe())
""",
    ),
)


def required_modules(names: set[str], package: Path = PACKAGE) -> list[str]:
    """Return the modules called `names` (dotted, below the package) and all that they import, each after those it imports."""
    found: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in found:
            for other in sorted(imported_modules(_source(name, package))):
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
    return {name for name in below if _file(name, PACKAGE).is_file()}


def _file(module: str, package: Path) -> Path:
    return package / f"{module.replace('.', '/')}.py"


def _source(module: str, package: Path) -> str:
    return _file(module, package).read_text(encoding="utf-8")


def notebook(settings: Settings = Settings()) -> bytes:
    """Return the notebook with `settings`: the same package gives the same bytes."""
    stages = "\n".join(code for _, _, code in STAGES)
    modules = required_modules(imported_modules(stages.replace("%xmode Minimal", "")))
    folders = sorted({name.rpartition(".")[0] for name in modules})
    modules = ["__init__", *(f"{folder}.__init__" for folder in folders), *modules]
    assigned = [f"{key.upper()} = {json.dumps(value)}" for key, value in asdict(settings).items()]
    cells = [
        new_markdown_cell(INTRODUCTION.strip(), id="introduction"),
        new_markdown_cell(SETTINGS_TEXT.strip(), id="settings-text"),
        new_code_cell("\n".join(assigned), id="settings"),
        new_markdown_cell(PACKAGE_TEXT.strip(), id="package"),
        new_code_cell(FOLDERS.format(folders=json.dumps(folders)).strip(), id="folders"),
    ]
    for name in modules:
        source = f"%%writefile {_file(name, Path('pcam_kaggle'))}\n{_source(name, PACKAGE)}".rstrip("\n")
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


def pack(root: Path, owner: str, settings: Settings, goes_on: bool, folder: Path) -> str:
    """Write into `folder` what Kaggle's client pushes, in the name of `owner`: the notebook with `settings`, the metadata.

    Returns the kernel's id, owner/slug. With `goes_on` the kernel's own last output is attached. What Kaggle or its client
    would take and misunderstand is refused: raises UserError where the tracked notebook is not the package's, where a field of
    the metadata is missing or not what the notebook needs, where the title's slug is not the id's, where weights are needed
    and no dataset is named, where the notebook is larger than 900 kB, and on settings that the experiment does not admit.
    """
    file = root / METADATA
    kinds = {key: type(value) for key, value in NEEDED.items()}
    metadata = read_json(file, id=str, title=str, dataset_sources=list, kernel_sources=list, **kinds)
    chosen = experiment(settings.experiment)
    configs = [chosen.changed(list(settings.changes)), *(experiment(name).config for name in chosen.members)]
    wrong = [f"{key} must be {json.dumps(value)}" for key, value in NEEDED.items() if metadata[key] != value]
    slug = metadata["id"].rpartition("/")[2]
    if slug != slugged(metadata["title"]):
        wrong.append(f"title {metadata['title']!r} must become the id's {slug!r}, not {slugged(metadata['title'])!r}")
    if any(config.weights for config in configs) and not metadata["dataset_sources"]:
        wrong.append(
            f"{settings.experiment} needs pretrained weights: name in dataset_sources the dataset that holds their .pth"
        )
    if wrong:
        raise UserError(f"{file}: {'; '.join(wrong)}")
    if not (root / NOTEBOOK).is_file() or (root / NOTEBOOK).read_bytes() != notebook():
        raise UserError(f"{root / NOTEBOOK}: not made from the package as it is; run `make kernel`")
    content = notebook(settings)
    if len(content) > MOST_BYTES:
        raise UserError(f"{root / NOTEBOOK}: {len(content):,} bytes, and Kaggle takes about a million; leave modules out")
    name = f"{owner}/{slug}"
    sources = [*metadata["kernel_sources"], *([name] if goes_on else [])]
    write(folder / NOTEBOOK.name, lambda out: out.write(content))
    write_json(folder / METADATA.name, metadata | {"id": name, "code_file": NOTEBOOK.name, "kernel_sources": sources})
    return name


def slugged(title: str) -> str:
    """Return the slug that Kaggle makes of `title`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
