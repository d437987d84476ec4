"""The cells of notebooks/pcam_submission.ipynb, except the package, in the percent format of Jupytext.

`kaggle notebook` makes the notebook of them. The title of a cell is its id. Sections start with a heading of level 2. Comments
in the cell of settings have at most 41 characters, as many as a phone shows.
"""

# %% introduction [markdown]
# # Histopathologic Cancer Detection: from the patches to a scored submission
#
# Does a patch of 96x96 px show tumour tissue in its centre square of 32x32 px? The notebook draws folds, trains a model per
# fold, predicts, blends and writes `submission.csv`. The OOF AUC is printed with its confidence interval.
#
# It requires the competition's data (*Add Input*) and a GPU (*Accelerator: GPU T4 x2*; both are used), and internet only if the
# experiment needs pretrained weights that are not attached. Each patch's SHA-1 is verified.
#
# **If a session is too short**, it ends at the time limit with the finished folds, or without a submission if there are none.
# To resume, attach this notebook's own output as an input and run it again: every fold continues after its last epoch.
#
# **Contents**
#
# - [Environment](#Environment)
# - [Settings](#Settings)
# - [The package](#The-package)
# - [Job](#Job)
# - [Patches and folds](#Patches-and-folds)
# - [Augmentation](#Augmentation)
# - [Training](#Training)
# - [Out of fold](#Out-of-fold)
# - [Submission](#Submission)
# - [Report](#Report)
# - [Curves](#Curves)
# - [Worst mistakes](#Worst-mistakes)
# - [Result](#Result)

# %% check-text [markdown]
# ## Environment
#
# Package versions are checked before anything else, since an older image would fail later.

# %% check
# %xmode Minimal
import platform
import re
from importlib.metadata import PackageNotFoundError, version

NEEDED = {"torch": "2.10", "timm": "1.0.26", "albumentations": "2.0.8", "opencv": "4.13", "numpy": "2.0.2"}
NEEDED |= {"pandas": "2.2.2", "scikit-learn": "1.6.1", "scipy": "1", "matplotlib": "3"}
NEEDED |= {"jinja2": "3", "pydantic": "2", "pillow": "10", "tqdm": "4", "joblib": "1", "filelock": "3", "psutil": "5"}
OPENCV = [f"opencv{contrib}-python{headless}" for contrib in ("", "-contrib") for headless in ("", "-headless")]


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release.partition("+")[0])]


found = {name: installed(name) for name in NEEDED} | {"opencv": max(map(installed, OPENCV), key=numbers)}
old = [name for name, needed in NEEDED.items() if numbers(found[name]) < numbers(needed)]
if old:
    problems = ", ".join(f"{name} {found[name] or 'missing'} (needed: {NEEDED[name]})" for name in old)
    raise RuntimeError(f'{problems}; choose Settings, Environment, "Always use latest environment", and run all cells again')
print(f"Python {platform.python_version()}, torch {found['torch']}; all packages are recent enough")

# %% settings-text [markdown]
# ## Settings
#
# Change them here and run all cells.

# %% settings
# bottleneck, quick, plain,
# bottleneck_d4; with internet or
# attached weights: lite0, pretrained,
# dinov2, bottleneck_distilled, blend
EXPERIMENT = "bottleneck"

# fields of its config, such as
# ["epochs=10", "batch_size=64"]; none
# for blend
CHANGES: list[str] = []

# longest duration of the session; Kaggle
# allows 12
HOURS = 11.0

# number of seeds to train and to blend,
# from 1; 1 for blend
SEEDS = 1

# attached dataset (owner/name) with a
# slide map, patch_id_wsi*.csv, by which
# folds are grouped; none if empty
SLIDES = ""

# True to train without a GPU, for days
ALLOW_CPU = False

# name of the run; "" for that of the
# experiment and its changes
NAME = ""

# saved as mark.txt; `kaggle run` knows
# its version by it
MARK = ""

# %% package [markdown]
# ## The package
#
# The package's modules, as they are in the repository, except the command line and Kaggle's client. The cells are folded; in
# exported HTML, drag the lower right corner of one to read it.

# %% environment-text [markdown]
# ## Job
#
# Sets environment variables that packages read when they are imported, finds the competition's data under `/kaggle/input`, and
# imports runs from an attached output of this notebook.

# %% environment
from IPython.display import HTML

from pcam_kaggle.core.logs import configure_logging
from pcam_kaggle.core.process import set_environment

configure_logging()
set_environment()

# For HTML by nbconvert: long lines of code scroll, and of a folded cell the first line is shown, in a box that can be enlarged.
HTML(
    "<style>.jp-InputArea-editor .highlight {overflow: auto} .celltag_package .jp-OutputArea {display: none} "
    ".celltag_package .highlight {height: 1.8em; resize: vertical}</style>"
)

# %% job
import shutil
from pathlib import Path

import pandas as pd
from IPython.display import Markdown, display

from pcam_kaggle.pipeline.compare import compare_runs
from pcam_kaggle.pipeline.job import kernel_job
from pcam_kaggle.pipeline.stages import (
    restrict_to_trained,
    run_blend,
    run_folds,
    run_predict,
    run_prepare,
    run_submission,
    run_train,
)
from pcam_kaggle.report.figures import learning, roc
from pcam_kaggle.report.gallery import ERRORS, augmentation_tiles, draw_examples, patch_tiles, worst_mistakes
from pcam_kaggle.report.page import write_report
from pcam_kaggle.report.summary import summary

Path("mark.txt").write_text(MARK)
job = kernel_job(EXPERIMENT, CHANGES, HOURS, SEEDS, SLIDES, ALLOW_CPU, NAME)
job.config

# %% prepare-text [markdown]
# ## Patches and folds
#
# Packs all patches into one file, verifies them and draws the folds.

# %% prepare
run_prepare(job)
_ = run_folds(job)

# %% patches-text [markdown]
# Some train patches of each label. The label says whether the marked centre of 32x32 px has tumour tissue; the rest is context.

# %% patches
store = job.store()
examples = draw_examples(job.labels())
patches = store.images(store.rows("train", examples["id"].to_numpy()))
patch_tiles(patches, examples)

# %% augmentation-text [markdown]
# ## Augmentation
#
# Patches, and beside each random versions as the model sees them in training: shifted by a few pixels, rotated or reflected,
# with changed stain and colour.

# %% augmentation
config = job.plan.runs[0].config
if config.probe:
    print("A logistic regression on the features of a frozen model is fitted without augmentation.")
else:
    display(augmentation_tiles(patches[::4], examples[::4], config))

# %% train-text [markdown]
# ## Training
#
# One model per fold. After the first epoch a line says how many folds will be finished before the time limit.

# %% train
run_train(job)
done = restrict_to_trained(job)

# %% blend-text [markdown]
# ## Out of fold
#
# Each model predicts the validation patches of its fold, on which it was not trained, and the test patches.

# %% blend
if done:
    run_predict(done)
    run_blend(done)

# %% submission-text [markdown]
# ## Submission
#
# `submission.csv` has a probability for each test patch.

# %% submission
# Before the pictures, whose failure must not cost the submission.
if done:
    run_submission(done)
    shutil.copy(done.submission(), "submission.csv")
    display(pd.read_csv("submission.csv").describe())

# %% report-text [markdown]
# ## Report
#
# `report.html` compares the runs of this session: table, curves, calibration, and the worst mistakes with Grad-CAM maps.

# %% report
if done:
    try:
        write_report(compare_runs(job.workspace, []), job.workspace, Path("report.html"))
    except Exception as error:
        print(f"report.html: left out ({' '.join(str(error).split())})")

# %% curves-text [markdown]
# ## Curves
#
# Learning curves: validation AUC, training and validation loss of each fold (thin lines) and their mean (bold). ROC curve: mean
# and range over folds, each on its validation patches.

# %% curves
if done:
    logs = {run.name: run.logs() for run in done.runs}
    plots = [learning(name, folds) for name, folds in logs.items() if folds]
    display(HTML("".join(plot.html for plot in [*plots, roc(done.run.name, done.run.oof())])))

# %% mistakes-text [markdown]
# ## Worst mistakes
#
# False negatives: patches with tumour that got the lowest probabilities. False positives: patches without tumour that got the
# highest.

# %% mistakes
if done:
    wrong = worst_mistakes(done.run.oof())
    patches = store.images(store.rows("train", wrong["id"].to_numpy()))
    display(patch_tiles(patches, wrong, ERRORS))

# %% summary-text [markdown]
# ## Result
#
# The AUC of all out-of-fold predictions pooled, and of each fold.

# %% summary
for run in job.runs:
    for entry in run.environments()[-1:]:
        print(f"{run.name}: {entry}")
made = [done.run, *done.runs] if done else []
Markdown(summary(made, job.runs))
