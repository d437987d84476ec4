"""Draw docs/notebook.jpg and docs/notebook_narrow.jpg: the notebook for Kaggle after a run on the patches of PCAM_DATA.

Needs nbconvert and chromium.
"""

import os
import subprocess
import tempfile
from pathlib import Path

import cv2
import nbformat
from nbclient import NotebookClient

from pcam_kaggle.core.paths import COMPETITION
from pcam_kaggle.kaggle.notebook import Settings, notebook

SETTINGS = Settings("quick", allow_cpu=True)
STAGES = ("settings", "prepare", "patches", "augmentation", "train", "curves", "mistakes", "summary")
# Width of the window and the stages of each picture.
PICTURES = {"notebook.jpg": (1400, STAGES), "notebook_narrow.jpg": (400, ("settings", "curves", "summary"))}
MAX_WIDTH = 1000
HEIGHT = 9000
BROWSER = ("chromium", "--headless", "--no-sandbox", "--hide-scrollbars", "--allow-file-access-from-files")
CONVERT = ("jupyter-nbconvert", "--to", "html", "--log-level=ERROR", "--TagRemovePreprocessor.remove_cell_tags=package")


def main() -> None:
    """Execute the notebook in a folder laid out as Kaggle's, and write the pictures of its stages."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        made = execute(root)
        for name, (width, stages) in PICTURES.items():
            draw(convert(selected(made, stages), root), width, Path(__file__).with_name(name))


def selected(made: nbformat.NotebookNode, stages: tuple[str, ...]) -> nbformat.NotebookNode:
    """Return `made` with the cells of `stages` and the texts above them alone."""
    cells = [cell for cell in made.cells if cell.id.removesuffix("-text") in stages]
    return nbformat.from_dict(made | {"cells": cells})


def execute(root: Path) -> nbformat.NotebookNode:
    """Return the notebook with its outputs, after a run in the folder `root`."""
    for name in ("input", "working", "temp"):
        (root / name).mkdir()
    (root / "input" / COMPETITION).symlink_to(Path(os.environ["PCAM_DATA"]).resolve())
    os.environ["PCAM_KAGGLE"] = str(root)
    made = nbformat.reads(notebook(SETTINGS).decode(), as_version=4)
    NotebookClient(made, resources={"metadata": {"path": str(root / "working")}}).execute()
    for output in (output for cell in made.cells for output in cell.get("outputs", []) if "text" in output):
        output["text"] = output["text"].replace(str(root), "/kaggle") if output["name"] == "stdout" else ""
    return made


def convert(made: nbformat.NotebookNode, folder: Path) -> Path:
    """Write `made` as HTML, without the package's cells, into `folder` and return the file."""
    page = folder / "page.ipynb"
    nbformat.write(made, page)
    subprocess.run([*CONVERT, str(page)], check=True)
    return page.with_suffix(".html")


def draw(page: Path, width: int, target: Path, quality: int = 48) -> None:
    """Write a picture of the HTML file `page`, `width` pixels wide, to `target`."""
    frame, shot = page.with_name("frame.html"), page.with_name("shot.png")
    frame.write_text(
        f'<body style="margin: 0"><iframe src="{page.name}" width="{width}" height="{HEIGHT}" style="border: 0"></iframe>'
    )
    window = f"--window-size={max(width, 500)},{HEIGHT}"
    subprocess.run([*BROWSER, window, f"--screenshot={shot}", frame.as_uri()], check=True, capture_output=True)
    picture = cv2.imread(str(shot))[:, :width]
    inked = (picture.min(axis=2) < 200).any(axis=1).nonzero()[0]
    picture = picture[: inked[-1] + 20]
    scale = min(1, MAX_WIDTH / width)
    picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(target), picture, [cv2.IMWRITE_JPEG_QUALITY, quality])


if __name__ == "__main__":
    main()
