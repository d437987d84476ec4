"""A comparison as one self-contained HTML file: conclusions, table, figures, and pictures of patches."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined

from pcam_kaggle.core.errors import UserError, program
from pcam_kaggle.core.files import write, write_csv
from pcam_kaggle.core.paths import Workspace
from pcam_kaggle.data.folds import read_groups, stain_map
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report import figures
from pcam_kaggle.report.explain import embedding, ensemble_maps
from pcam_kaggle.report.figures import FOLD_RANGE, Plot
from pcam_kaggle.report.gallery import LABELLED_SIDE, Images, augmented, draw_examples, worst_mistakes
from pcam_kaggle.report.mistakes import Tile, jpeg, mistake_tiles, suspect_labels
from pcam_kaggle.runs.evaluation import Evaluation
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import KAGGLE_SCORES, read_submissions
from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.held_out import EvaluationResult, ensemble_mean
from pcam_kaggle.scoring.intervals import unit_of
from pcam_kaggle.scoring.metrics import Floats, Labels
from pcam_kaggle.scoring.results import Unit
from pcam_kaggle.scoring.tables import (
    caption,
    conclusions,
    display_table,
    evaluation_sentences,
    evaluation_table,
    operating_table,
)

OPERATING_POINTS = (
    "A patch is positive if its probability is at least the threshold. Youden: the highest sensitivity + specificity - 1. "
    "95 % and 99 % sensitivity: the highest threshold that reaches it. All three are chosen on the patches of the same table, "
    "so they are optimistic. Thresholds of a blend by rank are ranks. n/a: no patch is positive."
)
TEST_SET = (
    "Of a run with models, a test patch counts once for each of them. D is the largest difference between the cumulative "
    f"distributions (Kolmogorov-Smirnov); over {figures.DIFFERENT}, the caption says that they differ. There is no p-value, "
    "since patches of a slide are correlated. Sets with other fractions of tumour differ, too."
)

TEMPLATE = Path(__file__).with_name("page.html")
MISTAKES_PER_LABEL, MAX_SUSPECTS, EXAMPLES_PER_LABEL, VERSIONS = 6, 12, 2, 5
SUSPECT_SIDE, VERSION_SIDE = 168, 96
LABEL_WORDS = {0: "no tumour", 1: "tumour"}

# The runs that can be scored, with their OOF tables.
Scored = list[tuple[ComparedRun, pd.DataFrame]]


@dataclass(slots=True)
class Section:
    """A section of the report; `text` describes its content, or gives the reason why there is none. Keys are headings."""

    anchor: str
    title: str
    text: str = ""
    plots: list[Plot] = field(default_factory=list)
    tiles: dict[str, list[Tile]] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


def write_report(comparison: Comparison, workspace: Workspace, target: Path) -> None:
    """Write `comparison` to the HTML `target` and `suspect_labels` to a CSV beside it; a section without input says why."""
    reference, shown = comparison.reference, display_table(comparison)
    oof, _ = reference.scored()
    by_name = {run.name: run for run in comparison.runs}
    runs = [by_name[name] for name in shown["run"]]
    scored = [(run, run.scored()[0]) for run in runs if not run.problem]
    sections = [
        *_predictions(scored, reference.name, oof),
        _operating_points(scored, workspace),
        _test_set(scored, workspace),
        _learning(runs, workspace),
        _filled("slides", "AUC by slide", partial(_slide_aucs, scored, comparison, workspace)),
        _held_out(workspace),
        _filled("mistakes", "Worst mistakes", partial(_mistakes, reference.name, oof, workspace)),
        _filled("suspects", "Suspect labels", partial(_suspects, scored, workspace, target)),
        _filled("embedding", "Embedding map", partial(_embedding, comparison, workspace)),
        _filled("augmentation", "Augmentation", partial(_augmentation, reference.name, oof, workspace)),
        _correlation(scored, reference),
        _leaderboard(workspace),
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        heading=f"Run {reference.name}" if len(runs) == 1 else f"{len(runs)} runs compared",
        about=f"{len(oof):,} patches, {oof['label'].mean():.1%} with tumour, in {oof['fold'].nunique()} folds",
        caption=caption(comparison),
        sentences=conclusions(comparison),
        columns=shown.columns[:-1].tolist(),
        cells=shown.to_numpy().tolist(),
        sections=sections,
    )
    write(target, lambda file: file.write(text.encode()))


def _predictions(scored: Scored, name: str, oof: pd.DataFrame) -> list[Section]:
    """Return the figures of each run's predictions; curves have those of the reference `name` beside runs paired with it."""
    drawn = [(run.name, table, (name, oof) if run.pooled else None) for run, table in scored]
    reliability = [figures.reliability(run.name, table) for run, table in scored]
    histograms = [figures.histogram(run.name, table) for run, table in scored]
    text = "The points of a calibrated model are on the diagonal. Calibration affects thresholds, not the AUC."
    return [
        Section("roc", "ROC curves", FOLD_RANGE, [figures.roc(*each) for each in drawn]),
        Section("precision-recall", "Precision-recall curves", FOLD_RANGE, [figures.precision_recall(*each) for each in drawn]),
        Section("histogram", "OOF probabilities by label", "Errors are where the two distributions overlap.", histograms),
        Section("reliability", "Calibration", text, reliability),
    ]


def _operating_points(scored: Scored, workspace: Workspace) -> Section:
    section = Section("operating-points", "Operating points", OPERATING_POINTS)
    pooled = {run.name: (oof["label"].to_numpy(), oof["probability"].to_numpy()) for run, oof in scored}
    section.tables["Out of fold"] = operating_table(pooled)
    stored = [Run(workspace.run(run.name)) for run, _ in scored]
    for folder in sorted(workspace.evaluations.glob("*/")):
        means = {run.name: _held_out_mean(run, Evaluation(folder), workspace) for run in stored}
        means = {name: made for name, made in means.items() if len(made[0])}
        if means:
            section.tables[f"On {folder.name}, by the mean of the models"] = operating_table(means)
        if lacking := [run.name for run in stored if run.name not in means]:
            section.text += f" Not evaluated on {folder.name} with the present models: {', '.join(lacking)}."
    return section


def _held_out_mean(run: Run, evaluation: Evaluation, workspace: Workspace) -> tuple[Labels, Floats]:
    ensemble = run.ensemble()
    members = {name: evaluation.current(Run(workspace.run(name))) for name in ensemble.weights}
    labels, mean, _ = ensemble_mean(ensemble, {name: table for name, table in members.items() if table is not None})
    return labels, mean


def _test_set(scored: Scored, workspace: Workspace) -> Section:
    section = Section("test", "OOF and test probabilities", TEST_SET)
    for run, oof in scored:
        stored = Run(workspace.run(run.name))
        try:
            tables = stored.predictions(run.scored()[1].folds).tests if stored.is_experiment else [stored.test()]
        except UserError as error:
            section.text += f" {run.name}: {_left_out(error)}"
        else:
            test = np.concatenate([table["probability"] for table in tables])
            section.plots.append(figures.oof_and_test(run.name, oof["probability"].to_numpy(), test))
    return section


def _learning(runs: list[ComparedRun], workspace: Workspace) -> Section:
    logs = {run.name: Run(workspace.run(run.name)).logs() for run in runs}
    plots = [figures.learning(name, folds) for name, folds in logs.items() if folds]
    none = "None of these runs has a log: blends and probes have no epochs."
    return Section("learning", "Learning curves", "Per epoch, from each fold's log." if plots else none, plots)


def _filled(anchor: str, title: str, fill: Callable[[Section], None]) -> Section:
    """Return a section that `fill` has filled, with the reason where it could not."""
    section = Section(anchor, title)
    try:
        fill(section)
    except (UserError, OSError, RuntimeError) as error:
        # A missing store or an old checkpoint must not prevent the rest of the report.
        section.text = f"{section.text} {_left_out(error)}".strip()
    return section


def _slide_aucs(scored: Scored, comparison: Comparison, workspace: Workspace, section: Section) -> None:
    reasons: dict[str, None] = {}
    for run, oof in scored:
        try:
            plot = figures.slide_aucs(run.name, oof, *_groups(run, comparison, workspace))
            section.plots += [plot] if plot else []
        except UserError as error:
            reasons[str(error)] = None
    section.text = "Out of fold, within each slide, or stain group where no slides are known, that has patches of both labels."
    if not section.plots or reasons:
        raise UserError("; ".join(reasons) or "these runs have no such slides")


def _groups(run: ComparedRun, comparison: Comparison, workspace: Workspace) -> tuple[pd.DataFrame, Unit]:
    """Return the groups (id, wsi) of the patches of `run`: those compared or of its fold file, otherwise stain groups."""
    groups, unit = comparison.groups, comparison.unit
    if run.unpaired_reason:
        groups, unit = read_groups(workspace.folds / f"{run.scheme}.csv"), unit_of(run.scheme)
    if groups is None:
        return stain_map(_store(run.name, workspace), workspace.folds), "stain group"
    return groups, unit


def _store(name: str, workspace: Workspace) -> PatchStore:
    """Return the store of the patches of the run called `name`, which the members of a blend share."""
    members = [Run(workspace.run(member)) for member in Run(workspace.run(name)).ensemble().weights]
    subsets = [member.made_from().config.get("subset", 0) for member in members if member.is_experiment]
    return PatchStore(workspace.store_of(max(subsets, default=0)))


def _patches(table: pd.DataFrame, name: str, workspace: Workspace) -> Images:
    store = _store(name, workspace)
    return store.images(store.rows("train", table["id"].to_numpy()))


def _held_out(workspace: Workspace) -> Section:
    captions, tables = [], {}
    for folder in sorted(workspace.evaluations.glob("*/")):
        try:
            result = EvaluationResult.read(Evaluation(folder).result_file)
        except UserError as error:
            captions.append(_left_out(error))
        else:
            captions.append(f"{folder.name}: {' '.join(evaluation_sentences(result))}")
            tables[f"Scores on {folder.name}"] = evaluation_table(result)
    none = f"Not available: no run was evaluated on held-out slides (`{program()} evaluate`)."
    return Section("evaluations", "Held-out slides", " ".join(captions) or none, tables=tables)


def _mistakes(name: str, oof: pd.DataFrame, workspace: Workspace, section: Section) -> None:
    ensemble, mistakes = Run(workspace.run(name)).ensemble(), worst_mistakes(oof, MISTAKES_PER_LABEL)
    patches = _patches(mistakes, name, workspace)
    maps, left_out = ensemble_maps(mistakes, patches, ensemble, workspace)
    section.text = (
        f"{name}: the patches with tumour with the lowest probabilities, and those without tumour with the highest. The square "
        f"marks the centre of {LABELLED_SIDE} px that decides the label."
    )
    if maps is not None:
        section.text += (
            " Next to each patch is its Grad-CAM map, from the model that was not trained on the patch, or the weighted mean "
            "of those of a blend's members: bright regions contributed most to the prediction."
        )
    if left_out:
        section.text += f" Without Grad-CAM maps of {'; '.join(left_out)}."
    section.tiles = mistake_tiles(mistakes, patches, maps)


def _suspects(scored: Scored, workspace: Workspace, target: Path, section: Section) -> None:
    ensembles = {run.name: Run(workspace.run(run.name)).ensemble() for run, _ in scored}
    tables = {run.name: oof for run, oof in scored if not ensembles[run.name].ranked}
    single = {name: oof for name, oof in tables.items() if [*ensembles[name].weights] == [name]}
    used = single if len(single) > 1 else tables
    if not used:
        raise UserError("a blend of ranks has no probabilities")
    table, file = suspect_labels(used), target.with_name(f"{target.stem}-suspect-labels.csv")
    write_csv(file, table)
    names = ", ".join(name if name in single else f"{name} (a blend)" for name in used)
    by = f"each of {names} that has predicted the patch, at least two" if len(used) > 1 else f"one run only, {names}"
    section.text = (
        "Train patches labelled tumour with an out-of-fold probability below 0.1, or labelled no tumour with one above 0.9, by "
        f"{by}: {len(table):,}. {file.name} has all, this page the most extreme."
    )
    shown = table.head(MAX_SUSPECTS)
    patches = _patches(shown, max(used, key=lambda name: len(used[name])), workspace)
    for patch, (name, label, *probabilities) in zip(patches, shown.to_numpy(), strict=True):
        text = f"labelled {LABEL_WORDS[label]}: mean probability {np.nanmean(probabilities):.4f}"
        pictures = [(jpeg(patch, SUSPECT_SIDE), f"Patch {name}; a square marks its centre")]
        section.tiles.setdefault("", []).append(Tile(pictures, f"{name[:16]}, {text}", SUSPECT_SIDE))


def _embedding(comparison: Comparison, workspace: Workspace, section: Section) -> None:
    name, fold = comparison.reference.name, min(comparison.folds)
    members = [Run(workspace.run(member)) for member in Run(workspace.run(name)).ensemble().weights]
    run, table = embedding(members, fold, _store(name, workspace))
    section.text = (
        f"Validation patches of fold {fold} under the model of {run.name} that was not trained on them: the features that its "
        "classifier reads, on their first two principal components. Crosses are mistakes at a threshold of 0.5."
    )
    is_wrong = table["label"] != (table["probability"] >= 0.5)
    section.plots = [figures.embedding(run.name, table, table["label"].map(LABEL_WORDS), "label", table[is_wrong])]
    groups, unit = _groups(comparison.reference, comparison, workspace)
    section.plots += [figures.embedding(run.name, table, table["id"].map(groups.set_index("id")["wsi"]), unit)]


def _augmentation(name: str, oof: pd.DataFrame, workspace: Workspace, section: Section) -> None:
    run = Run(workspace.run(name))
    if not run.is_experiment or run.config().probe:
        raise UserError(f"{name} was not trained on augmented patches itself; blends and probes are not")
    config, examples = run.config(), draw_examples(oof, EXAMPLES_PER_LABEL)
    patches = _patches(examples, name, workspace)
    versions = np.split(augmented(np.repeat(patches, VERSIONS, axis=0), config), len(patches))
    section.text = f"{name}: train patches, and beside each {VERSIONS} random versions as the model sees them in training."
    for row, patch, own in zip(examples.itertuples(), patches, versions, strict=True):
        pictures = [(jpeg(patch, VERSION_SIDE), f"Patch {row.id}; a square marks its centre")]
        pictures += [(jpeg(version, VERSION_SIDE, marked=False), "The same patch, augmented") for version in own]
        section.tiles.setdefault("", []).append(Tile(pictures, f"{row.id[:16]}, {LABEL_WORDS[row.label]}", VERSION_SIDE))


def _correlation(scored: Scored, reference: ComparedRun) -> Section:
    section = Section("correlation", "Correlation between runs", "A blend gains most from runs that are accurate and differ.")
    paired = {run.name: oof["probability"] for run, oof in scored if run is reference or run.pooled}
    if len(paired) > 1:
        section.plots = [figures.correlation([*paired], np.stack([*paired.values()]))]
    else:
        section.text = "Not available: needs two runs that are scored on the same patches and folds."
    return section


def _leaderboard(workspace: Workspace) -> Section:
    section = Section("leaderboard", "CV versus LB", "Does a better OOF AUC mean a better score on Kaggle?")
    records = read_submissions(workspace.submissions).values()
    scores = [(made.oof_auc.value, made.public_score, made.private_score) for made in records]
    table = pd.DataFrame(scores, columns=["oof_auc", *KAGGLE_SCORES], dtype=float)
    if table[[*KAGGLE_SCORES]].notna().any(axis=None):
        section.plots = [figures.cv_versus_lb(table)]
    else:
        section.text = "Not available: no submission has a score of Kaggle."
    return section


def _left_out(error: Exception) -> str:
    return f"Left out: {' '.join(str(error).split())[:300]}."
