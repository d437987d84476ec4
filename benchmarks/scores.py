"""What each experiment and each trial scores out of fold: trains what is missing, writes SCORES.md.

`python -m benchmarks.scores [NAME …]`, with PCAM_DATA naming the competition's folder. A row is measured from its run's
files in runs/ and taken down in scores/; rows that are named, and else those without a record, are trained where their
runs are not finished.
"""

import dataclasses
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pcam_kaggle import UserError
from pcam_kaggle.cli import main as cli
from pcam_kaggle.config.experiments import BASELINE, QUICK, experiment
from pcam_kaggle.config.schema import Config
from pcam_kaggle.data.atomic_io import read_json, write, write_json
from pcam_kaggle.data.csv_io import read_numbers
from pcam_kaggle.data.layout import find_data, find_workspace
from pcam_kaggle.runs.run import read_environments
from pcam_kaggle.scoring.metrics import auc, auc_difference, auc_interval

HERE = Path(__file__).parent
RECORD = HERE / "scores" / "records.json"
OOF = HERE / "scores" / "oof.csv"
TEXT = HERE / "scores" / "text.md"
SPEEDS = ("train_images_per_second", "predict_images_per_second")
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
        return "-".join([self.experiment, *(change.removeprefix("groups=").replace("=", "_") for change in self.changes)])


NAMES = (BASELINE, QUICK, "bottleneck", "bottleneck_d4", "two_stream", "lite0", "lite0_stain", "lite0_again", "blend")
NAMED = (
    *(Row(name, BASELINE) for name in NAMES),
    Row("bottleneck", BASELINE, ("tta=1",)),
    Row("bottleneck", BASELINE, ("epochs=10",)),
    Row("bottleneck", BASELINE, ("epochs=10", "tta=1")),
)
TRIED = ("groups=stain", "lr=0.002")
TRIAL_BASE = Row(QUICK, f"{QUICK}-stain-lr_0.002", TRIED, PART)
STAIN = tuple(Row(name, TRIAL_BASE.name, ("groups=stain",), PART) for name in (QUICK, "two_stream", "lite0", BASELINE))
TRIALS = tuple(
    Row(QUICK, TRIAL_BASE.name, (*TRIED, change), PART)
    for change in (
        "optimizer=adamw",
        "epochs=10",
        "stain_jitter=0.15",
        "stain_mix=0.5",
        "degrade=0.3",
        "mixup=0.2",
        "norm=test",
        f"teacher={TRIAL_BASE.name}",
    )
)
ROWS = {row.name: row for row in (*NAMED, *STAIN, TRIAL_BASE, *TRIALS)}


def make(row: Row) -> None:
    """Run the stages of `row` that are not finished; raises UserError without data, and where a stage fails, which says why."""
    if find_data(os.environ.get("PCAM_DATA"), find_workspace(None).root) is None:
        raise UserError(f"{row.name}: has no record, and to train it the competition's patches are needed; set PCAM_DATA")
    options = ["-e", row.experiment, "--name", row.name, *(part for change in row.changes for part in ("--set", change))]
    folds = ["--folds", ",".join(map(str, row.folds))]
    for stage in (["prepare"], ["folds"], ["train", *folds], ["predict", *folds]):
        if cli.main([*stage, *options]):
            raise UserError(f"{row.name}: no figures")


def harvest(row: Row, oof: pd.DataFrame, records: dict[str, Any]) -> pd.DataFrame:
    """Take down in `records` and in a column of `oof`, which is returned, what the finished run of `row` left."""
    run = find_workspace(None).run(row.name)
    tables = [read_numbers(run / f"fold_{fold}" / "oof.csv", ["probability"]) for fold in row.folds]
    column = pd.concat(tables).set_index("id")["probability"]
    first, config = (
        dataclasses.asdict(Config()),
        dataclasses.asdict(experiment(row.experiment).config.changed(list(row.changes))),
    )
    changed = {key: value for key, value in config.items() if value != first[key]}
    records[row.name] = {**_costs(run, row.folds), "config": changed, "members": []}
    return oof.drop(columns=row.name, errors="ignore").join(column.rename(row.name), how="outer")


def mix(row: Row, oof: pd.DataFrame, records: dict[str, Any]) -> pd.DataFrame:
    """Take down in `records` and in a column of `oof`, which is returned, the mean of the rows that `row` blends."""
    members = experiment(row.experiment).members
    made = [records[name] for name in members]
    records[row.name] = {
        **{key: sum(each[key] for each in made) for key in ("parameters", "macs")},
        **{key: round(1 / sum(1 / each[key] for each in made), 1) for key in SPEEDS},
        "minutes": round(sum(each["minutes"] for each in made), 1),
        "config": {},
        "members": list(members),
    }
    return oof.assign(**{row.name: oof[list(members)].mean(axis=1)})


def _costs(run: Path, folds: tuple[int, ...]) -> dict[str, Any]:
    metrics = [read_json(run / f"fold_{fold}" / "metrics.json") for fold in folds]
    predictions = [read_json(run / f"fold_{fold}" / "predictions.json") for fold in folds]
    made = read_environments(run)[-1]
    return {
        "parameters": metrics[0]["parameters"],
        "macs": metrics[0]["macs"],
        **{
            key: round(float(np.median([fold["images_per_second"] for fold in part])), 1)
            for key, part in zip(SPEEDS, (metrics, predictions), strict=True)
        },
        "minutes": round(sum(fold["seconds"] for fold in metrics) / 60, 1),
        "backend": f"{made['device']}, {made['backend']['precision']}",
        "commit": made["commit"],
    }


def score(row: Row, oof: pd.DataFrame) -> dict[str, Any]:
    """Return the AUC of `row` per fold and pooled, and its paired difference to its base's on the same patches."""
    table = read_numbers(find_workspace(None).folds / f"{scheme(row)}.csv", ["label", "fold"]).set_index("id").astype(int)
    table = table.join(oof[[row.name]].dropna(), how="inner")
    labels, values = table["label"].to_numpy(), table[row.name].to_numpy()
    scored = {
        "fold_auc": [auc(part["label"].to_numpy(), part[row.name].to_numpy()) for _, part in table.groupby("fold")],
        "pooled": list(auc_interval(labels, values)[:3]),
    }
    if row.base in oof and row.base != row.name:
        both = table.join(oof[[row.base]].dropna().rename(columns={row.base: "base"}), how="inner")
        scored["difference"] = list(auc_difference(*(both[each].to_numpy() for each in ("label", row.name, "base")))[:3])
    return scored


def scheme(row: Row) -> str:
    """Return the name of the folds of `row`."""
    return "stain_5_42" if "groups=stain" in row.changes else "stratified_5_42"


def table(rows: tuple[Row, ...], records: dict[str, Any]) -> str:
    """Return a Markdown table of those of `rows` that are in `records`, highest pooled AUC first."""
    known = sorted((row for row in rows if row.name in records), key=lambda row: -records[row.name]["pooled"][0])
    lines = [
        ("run", "pooled, 95 % interval", "minus base", "folds", "parameters", "MACs", "images/s", "minutes", "config"),
        ("---",) * 9,
    ]
    for row in known:
        record = records[row.name]
        config = " ".join(f"{key}={value}" for key, value in record["config"].items())
        speeds = f"{record['train_images_per_second']:.0f}, {record['predict_images_per_second']:.0f}"
        lines.append(
            (
                f"`{row.name}`",
                "{:.4f} [{:.4f}, {:.4f}]".format(*record["pooled"]),
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(*record["difference"]) if "difference" in record else "",
                " ".join(f"{value:.4f}" for value in record["fold_auc"]),
                f"{record['parameters']:,}",
                f"{record['macs'] / 1e6:.0f} M",
                speeds,
                f"{record['minutes']:.1f}",
                " ".join(row.changes) or " + ".join(record["members"]) or config,
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def stain_table(records: dict[str, Any]) -> str:
    """Return a Markdown table of the AUC over the same number of patches in folds by label and in folds by stain."""
    lines = [("experiment", "mean of folds 0 and 1, by label", "by stain", "falls by"), ("---",) * 4]
    for row in (row for row in STAIN if row.name in records and row.experiment in records):
        plain, stain = (float(np.mean(records[name]["fold_auc"][:2])) for name in (row.experiment, row.name))
        lines.append((f"`{row.experiment}`", f"{plain:.4f}", f"{stain:.4f}", f"{plain - stain:.4f}"))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(records: dict[str, Any]) -> str:
    """Write SCORES.md from `records` and return it."""
    text = TEXT.read_text().format(
        named=table(NAMED, records), trials=table((TRIAL_BASE, STAIN[0], *TRIALS), records), stain=stain_table(records)
    )
    write(HERE / "SCORES.md", lambda file: file.write(text.encode()))
    return text


def main(names: list[str]) -> None:
    """Print SCORES.md as it stands, then bring the rows called `names`, or all without a record, up to date, and print it anew.

    What is finished stays where it is stopped. Raises UserError on a name that is no row's, and as `make`.
    """
    unknown = set(names) - set(ROWS)
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: no such row; choose of {', '.join(ROWS)}")
    records = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    oof = pd.read_csv(OOF, dtype={"id": str}, index_col="id") if OOF.exists() else pd.DataFrame(index=pd.Index([], name="id"))
    print(page(records))
    for name in _in_order(names or [name for name in ROWS if name not in records], records):
        if experiment(ROWS[name].experiment).members:
            oof = mix(ROWS[name], oof, records)
        else:
            make(ROWS[name])
            oof = harvest(ROWS[name], oof, records)
        shared = [row for row in ROWS.values() if row.name in records and scheme(row) == scheme(ROWS[name])]
        for known in shared:
            records[known.name] |= score(known, oof)
        oof.to_csv(OOF, float_format="%.6g", lineterminator="\n")
        write_json(RECORD, records)
        print(page(records))


def _in_order(names: list[str], records: dict[str, Any]) -> list[str]:
    """Return `names` with what they need before them: the members of a blend that have no record."""
    needed = [
        [*(member for member in experiment(ROWS[name].experiment).members if member not in records), name] for name in names
    ]
    return list(dict.fromkeys(itertools.chain.from_iterable(needed)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
