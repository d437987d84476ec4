"""Evaluation: the models of runs on a held-out set, labelled patches that they were not trained on."""

import os
from dataclasses import dataclass
from pathlib import Path

from pcam_kaggle.core.errors import UserError, examples
from pcam_kaggle.core.files import locked, write_csv
from pcam_kaggle.core.paths import Workspace, check_name
from pcam_kaggle.data.labelled import read_labelled, read_unlabelled
from pcam_kaggle.data.listing import Ids
from pcam_kaggle.pipeline.compare import read_slide_map
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.fold import Fold
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.held_out import EvaluationResult, score_runs


@dataclass(frozen=True, slots=True)
class HeldOutSet:
    """A held-out set as files: a folder of `<id>.tif`, and the CSV of id,label.

    `ids` is the ID scheme (see `read_labelled`). The set is called `name`, None for that of the folder that holds `labels`. The
    slides of `slides`, a CSV of id,wsi, are resampled if it is given.
    """

    patches: Path
    labels: Path
    ids: Ids = "sha1"
    name: str | None = None
    slides: Path | None = None


def evaluate(
    workspace: Workspace,
    names: list[str],
    held_out: HeldOutSet,
    baseline: str | None = None,
    folds: tuple[int, ...] | None = None,
) -> EvaluationResult:
    """Predict a held-out set with the models of runs, and score, compare and record the predictions.

    The runs are of experiments or blends of such. `folds` are those whose models predict, None for all that are trained;
    `baseline` is one of `names` that the others are compared with, None for the best. Predictions and scores are stored in the
    evaluations/<set>/ of `workspace`. Raises UserError if a run does not exist, was trained on some of the patches, or has
    other trained folds than another one; or as `read_labelled`, `predict_held_out` and `read_slide_map` do.
    """
    ensembles = [Run(workspace.run(name)).ensemble() for name in dict.fromkeys(names)]
    if baseline and baseline not in names:
        raise UserError(f"--baseline {baseline}: not among {examples(names)}")
    name = held_out.name or held_out.labels.resolve().parent.name
    check_name(name, "--name: ")
    evaluation = Evaluation(workspace.evaluations / name)
    runs = [Run(workspace.run(run)) for run in dict.fromkeys(run for each in ensembles for run in each.weights)]
    trained = _common_folds(runs, folds)
    patches = read_labelled(held_out.patches, held_out.labels, held_out.ids)
    slides = read_slide_map(held_out.slides, patches.table["id"]) if held_out.slides else None
    if evaluation.result_file.exists() and EvaluationResult.read(evaluation.result_file).patches_sha256 != patches.sha256:
        raise UserError(
            f"{evaluation.folder}: holds results for other patches or labels; delete it, or choose another name with --name"
        )
    # torch takes seconds to import.
    from pcam_kaggle.training.held_out import predict_held_out

    with locked(evaluation.folder):
        tables = {run.name: predict_held_out(run, trained[run.name], patches, workspace, evaluation) for run in runs}
        oof = {
            run: {fold.number: fold.predictions()[0].sort_values("id") for fold in folds if fold.has_predictions}
            for run, folds in trained.items()
        }
        result = score_runs(name, patches.sha256, ensembles, tables, oof, baseline, slides)
        result.write(evaluation.result_file)
    return result


def predict_patches(workspace: Workspace, name: str, patches: Path, out: Path, folds: tuple[int, ...] | None = None) -> None:
    """Write predictions for the TIFs, PNGs and JPEGs in the folder `patches` by the run `name`, by default by all its folds.

    The columns of the CSV `out` are id, the mean of the models (probability; mean_rank of a blend of ranks), and `fold_<k>`.
    """
    # Predictions may take hours, and are not stored elsewhere.
    parent = next((folder for folder in out.absolute().parents if folder.exists()), out)
    if out.is_dir() or not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UserError(f"--out {out}: is a folder, or can't be written in {parent}; name another file")
    ensemble = Run(workspace.run(name)).ensemble()
    trained = _common_folds([Run(workspace.run(run)) for run in ensemble.weights], folds)
    read = read_unlabelled(patches)
    from pcam_kaggle.training.held_out import predict_unlabelled

    tables = {run: predict_unlabelled(Run(workspace.run(run)), trained[run], read, workspace) for run in trained}
    table = read.table[["id"]].assign(**ensemble.models(tables))
    table.insert(1, "mean_rank" if ensemble.ranked else "probability", table.drop(columns="id").mean(axis=1))
    write_csv(out, table)


def _common_folds(runs: list[Run], chosen: tuple[int, ...] | None) -> dict[str, list[Fold]]:
    """Return the folds `chosen` of each run, by default those that are trained; raises UserError if they differ or are not."""
    trained = {}
    for run in runs:
        run.check_models()
        folds = run.chosen_folds(chosen)
        trained[run.name] = [fold for fold in folds if fold.is_trained]
        untrained = [fold.number for fold in folds if not fold.is_trained]
        if not trained[run.name] or (chosen and untrained):
            lacking = f"fold {untrained[0]} is not" if chosen else "no fold is"
            raise UserError(f"{run.folder}: {lacking} trained; train it first, or choose others with --folds")
    numbers = {name: ",".join(str(fold.number) for fold in folds) for name, folds in trained.items()}
    if len(set(numbers.values())) > 1:
        lists = ", ".join(f"{name} {text}" for name, text in numbers.items())
        raise UserError(f"other folds are trained in each run ({lists}); choose common ones with --folds")
    return trained
