"""What each experiment and each trial scores out of fold: trains what is missing, writes SCORES.md.

`python -m benchmarks.scores [NAME …]`, with PCAM_DATA naming the competition's folder. A row is measured from its run's
files in runs/; where there are none, the record in scores.json stands, and where that lacks the row too, it is trained.
Named rows are trained wherever their runs are not finished.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle.artifacts import read_json, write, write_json
from pcam_kaggle.config import Config
from pcam_kaggle.errors import UserError
from pcam_kaggle.experiments import BASELINE, QUICK, experiment
from pcam_kaggle.metrics import auc, auc_difference, auc_interval
from pcam_kaggle.paths import find_data, find_workspace
from pcam_kaggle.pipeline import Job, run_blend, run_folds, run_predict, run_prepare, run_train
from pcam_kaggle.tables import read_numbers

HERE = Path(__file__).parent
RECORD = HERE / "scores.json"
ALL = tuple(range(5))
PART = (0, 1)


@dataclass(frozen=True, slots=True)
class Row:
    """A run to score: an experiment with `changes` to its config, on `folds`, held against the row called `base`."""

    experiment: str
    base: str
    changes: tuple[str, ...] = ()
    folds: tuple[int, ...] = ALL

    @property
    def name(self) -> str:
        """Name of the run."""
        return "-".join([self.experiment, *(change.replace("=", "_").replace(":", "_") for change in self.changes)])


NAMED = tuple(Row(name, BASELINE) for name in (BASELINE, QUICK, "bottleneck", "bottleneck_d4", "two_stream", "lite0", "blend"))
TRIALS = tuple(
    Row(QUICK, QUICK, (change,), PART)
    for change in (
        "stain_jitter=0.15",
        "stain_mix=0.5",
        "degrade=0.3",
        "mixup=0.2",
        "label_smoothing=0.05",
        "teacher=quick",
        "norm=test",
        "squeeze=2",
        "depth=2",
        "centre=32",
        "symmetry=d4",
    )
)
STAIN = tuple(
    Row(name, f"{BASELINE}-groups_stain", ("groups=stain",), PART) for name in (BASELINE, QUICK, "two_stream", "lite0")
)
ROWS = {row.name: row for row in (*NAMED, *TRIALS, *STAIN)}


def job_of(row: Row) -> Job:
    """Return the pipeline's job that makes the run of `row`; raises UserError where there is no data."""
    workspace = find_workspace(None)
    data = find_data(os.environ.get("PCAM_DATA"), workspace.root)
    if data is None:
        raise UserError("no data of the competition found: set PCAM_DATA")
    named = experiment(row.experiment)
    return Job(
        data=data,
        workspace=workspace,
        demo=False,
        experiment=row.experiment,
        config=named.config.changed(list(row.changes)),
        name=row.name,
        chosen=row.folds,
        trains=named.members,
    )


def finished(row: Row) -> bool:
    """Tell whether every fold of `row` is trained and predicted."""
    return all((part.run / f"fold_{fold}" / "predictions.json").exists() for part in job_of(row).parts() for fold in row.folds)


def make(row: Row) -> None:
    """Run the stages of `row` that are not finished."""
    job = job_of(row)
    for stage in (run_prepare, run_folds, run_train, run_predict):
        stage(job)
    if row.folds == ALL:
        run_blend(job)


def out_of_fold(row: Row) -> pd.DataFrame:
    """Return id, label, fold, probability of the patches in the folds of `row`, sorted by id."""
    job = job_of(row)
    if job.trains:
        return read_numbers(job.run / "oof.csv", ["label", "fold", "probability"])
    parts = [read_numbers(job.run / f"fold_{k}" / "oof.csv", ["label", "probability"]).assign(fold=k) for k in row.folds]
    return pd.concat(parts).sort_values("id", ignore_index=True)


def measure(row: Row) -> dict[str, Any]:
    """Return the record of `row`, whose run and whose base's run are finished."""
    oof = out_of_fold(row)
    labels, values = oof["label"].to_numpy(np.int64), oof["probability"].to_numpy()
    both = oof.merge(out_of_fold(ROWS[row.base]), on="id", suffixes=("", "_base"), validate="1:1")
    difference = auc_difference(*(both[name].to_numpy() for name in ("label", "probability", "probability_base")))
    costs = [_costs(part.run, row.folds) for part in job_of(row).parts()]
    first, changed = Config(), job_of(row).config
    return {
        "base": row.base,
        "fold_auc": {int(k): _auc(part) for k, part in oof.groupby("fold")},
        "pooled": list(auc_interval(labels, values)[:3]),
        "difference": list(difference[:3]),
        "paired": len(both),
        "parameters": sum(each["parameters"] for each in costs),
        "macs": sum(each["macs"] for each in costs),
        "train_images_per_second": 1 / sum(1 / each["train"] for each in costs),
        "predict_images_per_second": 1 / sum(1 / each["predict"] for each in costs),
        "minutes": sum(each["minutes"] for each in costs),
        "config": {key: value for key, value in dataclasses.asdict(changed).items() if value != getattr(first, key)},
        "members": list(job_of(row).trains),
        "backend": costs[0]["backend"],
    }


def _auc(oof: pd.DataFrame) -> float:
    return auc(oof["label"].to_numpy(np.int64), oof["probability"].to_numpy())


def _costs(run: Path, folds: tuple[int, ...]) -> dict[str, Any]:
    metrics = [read_json(run / f"fold_{k}" / "metrics.json") for k in folds]
    predictions = [read_json(run / f"fold_{k}" / "predictions.json") for k in folds]
    made = read_json(run / "environment.json")
    return {
        "parameters": metrics[0]["parameters"],
        "macs": metrics[0]["macs"],
        "train": float(np.median([fold["images_per_second"] for fold in metrics])),
        "predict": float(np.median([fold["images_per_second"] for fold in predictions])),
        "minutes": sum(fold["seconds"] for fold in metrics) / 60,
        "backend": f"{made['device']}, {made['backend']['precision']}",
    }


def table(rows: tuple[Row, ...], records: dict[str, dict[str, Any]], base: str) -> list[str]:
    """Return a Markdown table of those of `rows` that are in `records`, highest pooled AUC first."""
    heads = (
        "run",
        "pooled OOF AUC",
        f"minus {base}",
        "folds",
        "parameters",
        "MACs",
        "train /s",
        "predict /s",
        "minutes",
        "config",
    )
    lines = [heads, ["---"] * len(heads)]
    known = [row for row in rows if row.name in records]
    for row in sorted(known, key=lambda row: -records[row.name]["pooled"][0]):
        record = records[row.name]
        lines.append(
            (
                f"`{row.name}`",
                "{:.4f} [{:.4f}, {:.4f}]".format(*record["pooled"]),
                "" if row.name == row.base else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*record["difference"]),
                " ".join(f"{value:.4f}" for value in record["fold_auc"].values()),
                f"{record['parameters']:,}",
                f"{record['macs'] / 1e6:.0f} M",
                f"{record['train_images_per_second']:.0f}",
                f"{record['predict_images_per_second']:.0f}",
                f"{record['minutes']:.1f}",
                " + ".join(record["members"]) or " ".join(f"{key}={value}" for key, value in record["config"].items()),
            )
        )
    return ["| " + " | ".join(line) + " |" for line in lines]


def main(names: list[str]) -> None:
    """Bring the rows called `names`, or all, up to date; write SCORES.md and print it."""
    unknown = set(names) - set(ROWS)
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no such row; choose of {', '.join(ROWS)}")
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name, row in ROWS.items():
        bases = {row.base, *(change.removeprefix("teacher=") for change in row.changes if change.startswith("teacher="))}
        if name in names or (not names and name not in records):
            for each in (*(ROWS[base] for base in bases), row):
                make(each)
        if finished(row) and all(finished(ROWS[base]) for base in bases):
            records[name] = measure(row)
            write_json(RECORD, records)
    text = "\n".join(
        [
            (HERE / "scores_head.md").read_text().rstrip(),
        ]
    )
    write(HERE / "SCORES.md", lambda file: file.write(text.encode()))
    print(text)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
