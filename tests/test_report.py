"""The report: one self-contained file with all figures, checked in a browser; and Grad-CAM."""

import html
import re
import shutil
import subprocess
from pathlib import Path

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
from pcam_kaggle.models.cnn import BottleneckCNN
from pcam_kaggle.pipeline.compare import compare_runs
from pcam_kaggle.report import figures
from pcam_kaggle.report.mistakes import feature_module, grad_cam
from pcam_kaggle.report.page import write_report
from pcam_kaggle.runs.submissions import record_score
from pcam_kaggle.scoring.compare import ComparedRun, Comparison
from pcam_kaggle.scoring.metrics import calibration_error
from pcam_kaggle.scoring.results import Estimate, OofScore

FIGURES = [
    *("ROC curve of bottleneck", "ROC curve of other", "Precision-recall curve of other", "Learning curves of other"),
    *("Learning curves of half", "Histogram of OOF probabilities of other by label", "Reliability diagram of other"),
    *("AUC of other by slide", "Correlation between runs", "Kaggle scores versus OOF AUC"),
]


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
    record_score(work / "submissions", "other", 0.7, 0.6)
    return root


@pytest.fixture
def workspace(shared_reported: Path, tmp_path: Path) -> Workspace:
    """Return a workspace with slides, two finished runs, one of one fold, one damaged, and a submission with scores."""
    shutil.copytree(shared_reported, tmp_path, dirs_exist_ok=True)
    return Workspace(tmp_path / "work", tmp_path / "work" / "store")


def made(workspace: Workspace, *names: str, slides: Path | None = None) -> str:
    target = workspace.root / "reports" / "runs.html"
    write_report(compare_runs(workspace, list(names), None, slides), workspace, target)
    assert [path.name for path in target.parent.iterdir()] == ["runs.html"]
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
    assert len(images) == 24
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
    assert "<h3>Scores on others</h3>" in page
    assert "Left out" not in page
    assert "Not available" not in page
    body = page[page.index("<tbody>") : page.index("</tbody>")]
    rows = [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in body.split("</tr>")]
    assert any(row.startswith("half unfinished: folds 1, 2 lack predictions") for row in rows)
    assert any(re.match(r"broken \S*fold_0/oof\.csv: missing or changed since it was predicted", row) for row in rows)


def test_missing_inputs_are_reported(workspace: Workspace) -> None:
    (workspace.evaluations / "others" / "result.json").write_text("[]")
    page = made(workspace, "bottleneck")
    assert "needs two runs" in page
    assert "Scores on others" not in page
    assert "Left out: " in page
    (workspace.root / "runs" / "bottleneck" / "fold_1" / "best.pt").unlink()
    shutil.rmtree(workspace.submissions)
    shutil.rmtree(workspace.folds)
    with pytest.raises(UserError, match=r"slides_3_42\.csv: missing, .* --slides"):
        made(workspace, "bottleneck")
    ids = pd.read_csv(workspace.root / "runs" / "bottleneck" / "oof.csv")["id"]
    apart = workspace.root / "map.csv"
    pd.DataFrame({"id": ids, "wsi": ids}).to_csv(apart, index=False)
    page = made(workspace, "bottleneck", slides=apart)
    for reason in ("no such checkpoint", "no submission has a score", "no slides with patches of both labels"):
        assert reason in page
    shutil.rmtree(workspace.store)
    assert "no patch store" in made(workspace, "bottleneck", slides=apart)


def test_names_are_escaped_and_a_blend_has_no_grad_cam(tmp_path: Path) -> None:
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
    assert "is a blend or imported, and has no model of its own" in page
    assert "blends and probes have no epochs" in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_renders_the_report_without_errors(workspace: Workspace, width: int, dark: bool, tmp_path: Path) -> None:
    page = made(workspace)
    if dark:
        page = page.replace("(prefers-color-scheme: dark)", "(min-width: 1px)")
    probe = """<script>
    const heads = [...document.querySelectorAll("th button")];
    heads.find((head) => head.textContent.trim() === "pooled").click();
    const first = document.querySelector("tbody th").textContent.trim().split(" ")[0];
    const shown = [...document.querySelectorAll("figure svg, figure img")].filter((each) => each.getBoundingClientRect().width);
    const root = document.documentElement;
    parent.document.title = [root.clientWidth, root.scrollWidth, shown.length, first,
      document.querySelector("th[aria-sort]").textContent.trim()].join("|");
    </script></body>"""
    # No window gets narrower than 500 px, but a frame does.
    framed = tmp_path / "framed.html"
    frame = f'<iframe width="{width}" height="3000" style="border: 0" srcdoc="{html.escape(page.replace("</body>", probe))}">'
    framed.write_text(f"<!doctype html><title>none</title>{frame}</iframe>", encoding="utf-8")
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--enable-logging=stderr", "--virtual-time-budget=3000", "--dump-dom", framed),
        *(f"--window-size={width},3000", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in dumped.stderr
    title = re.search(r"<title>(\S*?)</title>", dumped.stdout)
    assert title, dumped.stdout[:500]
    inner, needed, shown, first, sorted_by = title.group(1).split("|")
    assert int(inner) == int(needed) == width
    assert int(shown) == page.count("<svg") + page.count("<img")
    areas = {run.name: run.scored()[1].pooled.value for run in compare_runs(workspace, [], None, None).runs if not run.problem}
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
    assert max(len(plot.svg) for plot in plots if plot) < 60_000


def test_an_undefined_correlation_is_not_printed_as_nan() -> None:
    values = np.stack([np.arange(9.0), -np.arange(9.0), np.ones(9)])
    some = figures.correlation(["a", "b", "constant"], values)
    none = figures.correlation(["a", "constant"], values[::2])
    assert "-1.000 to -1.000;" in some.caption
    assert "n/a: all predictions of a run are equal" in some.caption
    assert "probabilities: n/a;" in none.caption
    assert "nan" not in some.svg + none.svg


def test_calibration_error_is_the_distance_from_the_diagonal() -> None:
    probabilities = np.repeat([0.2, 0.8], 100)
    labels = np.concatenate([np.arange(100) < 20, np.arange(100) < 80]).astype(int)
    assert calibration_error(labels, probabilities) == pytest.approx(0)
    assert calibration_error(1 - labels, probabilities) == pytest.approx(0.6)


def test_slides_with_one_label_are_excluded() -> None:
    oof = pd.DataFrame({"id": list("abcdef"), "label": [0, 1, 0, 1, 0, 0], "probability": [0.1, 0.9, 0.6, 0.4, 0.5, 0.5]})
    slides = pd.DataFrame({"id": list("abcdef"), "wsi": ["one", "one", "two", "two", "three", "three"]})
    plot = figures.slide_aucs("run", oof, slides)
    assert plot
    assert "2 slides, median 0.5000" in plot.caption
    assert "lowest 0.0000 (two); excluded, with one label only: 1." in plot.caption
    assert figures.slide_aucs("run", oof, slides.iloc[4:]) is None


def test_captions_count_scores_and_name_the_best_epoch() -> None:
    ledger = pd.DataFrame({"oof_auc": [0.1, 0.2, np.nan], "public_score": [0.2, 0.1, 0.3], "private_score": [np.nan, 0.1, 0.2]})
    assert figures.cv_versus_lb(ledger).caption == "Submissions: 2 with a public score, 1 with a private score."
    plot = figures.cv_versus_lb(ledger.assign(private_score=np.nan))
    assert plot.caption == "Submissions: 2 with a public score."
    assert "private" not in plot.svg
    log = pd.DataFrame({"epoch": [1.0, 2.0, 3.0], "train_loss": [0.5, 0.4, 0.3], "valid_auc": [0.8, 0.9, 0.85]})
    assert "(0.9000) after epoch 2." in figures.learning("run", {0: log}).caption


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
