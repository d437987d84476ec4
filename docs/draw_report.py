"""Draw docs/report.jpg and docs/report_narrow.jpg: the report of the runs in the workspace that is named, or of the demo.

Needs chromium.
"""

import sys
import tempfile
from pathlib import Path

from draw_notebook import draw

from pcam_kaggle.cli.main import main as pcam

FIELDS = ("width=8", "n_blocks=3", "epochs=4", "n_splits=3", "tta=1")
QUALITY = 45
# Width of the window and the sections of each picture.
PICTURES = {
    "report.jpg": (1400, ("table", "roc", "slides", "mistakes", "suspects", "embedding", "augmentation")),
    "report_narrow.jpg": (400, ("table", "roc", "suspects", "embedding")),
}


def main() -> None:
    """Train two runs on the demo unless a workspace is named, and write the pictures of the report of all runs."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(sys.argv[1]) if len(sys.argv) > 1 else train(Path(folder))
        # A single run has augmented patches, unlike a blend that may be the best.
        baseline = min((work / "runs").glob("*/config.json")).parent.name
        assert pcam(["report", "--work", str(work), "--baseline", baseline]) == 0
        page = (work / "reports" / "runs.html").read_text(encoding="utf-8")
        for name, (width, sections) in PICTURES.items():
            shown = ", ".join(f"#{section}" for section in sections)
            file = Path(folder) / "page.html"
            file.write_text(page.replace("</style>", f"section:not({shown}) {{ display: none; }}\n</style>"), encoding="utf-8")
            draw(file, width, Path(__file__).with_name(name), QUALITY)


def train(folder: Path) -> Path:
    """Return the workspace of two runs on the demo in `folder`."""
    fields = [part for field in FIELDS for part in ("--set", field)]
    for name, body in (("bottleneck", "bottleneck"), ("plain", "plain")):
        pcam(["pipeline", "--demo", "--work", str(folder), "--name", name, *fields, "--set", f"body={body}"])
    return folder / "demo"


if __name__ == "__main__":
    main()
