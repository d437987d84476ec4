"""What the notebook says and runs, apart from the package that it contains: the text and the code of its cells.

Each section starts with a heading of level 2. The table of contents in the introduction lists them.
"""

INTRODUCTION = """
# Histopathologic Cancer Detection: from the patches to a scored submission

Does a patch of 96x96 px show tumour tissue in its centre square of 32x32 px? The notebook draws folds, trains a net per fold,
predicts, blends and writes `submission.csv`. The OOF AUC is printed with its confidence interval.

It requires the competition's data (*Add Input*) and a GPU (*Accelerator: GPU T4 x2*; both are used), and no internet. Each
patch's SHA-1 is verified.

**If a session is too short**, it ends in time with the finished folds, or without a submission if there are none. To resume,
attach this notebook's own output as an input and run it again: every fold continues after its last epoch.

**Contents**

{contents}
"""

CHECK_TEXT = """
## Environment

Package versions are checked before anything else, since an older image would fail later.
"""

# The first code cell. The package does not exist yet, so it imports nothing of it. The versions are those of Kaggle's image.
CHECK = """
%xmode Minimal
import platform
import re
from importlib.metadata import PackageNotFoundError, version

NEEDED = {"torch": "2.10", "timm": "1.0.26", "albumentations": "2.0.8", "opencv": "4.13", "numpy": "2.0.2"}
NEEDED |= {"pandas": "2.2.2", "scikit-learn": "1.6.1", "scipy": "1", "matplotlib": "3"}
NEEDED |= {"pydantic": "2", "tqdm": "4", "joblib": "1", "filelock": "3"}
OPENCV = [f"opencv{contrib}-python{headless}" for contrib in ("", "-contrib") for headless in ("", "-headless")]


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\\d+", release.partition("+")[0])]


found = {name: installed(name) for name in NEEDED} | {"opencv": max(map(installed, OPENCV), key=numbers)}
old = [name for name, needed in NEEDED.items() if numbers(found[name]) < numbers(needed)]
if old:
    problems = ", ".join(f"{name} {found[name] or 'missing'} (needed: {NEEDED[name]})" for name in old)
    raise RuntimeError(f'{problems}; choose Settings, Environment, "Always use latest environment", and run all cells again')
print(f"Python {platform.python_version()}, torch {found['torch']}; all packages are recent enough")
"""

SETTINGS_TEXT = """
## Settings

Change them here and run all cells.
"""

PACKAGE_TEXT = """
## The package

The package's modules that the kernel needs, as they are in the repository, each after the modules that it imports. The cells
are folded; in exported HTML, drag the lower right corner of one to read it.
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
## Job

Sets environment variables that packages read when they are imported, finds the competition's data under `/kaggle/input`, and
imports runs from an attached output of this notebook.
""",
        """
import os

from IPython.display import HTML

from pcam_kaggle.core.logs import configure_logging
from pcam_kaggle.core.process import set_environment

configure_logging()
set_environment()
if not INTERNET:
    os.environ["HF_HUB_OFFLINE"] = "1"

# For HTML by nbconvert: long lines of code scroll, and of a folded cell the first line is shown, in a box that can be enlarged.
HTML(
    "<style>.jp-InputArea-editor .highlight {overflow: auto} .celltag_package .jp-OutputArea {display: none} "
    ".celltag_package .highlight {height: 1.8em; resize: vertical}</style>"
)
""",
    ),
    (
        "job",
        "",
        """
import shutil

import pandas as pd
from IPython.display import Markdown

from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_labels
from pcam_kaggle.pipeline.job import kernel_job
from pcam_kaggle.pipeline.stages import finished, run_blend, run_folds, run_predict, run_prepare, run_submission, run_train
from pcam_kaggle.report.gallery import ERRORS, augmented, curves, draw_examples, patch_gallery, worst_mistakes
from pcam_kaggle.report.summary import summary

job = kernel_job(EXPERIMENT, CHANGES, HOURS, SEEDS)
job.config
""",
    ),
    (
        "prepare",
        """
## Patches and folds

Packs all patches into one file, verifies them and draws the folds.
""",
        "run_prepare(job)\nrun_folds(job);",
    ),
    (
        "patches",
        """
Some train patches of each label. The label says whether the marked centre of 32x32 px has tumour tissue; the rest is context.
""",
        """
store = PatchStore(job.workspace.store)
labels = read_labels(job.data.labels)
shown = draw_examples(labels[labels["id"].isin(store.ids("train"))])
patches = store.images(store.rows("train", shown["id"].to_numpy()))
patch_gallery(patches, shown["label"])
""",
    ),
    (
        "augmentation",
        """
## Augmentation

The same patches as the net sees them in training: shifted by a few pixels, rotated or reflected, with changed stain and colour.
""",
        """
config = job.config
if config.probe:
    print("A logistic regression on the features of a frozen net is fitted without augmentation.")
else:
    display(patch_gallery(augmented(patches, config), shown["label"], marked=False))
""",
    ),
    (
        "train",
        """
## Training

One net per fold. After the first epoch a line says how many folds will be finished in time.
""",
        """
planned = job.runs
run_train(job)
job = finished(job)
""",
    ),
    (
        "blend",
        """
## Out of fold

Each net predicts the validation patches of its fold, on which it was not trained, and the test patches.
""",
        "if job:\n    run_predict(job)\n    run_blend(job)",
    ),
    # Before the pictures, whose failure must not cost the submission.
    (
        "submission",
        """
## Submission

`submission.csv` has a probability for each test patch.
""",
        """
if job:
    run_submission(job)
    shutil.copy(job.submission(), "submission.csv")
    display(pd.read_csv("submission.csv").describe())
""",
    ),
    (
        "curves",
        """
## Curves

Validation AUC of each fold after each epoch, and the ROC curve of each fold on its validation patches.
""",
        """
if job:
    display(curves({run.name: run.logs() for run in job.runs}, job.run.oof()))
""",
    ),
    (
        "errors",
        """
## Worst mistakes

False negatives: patches with tumour that got the lowest probabilities. False positives: patches without tumour that got the
highest.
""",
        """
if job:
    wrong = worst_mistakes(job.run.oof())
    patches = store.images(store.rows("train", wrong["id"].to_numpy()))
    display(patch_gallery(patches, wrong["label"], wrong["probability"], titles=ERRORS))
""",
    ),
    (
        "summary",
        """
## Result

The AUC of all out-of-fold predictions pooled, and of each fold.
""",
        """
made = [job.run, *job.runs] if job else []
Markdown(summary(made, planned))
""",
    ),
)
