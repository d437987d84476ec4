"""The result of a run: the AUC of its folds, and its comparison with the other runs of the workspace."""

import pandas as pd

from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.compare import compare_runs
from pcam_kaggle.scoring.metrics import interval_text
from pcam_kaggle.scoring.render import render


def print_result(workspace: Workspace, names: list[str]) -> None:
    """Print the AUC of each fold of the first of `names` that has a score; once all folds are blended, also its comparison.

    The first of `names` is the run; the others, and runs called `<run>-without-<others>`, stand for it while it has no score.
    """
    # A blend that lacks a run has a name of its own.
    partial = sorted(path.name for path in (workspace.root / "runs").glob(f"{names[0]}-without-*"))
    scored = [name for name in [names[0], *partial, *names[1:]] if Run(workspace.run(name)).has_score]
    if not scored:
        print(f"{names[0]}: no fold is finished")
        return
    name = scored[0]
    metrics = Run(workspace.run(name)).blend_metrics(fold_auc=list, folds=list, pooled=dict, missing_folds=list)
    table = pd.DataFrame({"fold": metrics["folds"], "OOF AUC": [f"{area:.4f}" for area in metrics["fold_auc"]]})
    print(table.to_string(index=False))
    pooled, missing = metrics["pooled"], metrics["missing_folds"]
    interval = interval_text(pooled["low"], pooled["high"], pooled.get("undefined", ""))
    lacking = f"; missing: folds {', '.join(map(str, missing))}" if missing else ""
    print(f"{name}: pooled {pooled['value']:.4f}, 95 % interval {interval} (unit: {pooled.get('unit', 'patch')}){lacking}")
    if name == names[0] and not missing and sum(path.is_dir() for path in (workspace.root / "runs").iterdir()) > 1:
        print(render(compare_runs(workspace, [], name, None), "text"), end="")
