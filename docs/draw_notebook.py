"""Draw docs/notebook.jpg: the kernel's notebook after a run on the patches of PCAM_DATA. Needs nbconvert and chromium."""

import os
import subprocess
import tempfile
from pathlib import Path

import cv2
import nbformat
from nbclient import NotebookClient

from pcam_kaggle.data.layout import COMPETITION
from pcam_kaggle.kaggle.notebook import Settings, notebook

SETTINGS = Settings("quick", ("width=8", "epochs=3", "tta=1"))
SHOWN = [
    "settings-text",
    "settings",
    "prepare-text",
    "prepare",
    "train-text",
    "train",
    "learning-text",
    "learning",
]
WIDTH, HEIGHT = 1000, 3600
BROWSER = ("chromium", "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}")


def main() -> None:
    """Execute the notebook in a folder laid out as Kaggle's, and write the picture of its first stages."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("input", "working", "temp"):
            (root / name).mkdir()
        (root / "input" / COMPETITION).symlink_to(Path(os.environ["PCAM_DATA"]).resolve())
        os.environ["PCAM_KAGGLE"] = folder
        made = nbformat.reads(notebook(SETTINGS).decode(), as_version=4)
        NotebookClient(made, resources={"metadata": {"path": str(root / "working")}}).execute()
        made.cells = [cell for cell in made.cells if cell.id in SHOWN]
        for output in (output for cell in made.cells for output in cell.get("outputs", []) if "text" in output):
            output["text"] = output["text"].replace(folder, "/kaggle") if output["name"] == "stdout" else ""
        page = root / "page.ipynb"
        nbformat.write(made, page)
        subprocess.run(["jupyter-nbconvert", "--to", "html", "--log-level=ERROR", str(page)], check=True)
        shot = root / "page.png"
        subprocess.run([*BROWSER, f"--screenshot={shot}", page.with_suffix(".html").as_uri()], check=True, capture_output=True)
        picture = cv2.imread(str(shot))
        inked = (picture.min(axis=2) < 200).any(axis=1).nonzero()[0]
        picture = picture[: inked[-1] + 20]
        cv2.imwrite(str(Path(__file__).with_name("notebook.jpg")), picture, [cv2.IMWRITE_JPEG_QUALITY, 80])


if __name__ == "__main__":
    main()
