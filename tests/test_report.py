"""The report: one self-contained file with all figures, checked in a browser; and Grad-CAM."""

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_quietly
from torch import nn

from pcam_kaggle.cli.main import main
from pcam_kaggle.core.config import Config
from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.paths import Data, Workspace
from pcam_kaggle.data import folds as folds_module
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.data.tables import read_numbers
from pcam_kaggle.models.cnn import BottleneckCNN
from pcam_kaggle.models.factory import create
from pcam_kaggle.pipeline.compare import compare_runs
from pcam_kaggle.report import figures, gallery
from pcam_kaggle.report.explain import embedding, ensemble_maps, feature_module, features, grad_cam
from pcam_kaggle.report.gallery import suspect_labels
from pcam_kaggle.report.page import write_report
from pcam_kaggle.runs.run import Run
from pcam_kaggle.runs.submissions import record_score
from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.held_out import Ensemble
from pcam_kaggle.scoring.results import Estimate, OofScore
from pcam_kaggle.scoring.tables import operating_table

FIGURES = [
    *("ROC curve of bottleneck", "ROC curve of other", "Precision-recall curve of other", "Learning curves of other"),
    *("Learning curves of half", "Histogram of OOF probabilities of other by label", "Reliability diagram of other"),
    *("AUC of other by slide", "Correlation between runs", "Kaggle scores versus OOF AUC"),
    *("Embedding of other by label", "Embedding of other by slide"),
    "OOF and test probabilities of other",
]
FOLDS = ["fold_0", "fold_1", "fold_2"]


@pytest.fixture(scope="module")
def shared_reported(shared_data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data and the workspace of `workspace`, which no test may change."""
    root = tmp_path_factory.mktemp("reported")
    data, work = Data(shutil.copytree(shared_data.root, root / "data")), root / "work"
    ids = pd.read_csv(data.labels)["id"]
    slides = pd.DataFrame({"id": ids, "wsi": [f"slide_{n // 4}" for n in range(len(ids))]})
    slides.to_csv(data.root / "patch_id_wsi.csv", index=False)
    for arguments in ([], ["--set", "lr=0.01", "--name", "other"], ["--name", "half", "--folds", "0"]):
        run_quietly(data, work, *arguments)
    sample = pd.read_csv(data.sample)
    sample.assign(label=[n % 2 for n in range(len(sample))]).to_csv(root / "labels.csv", index=False)
    patches = ["--patches", str(data.patches("test")), "--labels", str(root / "labels.csv"), "--name", "others"]
    assert main(["evaluate", "bottleneck", "other", "--work", str(work), *patches]) == 0
    shutil.copytree(work / "runs" / "other", work / "runs" / "broken")
    (work / "runs" / "broken" / "fold_0" / "oof.csv").write_text("id,<b>label</b>\n")
    record_score(work / "submissions" / "other.csv", public_score=0.7, private_score=0.6)
    return root


@pytest.fixture
def workspace(shared_reported: Path, tmp_path: Path) -> Workspace:
    """Return a workspace with slides, two finished runs, one of one fold, one damaged, and a submission with scores."""
    shutil.copytree(shared_reported, tmp_path, dirs_exist_ok=True)
    return Workspace(tmp_path / "work", tmp_path / "work" / "store")


def made(workspace: Workspace, *names: str, slides: Path | None = None) -> str:
    target = workspace.root / "reports" / "runs.html"
    write_report(compare_runs(workspace, list(names), None, slides), workspace, target)
    assert sorted(path.name for path in target.parent.iterdir()) == ["runs-suspect-labels.csv", "runs.html"]
    return target.read_text(encoding="utf-8")


def alternatives(page: str) -> list[str]:
    """Return the text alternatives of all figures in `page`; each figure must have one."""
    found = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(found) == page.count("<svg")
    return [html.unescape(text) for text in found]


def test_the_report_has_all_figures_runs_and_no_external_references(workspace: Workspace) -> None:
    page = made(workspace)
    assert len(page.encode()) < 3_000_000
    texts = alternatives(page)
    for figure in FIGURES:
        assert any(text.startswith(f"{figure}. ") for text in texts), figure
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 12 * 2 + 4 * 6
    for image in images:
        assert re.search(r'src="data:image/jpeg;base64,/9j/[^"]{500,}"', image)
        assert re.search(r'alt="[^"]{20,}"', image)
    links = [link for pair in re.findall(r'(?:src|href)="([^"]*)"|url\(([^)]*)\)', page) for link in pair if link]
    assert links
    assert all(link.startswith(("#", "data:")) for link in links)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert "aria-sort" in page
    for title in ("Scores on others", "Out of fold", "On others, by the mean of the models"):
        assert f"<h3>{title}</h3>" in page
    assert page.count("<td>99 % sensitivity</td>") == 4
    evaluated = read_numbers(workspace.evaluations / "others" / "predictions" / "other.csv", ["label", *FOLDS])
    row = operating_table({"other": (evaluated["label"].to_numpy(), evaluated[FOLDS].mean(axis=1).to_numpy())}).iloc[2, 2:]
    cells = r"\s*".join(f"<td>{cell}</td>" for cell in row)
    assert re.search(rf"other</th>\s*<td>95 % sensitivity</td>\s*{cells}", page[page.index("<h3>On others") :])
    assert "Left out" not in page
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in body.split("</tr>")]
    assert any(row.startswith("half unfinished: folds 1, 2 lack predictions") for row in rows)
    assert any(re.match(r"broken \S*fold_0/oof\.csv: missing or changed since it was predicted", row) for row in rows)


def test_missing_inputs_are_reported(workspace: Workspace) -> None:
    (workspace.evaluations / "others" / "result.json").write_text("[]")
    (workspace.root / "runs" / "bottleneck" / "fold_1" / "test.csv").unlink()
    page = made(workspace, "bottleneck")
    assert "needs two runs" in page
    assert "Scores on others" not in page
    assert "Left out: " in page
    assert re.search(r"Left out: \S*bottleneck/fold_1/test\.csv: missing", page)
    for fold in (0, 1):
        (workspace.root / "runs" / "bottleneck" / f"fold_{fold}" / "best.pt").unlink()
    shutil.rmtree(workspace.submissions)
    shutil.rmtree(workspace.folds)
    with pytest.raises(UserError, match=r"slides_3_42\.csv: missing, .* --slides"):
        made(workspace, "bottleneck")
    ids = pd.read_csv(workspace.root / "runs" / "bottleneck" / "oof.csv")["id"]
    apart = workspace.root / "map.csv"
    pd.DataFrame({"id": ids, "wsi": ids}).to_csv(apart, index=False)
    page = made(workspace, "bottleneck", slides=apart)
    assert "Not evaluated on others with the present models: bottleneck." in page
    for reason in (
        "no such checkpoint",
        "no submission has a score",
        "no slide has patches of both labels",
        "no run here has a model",
    ):
        assert reason in page
    assert filled(page)["mistakes"] == 12
    shutil.rmtree(workspace.store)
    page = made(workspace, "bottleneck", slides=apart)
    assert page.count("no patch store") == 4
    assert "runs-suspect-labels.csv has all, this page the most extreme. Left out: " in page


def test_names_are_escaped(tmp_path: Path) -> None:
    oof = pd.DataFrame({"id": list("abcd"), "label": [0, 1, 0, 1], "fold": [0, 0, 1, 1], "probability": [0.1, 0.9, 0.6, 0.4]})
    area = Estimate(value=0.5, low=0.0, high=1.0)
    scores = {"fold_auc": [1.0, 0.0], "mean": 0.5, "sd": 0.7, "pooled": area, "ranked": area}
    run = ComparedRun('<script>"&', metrics=OofScore(folds=[0, 1], **scores), oof=oof)
    write_report(
        Comparison([run], run, "patch", None, "baseline", []), Workspace(tmp_path, tmp_path / "store"), tmp_path / "page.html"
    )
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    assert any('<script>"&' in text for text in alternatives(page))
    assert "no such run, or not blended" in page
    assert "blends and probes have no epochs" in page


def filled(page: str) -> dict[str, int]:
    """Return the number of figures, pictures and tables in each section of `page`."""
    sections = re.findall(r'<section id="(.*?)"(.*?)</section>', page, re.DOTALL)
    return {name: len(re.findall("<svg|<img|<table", content)) for name, content in sections}


@pytest.fixture
def blended(workspace: Workspace) -> Workspace:
    """Return `workspace` with the blend `both` of its two finished runs."""
    assert main(["blend", "bottleneck", "other", "--name", "both", "--work", str(workspace.root)]) == 0
    return workspace


@pytest.fixture
def by_label(finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Return a workspace with a run on folds by label, whose few patches make four stain groups."""
    monkeypatch.setattr(folds_module, "STAIN_GROUPS", 4)
    return Workspace(finished_run, finished_run / "store")


def test_a_blend_has_the_weighted_mean_of_its_members_maps(blended: Workspace) -> None:
    oof = Run(blended.run("both")).oof().iloc[:6]
    patches = PatchStore(blended.store).images(np.arange(6))

    def maps(**weights: float) -> Any:
        return ensemble_maps(oof, patches, Ensemble("any", weights), blended)

    (first, _), (second, _) = maps(bottleneck=1.0), maps(other=1.0)
    assert np.abs(first - second).max() > 0.1
    assert np.allclose(maps(bottleneck=0.75, other=0.25)[0], 0.75 * first + 0.25 * second)
    (blended.run("other") / "fold_0" / "best.pt").unlink()
    mean, left_out = maps(bottleneck=0.5, other=0.3, gone=0.2, unused=0.0)
    assert np.array_equal(mean, first)
    assert [reason.split(" (")[0] for reason in left_out] == ["other", "gone"]
    assert maps(gone=1.0)[0] is None
    assert "Without Grad-CAM maps of other (" in made(blended, "both")


TABLES = {
    "a": [("p", 1, 0.05), ("q", 1, 0.05), ("r", 0, 0.97), ("s", 0, 0.92), ("t", 0, 0.1)],
    "b": [("p", 1, 0.02), ("q", 1, 0.11), ("s", 0, 0.99), ("t", 0, 0.05)],
    "c": [("s", 0, 0.96), ("p", 1, 0.04)],
    "d": [("s", 0, 0.9)],
}


@pytest.mark.parametrize(("runs", "found"), [("a", "rpqs"), ("ab", "ps"), ("abc", "ps"), ("abd", "p"), ("cd", ""), ("d", "")])
def test_labels_are_suspect_where_every_run_contradicts_them(runs: str, found: str) -> None:
    table = suspect_labels({run: pd.DataFrame(TABLES[run], columns=["id", "label", "probability"]) for run in runs})
    assert "".join(table["id"]) == found
    assert [*table] == ["id", "label", *(f"probability_{run}" for run in runs)]


@pytest.mark.slow
def test_suspect_labels_rest_on_runs_that_are_not_blends(blended: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gallery, "CERTAIN", 0.0)
    assert filled(made(blended, "bottleneck", "other", "both"))["suspects"] == 12
    table = pd.read_csv(blended.root / "reports" / "runs-suspect-labels.csv")
    assert sorted(table) == ["id", "label", "probability_bottleneck", "probability_other"]
    assert len(table) == 36
    assert "by one run only, both (a blend): 36. runs-suspect-labels.csv has all" in made(blended, "both")


@pytest.mark.parametrize("fields", ["lr=1", "symmetry=d4 width=16", "model=timm:resnet10t", "model=timm:mobilenetv3_small_050"])
def test_features_are_what_the_classifier_reads(tiny: Config, fields: str) -> None:
    net, images = create(tiny.changed(fields.split())).eval(), torch.rand(3, 3, 32, 32)
    classifier = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    assert torch.allclose(classifier(features(net, images))[:, 0], net(images), atol=1e-6)
    assert not classifier._forward_pre_hooks


def test_an_embedding_has_the_principal_components_of_one_fold(blended: Workspace) -> None:
    runs = [Run(blended.run(name)) for name in ("bottleneck", "other", "gone")]
    run, table = embedding(runs, 1, PatchStore(blended.store))
    assert run.fold(1).metrics().valid_auc == max(each.fold(1).metrics().valid_auc for each in runs[:2])
    assert table.drop(columns=["x", "y"]).sort_values("id", ignore_index=True).equals(run.fold(1).oof())
    x, y = table["x"], table["y"]
    assert x.var() > y.var() > 0
    assert np.allclose([x.mean(), y.mean(), x.cov(y)], 0, atol=1e-4 * x.var())
    plot = figures.embedding("run", table, pd.Series([f"s{n:02d}" for n in range(len(table))]), "slide", table[:3])
    sizes = {line.get_label(): len(line.get_xdata()) for line in plot.figure.axes[0].lines}
    assert sizes == {"others": len(table) - 10, **{f"s{n:02d} (1)": 1 for n in range(10)}, "mistake (3)": 3}


def test_patches_are_grouped_by_stain_where_no_slides_are_known(by_label: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text.split(". ")[0] for text in alternatives(made(by_label)) if text.count("stain group") == 2]
    assert sorted(texts) == ["AUC of bottleneck by stain group", "Embedding of bottleneck by stain group"]
    next(by_label.folds.glob("stain_groups_*.csv")).unlink()
    monkeypatch.undo()
    page = made(by_label)
    assert page.count("too few for 50 groups") == 2
    assert filled(page)["embedding"] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize(
    ("width", "dark", "case"),
    [
        *((width, dark, ("workspace", "", "")) for width in (400, 1400) for dark in (False, True)),
        (400, True, ("by_label", "bottleneck", "evaluations,correlation,leaderboard")),
        (1400, False, ("blended", "both", "learning,augmentation,correlation")),
    ],
)
def test_a_browser_renders_every_section_without_errors(
    width: int, dark: bool, case: tuple[str, str, str], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture, name, empty = case
    workspace: Workspace = request.getfixturevalue(fixture)
    folder = workspace.root
    monkeypatch.setattr(gallery, "CERTAIN", 0.0)
    page = made(workspace, *name.split())
    if dark:
        page = page.replace("(prefers-color-scheme: dark)", "(min-width: 1px)")
    probe = """<script>
    const heads = [...document.querySelectorAll("th button")];
    heads.find((head) => head.textContent.trim() === "pooled").click();
    const first = document.querySelector("tbody th").textContent.trim().split(" ")[0];
    const shown = [...document.querySelectorAll("figure svg, figure img")].filter((each) => each.getBoundingClientRect().width);
    const empty = [...document.querySelectorAll("section")].filter((each) => !each.querySelector("svg, img, table"));
    const root = document.documentElement;
    parent.document.title = [root.clientWidth, root.scrollWidth, shown.length, empty.map((each) => each.id), first,
      document.querySelector("th[aria-sort]").textContent.trim()].join("|");
    </script></body>"""
    # No window gets narrower than 500 px, but a frame does.
    framed = folder / "framed.html"
    frame = f'<iframe width="{width}" height="3000" style="border: 0" srcdoc="{html.escape(page.replace("</body>", probe))}">'
    framed.write_text(f"<!doctype html><title>none</title>{frame}</iframe>", encoding="utf-8")
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", framed),
        *(f"--window-size={width},3000", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}"),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in dumped.stderr
    title = re.search(r"<title>(\S*?)</title>", dumped.stdout)
    assert title, dumped.stdout[:500]
    inner, needed, shown, lacking, first, sorted_by = title.group(1).split("|")
    assert int(inner) == int(needed) == width
    assert int(shown) == page.count("<svg") + page.count("<img")
    assert lacking == empty
    runs = compare_runs(workspace, name.split(), None, None).runs
    areas = {run.name: run.scored()[1].pooled.value for run in runs if not run.problem}
    assert (first, sorted_by) == (min(areas, key=areas.__getitem__), "pooled")


def test_figures_of_all_patches_are_small() -> None:
    rng = np.random.default_rng(0)
    n = 201_799
    labels = rng.integers(0, 2, n)
    values = 1 / (1 + np.exp(-(rng.normal(size=n) + 2 * labels - 1)))
    oof = pd.DataFrame({"id": [f"{k:06d}" for k in range(n)], "label": labels, "fold": np.arange(n) % 5, "probability": values})
    slides = pd.DataFrame({"id": oof["id"], "wsi": [f"slide_{k % 200}" for k in range(n)]})
    other = ("base", oof)
    plots = [figures.slide_aucs("a", oof, slides), figures.roc("a", oof, other), figures.precision_recall("a", oof, other)]
    plots += [figures.histogram("a", oof), figures.reliability("a", oof)]
    assert max(len(plot.svg) for plot in plots) < 60_000


@pytest.mark.parametrize("draw", [figures.roc, figures.precision_recall])
def test_an_inset_has_the_corner_that_good_curves_enter(draw: Callable[..., figures.Plot]) -> None:
    labels = np.arange(400) % 2
    for noise, is_good in ((0.3, True), (5.0, False)):
        values = labels + noise * np.random.default_rng(0).normal(size=400)
        plot = draw("run", pd.DataFrame({"label": labels, "fold": 0, "probability": values}))
        insets = plot.figure.axes[0].child_axes
        assert [len(insets), "Inset" in plot.caption] == [is_good, is_good]
        for inset in insets:
            x, y = inset.lines[0].get_data()
            inside = (np.abs(np.array(x) - np.mean(inset.get_xlim())) < 0.1) & (np.array(y) > inset.get_ylim()[0])
            assert inside.sum() > 50


@pytest.mark.parametrize(("shift", "distance"), [(0, "0.000"), (50, "0.050"), (250, "0.250")])
def test_test_probabilities_are_said_to_differ_where_they_do(shift: int, distance: str) -> None:
    ranks = np.arange(1, 1000)
    plot = figures.oof_and_test("run", pd.DataFrame({"probability": ranks / 2000}), np.repeat(ranks + shift, 5) / 2000)
    assert f"mean probability 0.250 out of fold, {0.25 + shift / 2000:.3f} on the test set; D = {distance}." in plot.caption
    assert ("They differ" in plot.caption) == (shift == 250)


def test_slides_with_one_label_are_excluded() -> None:
    oof = pd.DataFrame({"id": list("abcdef"), "label": [0, 1, 0, 1, 0, 0], "probability": [0.1, 0.9, 0.6, 0.4, 0.5, 0.5]})
    slides = pd.DataFrame({"id": list("abcdef"), "wsi": ["one", "one", "two", "two", "three", "three"]})
    plot = figures.slide_aucs("run", oof, slides)
    assert plot
    assert "2 slides, median 0.5000" in plot.caption
    assert "lowest 0.0000 (two); excluded, with one label only: 1." in plot.caption
    with pytest.raises(UserError, match="run: no slide has patches of both labels"):
        figures.slide_aucs("run", oof, slides.iloc[4:])


def test_captions_count_scores_and_name_the_best_epoch() -> None:
    ledger = pd.DataFrame({"oof_auc": [0.1, 0.2, np.nan], "public_score": [0.2, 0.1, 0.3], "private_score": [np.nan, 0.1, 0.2]})
    assert figures.cv_versus_lb(ledger).caption == "Submissions: 2 with a public score, 1 with a private score."
    plot = figures.cv_versus_lb(ledger.assign(private_score=np.nan))
    assert plot.caption == "Submissions: 2 with a public score."
    assert "private" not in plot.svg
    log = pd.DataFrame({"epoch": [1.0, 2.0, 3.0], "train_loss": [0.5, 0.4, 0.3], "valid_auc": [0.8, 0.9, 0.85]})
    for table, drawn in ((log.assign(valid_loss=np.nan), 1), (log.assign(valid_loss=[np.nan, 0.5, 0.4]), 2)):
        plot = figures.learning("run", {0: table, 1: table})
        assert "(0.9000) after epoch 2." in plot.caption
        assert (figures.LOSSES in plot.caption) == (drawn == 2)
        assert len(plot.figure.axes[1].lines) == 3 * drawn


def darkness() -> nn.Module:
    """Return a model whose logit is the mean darkness of the image; a second channel for brightness has zero weight."""
    conv, linear = nn.Conv2d(3, 2, 3, padding=1, padding_mode="replicate"), nn.Linear(2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.stack([torch.full((3, 3, 3), -1 / 27), torch.full((3, 3, 3), 1 / 27)]))
        conv.bias.copy_(torch.tensor([1.0, 0.0]))
        linear.weight.copy_(torch.tensor([[1.0, 0.0]]))
    body = nn.Sequential(conv, nn.ReLU(inplace=True), nn.AvgPool2d(4))
    after = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)
    return nn.Sequential(body, after, nn.Flatten(0)).eval()


@pytest.mark.parametrize(("top", "left"), [(8, 40), (48, 48)])
def test_grad_cam_peaks_where_the_logit_comes_from(top: int, left: int) -> None:
    images = torch.ones(1, 3, 64, 64)
    images[..., top : top + 8, left : left + 8] = 0
    heat = grad_cam(darkness(), images, torch.ones(1))[0]
    assert heat.shape == (64, 64)
    assert float(heat.max()) == pytest.approx(1)
    row, column = divmod(int(heat.argmax()), 64)
    assert top <= row < top + 8
    assert left <= column < left + 8
    assert heat[:, : left - 4].max() < 0.1
    assert not grad_cam(darkness(), images, -torch.ones(1)).any()


def test_grad_cam_does_not_change_the_net(tiny: Config) -> None:
    net = BottleneckCNN(tiny.n_blocks, tiny.width, tiny).eval()
    images = torch.rand(3, 3, 32, 32)
    before = net(images)
    heat = grad_cam(net, images, torch.tensor([1.0, -1.0, 1.0]))
    assert heat.shape == (3, 32, 32)
    assert torch.equal(net(images), before)
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert feature_module(net, images) is net.blocks
    with pytest.raises(UserError, match="more than one position"):
        grad_cam(nn.Sequential(nn.Flatten(), nn.Linear(3072, 1), nn.Flatten(0)), images, torch.ones(3))
