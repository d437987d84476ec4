"""What the notebook says and runs, apart from the package that it contains: the text and the code of its cells."""

INTRODUCTION = """
# Histopathologic Cancer Detection: from the patches to a scored submission

Draws folds, trains a net per fold, predicts, blends and writes `submission.csv`. Requires the competition's data
(*Add Input*) and a GPU (*Accelerator: GPU T4 x2*; both are used). No internet. Each patch's SHA-1 is verified, and the OOF AUC
is printed with its confidence interval. Download `runs/` to compare it with local runs.

**If a session is too short**, it ends in time with the finished folds, or without a submission if there are none. To resume,
attach this notebook's own output as an input and run it again: every fold continues after its last epoch.
"""

SETTINGS_TEXT = """
## Settings

`EXPERIMENT` is one of `quick`, `bottleneck`, `plain`, `bottleneck_d4`, `best` or, with their weights attached as a
dataset or model, `lite0`, `pretrained` and `blend`. `CHANGES` sets fields of its config, for example
`["epochs=10", "weights=owner/dataset"]`, and must be empty for `blend`. `HOURS` is the longest duration of a session,
`SEEDS` the number of seeds to train and to blend.
"""

PACKAGE_TEXT = """
## The package

The package's modules that the kernel needs, as they are in the repository, each after the modules that it imports.
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

Environment variables that packages read when they are imported, and logging.
""",
        """
%xmode Minimal
import os

from pcam_kaggle.config.logs import configure_logging
from pcam_kaggle.config.process import set_environment

configure_logging()
set_environment()
os.environ["HF_HUB_OFFLINE"] = "1"
""",
    ),
    (
        "job",
        """
The competition's data are found under `/kaggle/input`. Runs in an attached output of this notebook are imported.
""",
        """
import shutil

import matplotlib.pyplot as plt
import pandas as pd
from sklearn.metrics import RocCurveDisplay

from pcam_kaggle.pipeline.job import kernel_job
from pcam_kaggle.pipeline.run_all import finished
from pcam_kaggle.pipeline.stages import run_blend, run_folds, run_predict, run_prepare, run_submission, run_train

job = kernel_job(EXPERIMENT, CHANGES, HOURS, SEEDS)
job.config
""",
    ),
    ("prepare", "### Patches and folds", "run_prepare(job)\nrun_folds(job);"),
    ("train", "### Training", "run_train(job)\njob = finished(job)"),
    (
        "learning",
        "Validation AUC of each fold after each epoch.",
        """
if job:
    logs = {f"{part.name}, fold {fold}": part.run.fold(fold).log() for part in job.parts() for fold in job.folds}
    curves = {name: log.set_index("epoch")["valid_auc"] for name, log in logs.items()}
    pd.DataFrame(curves).plot(figsize=(7, 4), ylabel="validation AUC", grid=True)
""",
    ),
    ("blend", "### Out of fold", "if job:\n    run_predict(job)\n    run_blend(job)"),
    (
        "roc",
        "ROC curve of each fold on its validation patches.",
        """
if job:
    figure, ax = plt.subplots(figsize=(5, 5))
    for fold, part in job.run.oof().groupby("fold"):
        RocCurveDisplay.from_predictions(part["label"], part["probability"], name=f"fold {fold}", ax=ax)
""",
    ),
    (
        "submission",
        "### Submission",
        """
if job:
    run_submission(job)
    shutil.copy(job.submission(), "submission.csv")
    display(pd.read_csv("submission.csv").describe())
""",
    ),
)
