"""Scores of experiments and of trials that change them: trains what has no record, writes the tables of SCORES.md.

`python -m benchmarks.scores [NAME …]`, with PCAM_DATA naming the competition's folder, and PCAM_HELD_OUT a folder with
`patches/` and `labels.csv` of held-out slides. scores/records.json has the cost and the scores of every row; the page needs
nothing else. scores/oof.npz and scores/held_out.npz have the probabilities (float32) of the rows that this module trains, for
differences to a row that is trained again.
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

from benchmarks.results import markdown, replace_block
from pcam_kaggle.cli.main import main as run_command
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import BASELINE, PROBE, QUICK, experiment
from pcam_kaggle.core.files import write
from pcam_kaggle.core.paths import Workspace, find_data, find_workspace
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.runs.evaluation import UNCHANGED
from pcam_kaggle.runs.run import Run
from pcam_kaggle.scoring.metrics import auc
from pcam_kaggle.scoring.resampling import interval, paired_test, unit_of

HERE = Path(__file__).parent
PAGE = HERE / "SCORES.md"
RECORDS = HERE / "scores" / "records.json"
ID_LENGTH = 16
BY_LABEL, BY_STAIN = "stratified_5_42", "stain_5_42"
# Columns (uint8) beside those of the rows: label, fold under each scheme, and group of similar stain.
TABLES = {"oof": ("label", BY_LABEL, BY_STAIN, "stain_group"), "held_out": ("label",)}
SPEEDS = ("train_images_per_second", "predict_images_per_second")
ALL = (0, 1, 2, 3, 4)
DECIMALS = 8
Records = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Row:
    """A run to score: an experiment with `changes` to its config, on `folds`, compared with the row called `base`."""

    name: str
    experiment: str
    base: str = BASELINE
    changes: tuple[str, ...] = ()
    folds: tuple[int, ...] = (0,)

    @property
    def scheme(self) -> str:
        return BY_STAIN if "groups=stain" in self.changes else BY_LABEL

    @property
    def table(self) -> str:
        """The table of the page that lists the row."""
        if self.scheme == BY_STAIN:
            return "stain"
        return "trials" if self.changes else "experiments"


LARGER = "resize=144"
ROWS = {
    row.name: row
    for row in (
        *(Row(name, name, folds=ALL) for name in (BASELINE, QUICK, "bottleneck", "lite0", "lite0-seed43", "pretrained")),
        Row("bottleneck_d4", "bottleneck_d4"),
        Row("lite0-resize_144", "lite0", "lite0", (LARGER,)),
        Row("lite0-resize_192", "lite0", "lite0", ("resize=192",)),
        Row("lite0-layer_decay_0.95-lr_0.002", "lite0", "lite0", ("layer_decay=0.95", "lr=0.002")),
        Row("lite0-resize_144-freeze_0.5", "lite0", "lite0-resize_144", (LARGER, "freeze=0.5")),
        Row("lite0-resize_144-pool_gem", "lite0", "lite0-resize_144", (LARGER, "pool=gem")),
        Row("lite0-probe", "lite0", "lite0", PROBE, ALL),
        Row("lite0-probe-catavgmax", "lite0", "lite0-probe", (*PROBE, "pool=catavgmax"), ALL),
        Row("lite0-probe-224", "lite0", "lite0-probe", (*PROBE, "resize=224"), ALL),
        Row("plain-stain", BASELINE, "plain-stain", ("groups=stain",), (0, 1)),
        Row("bottleneck-stain", "bottleneck", "plain-stain", ("groups=stain",), (0, 1)),
    )
}


@dataclass(frozen=True, slots=True)
class Scored:
    """What is recorded.

    Attributes:
        records: Cost, config, `base`, `change` and `scores` of each row, and `table`, the table of the page that lists it. The
            `change` of a row that is not in `ROWS` may be one that the package no longer has a field for.
        oof: By the first 16 digits of the id: label, fold and group, and the OOF probabilities of each row, NaN where it
            predicts no patch.
        held_out: The same for the patches of held-out slides: label, and a column per row, by its model of fold 0.
    """

    records: Records
    oof: pd.DataFrame
    held_out: pd.DataFrame

    @classmethod
    def load(cls) -> "Scored":
        return cls(json.loads(RECORDS.read_text()), *(_read(name) for name in TABLES))

    def save(self) -> None:
        """Write the records, one line each, and both tables."""
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(self.records[name])}" for name in sorted(self.records))
        write(RECORDS, lambda file: file.write(f"{{\n{lines}\n}}\n".encode()))
        for name, facts in TABLES.items():
            table = getattr(self, name)
            arrays: dict[str, Any] = {"id": table.index.to_numpy(f"S{ID_LENGTH}")}
            arrays |= {fact: table[fact].to_numpy(np.uint8) for fact in facts}
            arrays |= {row: table[row].to_numpy(np.float32) for row in sorted(ROWS.keys() & table)}
            write(HERE / "scores" / f"{name}.npz", lambda out, arrays=arrays: np.savez_compressed(out, **arrays))


def _read(name: str) -> pd.DataFrame:
    with np.load(HERE / "scores" / f"{name}.npz") as arrays:
        columns = {key: arrays[key].astype(np.uint8 if key in TABLES[name] else np.float64) for key in arrays if key != "id"}
        return pd.DataFrame(columns, index=arrays["id"].astype(str))


def _workspace() -> Workspace:
    return find_workspace(os.environ.get("PCAM_WORK"))


def make(row: Row) -> None:
    """Run the stages of `row` that are not finished.

    Raises:
        UserError: There are no data, or a stage fails; the stage prints the reason.
    """
    if find_data(os.environ.get("PCAM_DATA"), _workspace().root) is None or not os.environ.get("PCAM_HELD_OUT"):
        raise UserError(f"{row.name}: has no record, and training it needs patches; set PCAM_DATA and PCAM_HELD_OUT")
    options = ["-e", row.experiment, "--name", row.name, *(part for change in row.changes for part in ("--set", change))]
    folds = ["--folds", ",".join(map(str, row.folds))]
    held_out = Path(os.environ["PCAM_HELD_OUT"])
    patches = ["--patches", str(held_out / "patches"), "--labels", str(held_out / "labels.csv"), "--name", "held_out"]
    stages = [[*stage, *options] for stage in (["prepare"], ["folds"], ["train", *folds], ["predict", *folds])]
    if row.scheme == BY_LABEL:
        stages.append(["evaluate", row.name, "--folds", "0", *patches])
    for stage in stages:
        if run_command(stage):
            raise UserError(f"{row.name}: not scored, because {stage[0]} failed")


def harvest(row: Row, scored: Scored) -> None:
    """Add the cost of the finished run of `row` and its probabilities to `scored`."""
    run = Run(_workspace().run(row.name))
    folds = [run.fold(number) for number in row.folds]
    metrics = [fold.metrics() for fold in folds]
    made, defaults = run.environments()[-1], dataclasses.asdict(Config())
    config = dataclasses.asdict(experiment(row.experiment).config.changed(list(row.changes)))
    scored.records[row.name] = {
        "parameters": metrics[0]["parameters"],
        "macs": metrics[0]["macs"],
        "train_images_per_second": round(float(np.median([fold["images_per_second"] for fold in metrics])), 1),
        "predict_images_per_second": round(float(np.median([fold.prediction_rate() for fold in folds])), 1),
        "minutes": round(sum(fold["seconds"] for fold in metrics) / 60, 1),
        "config": {key: value for key, value in config.items() if value != defaults[key]},
        "base": row.base,
        "change": " ".join(f"`{change}`" for change in row.changes if change not in ROWS[row.base].changes)
        or "named experiment",
        "backend": f"{made['device']}, {made['backend']['precision']}",
        "commit": made["commit"],
        "table": row.table,
    }
    oof = scored.oof
    _add_column(oof, row, pd.concat([fold.predictions()[0] for fold in folds]), "probability", oof[row.scheme].isin(row.folds))
    if row.scheme == BY_LABEL:
        evaluated = read_numbers(_workspace().evaluations / "held_out" / UNCHANGED / f"{row.name}.csv", ["fold_0"])
        _add_column(scored.held_out, row, evaluated, "fold_0", scored.held_out["label"].notna())


def _add_column(table: pd.DataFrame, row: Row, predicted: pd.DataFrame, column: str, wanted: pd.Series) -> None:
    """Add the `column` of `predicted` to `table`, for the `wanted` patches of it."""
    found = predicted.set_index(predicted["id"].str[:ID_LENGTH])[column]
    if set(found.index) != set(table.index[wanted]):
        raise UserError(f"{row.name}: predicts other patches than those recorded in scores/; use the same data and folds")
    table[row.name] = found.reindex(table.index)


def add_blend(scored: Scored, name: str = "blend") -> None:
    """Add the experiment `name`, a mean of others: the mean of their probabilities, the sum of their costs."""
    members = list(experiment(name).members)
    made = [scored.records[member] for member in members]
    scored.records[name] = {
        **{key: sum(each[key] for each in made) for key in ("parameters", "macs", "minutes")},
        **{key: 1 / sum(1 / each[key] for each in made) for key in SPEEDS},
        "base": BASELINE,
        "change": f"mean of {', '.join(members)}",
        "table": "experiments",
    }
    for table in (scored.oof, scored.held_out):
        table[name] = table[members].mean(axis=1, skipna=False)


def score(scored: Scored, name: str, scheme: str) -> dict[str, Any]:
    """Return the AUC and its interval of `name` for `oof`, `fold_0` of it and `held_out`, and the difference to its base.

    The unit of resampling is what the folds keep together: patches, or groups of similar stain.
    """
    oof, base, found = scored.oof.dropna(subset=name), scored.records[name]["base"], {}
    for key, table in {"oof": oof, "fold_0": oof[oof[scheme] == 0], "held_out": scored.held_out}.items():
        if name in table:
            unit, labels = unit_of(scheme), table["label"].to_numpy(int)
            groups = None if unit == "patch" else table["stain_group"].to_numpy(np.int64)
            found[key] = _rounded(interval(labels, table[name].to_numpy(), groups, unit)[:3])
            if base != name and base in table and table[base].notna().all():
                test = paired_test(labels, table[base].to_numpy(), groups, unit)
                found[f"{key}_difference"] = _rounded(test(table[name].to_numpy())[:3])
    folds = [auc(part["label"].to_numpy(int), part[name].to_numpy()) for _, part in oof.groupby(scheme)]
    return {**found, "folds": _rounded(folds)}


def _rounded(values: Any) -> list[float]:
    return [round(float(value), DECIMALS) for value in values]


def _text(values: list[float] | None, sign: str = "") -> str:
    """Return a value with its interval, nothing without a value."""
    return f"{{:{sign}.4f}} [{{:{sign}.4f}}, {{:{sign}.4f}}]".format(*values) if values else ""


def experiments_table(records: Records) -> str:
    lines = []
    for name, record in _listed(records, "experiments", "held_out"):
        scores = record["scores"]
        lines.append(
            (
                f"`{name}`",
                *(_text(scores["held_out"]), _text(scores.get("held_out_difference"), "+")),
                _text(scores["oof"]) + (" (fold 0)" if len(scores["folds"]) == 1 else ""),
                _text(scores.get("oof_difference"), "+"),
                *(f"{record['parameters']:,}", ", ".join(f"{record[key]:.0f}" for key in SPEEDS)),
                f"{record['minutes'] / len(scores['folds']):.1f}",
            )
        )
    difference = f"difference to `{BASELINE}`"
    return markdown(
        ("experiment", "held-out slides", difference, "OOF", difference, "parameters", "images/s", "minutes per fold"), lines
    )


def trials_table(records: Records) -> str:
    lines = []
    for _, record in _listed(records, "trials", "held_out_difference"):
        scores = record["scores"]
        values = (_text(scores["held_out_difference"], "+"), f"{scores['fold_0_difference'][0]:+.4f}")
        lines.append((record["change"], f"`{record['base']}`", f"{scores['held_out'][0]:.4f}", *values))
    return markdown(("change", "in", "held-out slides", "difference", "OOF, difference"), lines)


def stain_table(records: Records) -> str:
    lines = [
        (f"`{name}`", record["change"], _text(record["scores"]["oof"]), _text(record["scores"].get("oof_difference"), "+"))
        for name, record in _listed(records, "stain", "oof")
    ]
    return markdown(("run", "change", "OOF of two folds", "difference"), lines)


def _listed(records: Records, table: str, key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows that `table` lists, those with the highest score `key` first."""
    listed = [(name, record) for name, record in records.items() if record.get("table") == table]
    return sorted(listed, key=lambda row: row[1]["scores"][key][0], reverse=True)


def main(names: list[str]) -> None:
    """Train and record the rows called `names`, or all without a record, then write SCORES.md.

    Raises:
        UserError: A name is not one of a row, or training fails as in `make`.
    """
    if unknown := set(names) - set(ROWS):
        raise UserError(f"{', '.join(sorted(unknown))}: no such row; choose from {', '.join(ROWS)}")
    scored = Scored.load()
    for row in (ROWS[name] for name in names or [name for name in ROWS if name not in scored.records]):
        make(row)
        harvest(row, scored)
    add_blend(scored)
    for name in scored.oof.columns.drop([*TABLES["oof"]]):
        scored.records[name]["scores"] = score(scored, name, ROWS[name].scheme if name in ROWS else BY_LABEL)
    scored.save()
    for name, table in (("experiments", experiments_table), ("trials", trials_table), ("stain", stain_table)):
        replace_block(PAGE, name, table(scored.records))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
