"""What each command of the command line does."""

import argparse
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace

from pcam_kaggle.cli.config_table import render_config
from pcam_kaggle.cli.kaggle_commands import KAGGLE_COMMANDS
from pcam_kaggle.core.errors import UserError, program
from pcam_kaggle.core.experiments import DEFAULT, DEMO, PRETRAINED, PROBE, experiment, plan
from pcam_kaggle.core.paths import Data, Workspace, demo_workspace, find_data, find_workspace, runs_workspace
from pcam_kaggle.pipeline.compare import compare_runs
from pcam_kaggle.pipeline.held_out import HeldOutSet, evaluate, predict_patches
from pcam_kaggle.pipeline.job import Job, Selection, time_limit, with_given_folds
from pcam_kaggle.pipeline.stages import STAGES, run_all, run_stage
from pcam_kaggle.pipeline.weights_folder import with_folder_settings
from pcam_kaggle.runs.import_run import import_predictions
from pcam_kaggle.scoring.tables import render_comparison, render_evaluation

log = logging.getLogger(__name__)


def _run_stage(options: argparse.Namespace) -> None:
    # `train` has predicted, too.
    job, order = _job(options), [name for name in STAGES if (options.command, name) != ("train", "predict")]
    run_stage(job, options.command)
    if options.command != order[-1]:
        following = order[order.index(options.command) + 1]
        given = [pair for pair in _given(options) if (pair[0], following) != ("--folds", "submission")]
        _log_next(options, [following], given)
    elif job.demo:
        log.info("This was the synthetic demo: its submission means nothing for Kaggle.")
    else:
        log.info("next: submit %s to Kaggle", job.submission())


def _log_next(options: argparse.Namespace, command: Sequence[str], given: Sequence[tuple[str, str]] = ()) -> None:
    """Log the words of `command`, with the options `given`, in the folders of this one."""
    work = options.work if options.work != os.environ.get("PCAM_WORK") else None
    words = ["--demo"] if options.demo else []
    words += [word for pair in (("--data", options.data), ("--work", work), *given) if pair[1] for word in pair]
    log.info("next: %s %s", program(), shlex.join([*command, *words]))


def _job(options: argparse.Namespace, default: str | None = None, changes: Sequence[str] = (), suffix: str = "") -> Job:
    """Return the job of `options`; `changes` to the config precede theirs, the run's default name includes `suffix`."""
    runs = tuple(options.members)
    if runs and options.seeds > 1:
        raise UserError(f"--seeds {options.seeds}: trains runs, so it can't be combined with runs to blend")
    data, workspace, is_demo = _folders(options)
    chosen = options.experiment or default or (DEMO if is_demo else DEFAULT)
    short = [f"{field}={value}" for field in ("groups", "subset") if (value := getattr(options, field))]
    selection = Selection(options.slides, options.ids, options.folds, runs, options.fold_file)
    name, changes = options.name or "-".join(runs), with_folder_settings([*changes, *options.set, *short])
    chosen_plan = plan(chosen, changes, name, options.seeds, suffix)
    if options.fold_file:
        chosen_plan = with_given_folds(chosen_plan, options.fold_file, data)
    job = Job(chosen_plan, data, workspace, selection, options.method, time_limit(options.hours), is_demo)
    if is_demo:
        reason = "" if options.demo else ", since no data of the competition was found"
        log.info("This is the synthetic demo in %s%s.", workspace.root, reason)
    return job


def _folders(options: argparse.Namespace) -> tuple[Data, Workspace, bool]:
    """Return the data and the workspace, and whether they are the synthetic demo's."""
    workspace = find_workspace(options.work)
    demo = demo_workspace(workspace)
    demo_data = Data(demo.root / "data")
    data = None if options.demo else find_data(options.data or os.environ.get("PCAM_DATA"), workspace.root)
    if data:
        return data, workspace, False
    if options.members and not options.demo:
        # Runs are blended without the data that they were trained on.
        found = runs_workspace(workspace)
        return demo_data, found, found == demo
    needs_data = ("-e", "--set", "--groups", "--subset", "--slides", "--fold-file")
    given = [" ".join(pair) for pair in _given(options) if pair[0] in needs_data]
    if given and not options.demo:
        advice = "name its folder with --data (make: DATA=), or add --demo (make: ARGS=--demo) for the synthetic demo"
        raise UserError(f"{given[0]}: no data of the competition found; {advice}")
    return demo_data, demo, True


def _given(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the options of a job that were given and that the next stage takes too, except for folders, with their values."""
    pairs = [
        ("-e", options.experiment),
        ("--name", options.name or "-".join(options.members)),
        ("--seeds", options.seeds if options.seeds > 1 else None),
        ("--slides", options.slides),
        ("--fold-file", options.fold_file),
        ("--groups", options.groups),
        ("--subset", options.subset),
        ("--folds", ",".join(map(str, options.folds or ()))),
        *(("--set", assignment) for assignment in options.set),
    ]
    return [(flag, str(value)) for flag, value in pairs if value]


def _run_import(options: argparse.Namespace) -> None:
    workspace = find_workspace(options.work)
    demo = demo_workspace(workspace)
    data = Data(demo.root / "data") if options.demo else find_data(options.data or os.environ.get("PCAM_DATA"), workspace.root)
    if data is None:
        raise UserError("no data of the competition found, whose labels are needed; name its folder with --data")
    run = import_predictions(options.name, options.oof, options.test, data, demo if options.demo else workspace)
    log.info("import: %s, to blend alone or with other runs", run.folder)
    _log_next(options, ["blend", run.name])


def _run_compare(options: argparse.Namespace) -> None:
    workspace = _workspace_with_runs(options)
    comparison = compare_runs(workspace, options.runs, options.baseline, options.slides, options.folds)
    print(render_comparison(comparison, options.format), end="")


def _run_evaluate(options: argparse.Namespace) -> None:
    workspace = _workspace_with_runs(options)
    of_scores = (options.runs[1:], options.labels, options.slides, options.name, options.baseline)
    if not (options.labels or options.out) or (options.out and any(of_scores)):
        raise UserError("give either --labels, to score runs, or --out, to write the predictions of one run, without scores")
    if options.out:
        predict_patches(workspace, options.runs[0], options.patches, options.out, options.folds)
        log.info("evaluate: predictions in %s", options.out)
        return
    held_out = HeldOutSet(options.patches, options.labels, options.ids, options.name, options.slides)
    result = evaluate(workspace, options.runs, held_out, options.baseline, options.folds)
    print(render_evaluation(result, options.format), end="")


def _run_report(options: argparse.Namespace) -> None:
    # matplotlib takes a second to import, which no other command has to wait for.
    from pcam_kaggle.report.page import write_report

    workspace = _workspace_with_runs(options)
    comparison = compare_runs(workspace, options.runs, options.baseline, options.slides, options.folds)
    # No run has a + in its name.
    folds = f"-folds-{'-'.join(map(str, options.folds))}" if options.folds else ""
    target = workspace.root / "reports" / f"{'+'.join(options.runs) or 'runs'}{folds}.html"
    write_report(comparison, workspace, target)
    log.info("report: %s", target)
    log.info("next: open it in a browser")


def _workspace_with_runs(options: argparse.Namespace) -> Workspace:
    """Return the workspace whose runs are read; if it is the demo's, standard error says so."""
    real = find_workspace(options.work)
    found = runs_workspace(real)
    if found != real:
        log.warning("%s: has no runs; these are the synthetic demo's, in %s", real.root, found.root)
    return found


def _run_config(options: argparse.Namespace) -> None:
    chosen = experiment(options.experiment or DEFAULT)
    print(render_config(replace(chosen, config=chosen.changed(with_folder_settings(options.set)))), end="")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    **dict.fromkeys(STAGES, _run_stage),
    "pipeline": lambda options: run_all(_job(options)),
    "probe": lambda options: run_all(_job(options, PRETRAINED, PROBE, "-probe")),
    "import": _run_import,
    "compare": _run_compare,
    "evaluate": _run_evaluate,
    "report": _run_report,
    "config": _run_config,
    **KAGGLE_COMMANDS,
}
