"""What each command of the command line does."""

import argparse
import logging
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace

from pcam_kaggle.cli.config_table import render_config
from pcam_kaggle.cli.kaggle_commands import KAGGLE_COMMANDS
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import DEFAULT, DEMO, PRETRAINED, PROBE, experiment
from pcam_kaggle.core.paths import (
    Workspace,
    demo_data,
    demo_workspace,
    find_data,
    find_workspace,
    runs_workspace,
)
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.models.weights import with_folder_settings
from pcam_kaggle.pipeline.compare import compare_runs
from pcam_kaggle.pipeline.held_out import HeldOutSet, evaluate
from pcam_kaggle.pipeline.job import Job, make_job
from pcam_kaggle.pipeline.run_all import run_all
from pcam_kaggle.pipeline.stages import STAGES
from pcam_kaggle.scoring.compare import Comparison
from pcam_kaggle.scoring.tables import render_comparison, render_evaluation
from pcam_kaggle.training.distributed import one_rank_at_a_time, process_group

log = logging.getLogger(__name__)


def _run_pipeline(options: argparse.Namespace) -> None:
    with process_group():
        run_all(_job(options))


def _run_probe(options: argparse.Namespace) -> None:
    with process_group():
        run_all(_job(options, PRETRAINED, PROBE, "-probe"))


def _run_stage(options: argparse.Namespace) -> None:
    with process_group():
        job = _job(options)
        STAGES[options.command](job)
        order = [*STAGES]
        rest = order[order.index(options.command) + 1 :]
        if rest:
            log.info("next: python -m pcam_kaggle %s%s", rest[0], _repeated(options, job, rest[0]))
        elif job.demo:
            log.info("This was the synthetic demo: its submission means nothing for Kaggle.")
        else:
            log.info("next: submit %s to Kaggle", job.submission())


def _job(options: argparse.Namespace, default: str | None = None, changes: Sequence[str] = (), suffix: str = "") -> Job:
    """Return the job that `options` ask for; the demo's patches are written once everything else is validated.

    Args:
        options: Parsed options.
        default: Experiment if none is given; None for the usual one.
        changes: Assignments to the fields of its config, before those of the options.
        suffix: End of the run's name if none is given.
    """
    with one_rank_at_a_time():
        workspace = find_workspace(options.work)
        data = None if options.demo else find_data(options.data or os.environ.get("PCAM_DATA"), workspace.root)
        members = tuple(getattr(options, "members", ()))
        if data is None and not options.demo and not members:
            _refuse_options_without_data(options)
        is_demo = data is None
        if data is None:
            # Runs are blended without the data that they were trained on.
            real_runs = runs_workspace(workspace) if members and not options.demo else demo_workspace(workspace)
            is_demo, workspace = real_runs != workspace, real_runs
            data = demo_data(workspace)
        chosen = options.experiment or default or (DEMO if is_demo else DEFAULT)
        job = make_job(
            data,
            workspace,
            chosen,
            [*changes, *options.set, *([f"groups={options.groups}"] if options.groups else [])],
            name=options.name or (suffix and f"{chosen}{suffix}"),
            folds=getattr(options, "folds", None),
            slides=options.slides,
            ids=getattr(options, "ids", None),
            skip_damaged=getattr(options, "skip_damaged", False),
            members=members,
            method=getattr(options, "method", "mean"),
            hours=getattr(options, "hours", None),
            seeds=getattr(options, "seeds", 1),
            demo=is_demo,
        )
        if is_demo:
            reason = "" if options.demo else ", since no data of the competition was found"
            log.info("This is the synthetic demo in %s%s.", workspace.root, reason)
        if is_demo and not members:
            make_demo(data)
        return job


def _refuse_options_without_data(options: argparse.Namespace) -> None:
    """Raise UserError on an option that means real data, where the demo would run instead."""
    given = [f"-e {options.experiment}"] if options.experiment else []
    given += [f"--set {assignment}" for assignment in options.set]
    given += [f"--{name} {value}" for name in ("groups", "slides") if (value := getattr(options, name))]
    if given:
        raise UserError(
            f"{given[0]}: no data of the competition found; name its folder with --data (make: DATA=), or add --demo (make: "
            "ARGS=--demo) for the synthetic demo"
        )


def _repeated(options: argparse.Namespace, job: Job, stage: str) -> str:
    """Return the given options that also apply to `stage`, quoted for the shell."""
    given = {
        "--data": options.data,
        "--work": options.work if options.work != os.environ.get("PCAM_WORK") else None,
        "-e": options.experiment,
        "--name": options.name or "-".join(job.members),
        "--seeds": seeds if (seeds := getattr(options, "seeds", 1)) > 1 else None,
        "--slides": options.slides,
        "--groups": options.groups,
        "--folds": ",".join(map(str, job.chosen)) if job.chosen and stage != "submission" else None,
    }
    parts = ["--demo"] if options.demo else []
    parts += [part for key, value in given.items() if value for part in (key, str(value))]
    parts += [part for assignment in options.set for part in ("--set", assignment)]
    return "".join(f" {shlex.quote(part)}" for part in parts)


def _run_compare(options: argparse.Namespace) -> None:
    _, comparison = _comparison(options)
    print(render_comparison(comparison, options.format), end="")


def _run_evaluate(options: argparse.Namespace) -> None:
    held_out = HeldOutSet(options.patches, options.labels, options.ids, options.name, options.slides)
    workspace = runs_workspace(find_workspace(options.work))
    result = evaluate(workspace, options.runs, held_out, options.baseline, options.folds)
    print(render_evaluation(result, options.format), end="")


def _run_report(options: argparse.Namespace) -> None:
    # matplotlib takes a second to import, which no other command has to wait for.
    from pcam_kaggle.report.page import write_report

    workspace, comparison = _comparison(options)
    target = workspace.root / "reports" / f"{'-'.join(options.runs) or 'runs'}.html"
    write_report(comparison, workspace, target)
    log.info("report: %s", target)
    log.info("next: open it in a browser")


def _comparison(options: argparse.Namespace) -> tuple[Workspace, Comparison]:
    """Return the compared runs and their workspace; if they are the demo's, standard error says so."""
    real = find_workspace(options.work)
    found = runs_workspace(real)
    if found != real and (found.root / "runs").is_dir():
        log.warning("%s: has no runs; these are the synthetic demo's, in %s", real.root, found.root)
    return found, compare_runs(found, options.runs, options.baseline, options.slides)


def _run_config(options: argparse.Namespace) -> None:
    chosen = experiment(options.experiment or DEFAULT)
    print(render_config(replace(chosen, config=chosen.changed(with_folder_settings(options.set)))), end="")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    **dict.fromkeys(STAGES, _run_stage),
    "pipeline": _run_pipeline,
    "probe": _run_probe,
    "compare": _run_compare,
    "evaluate": _run_evaluate,
    "report": _run_report,
    "config": _run_config,
    **KAGGLE_COMMANDS,
}
