"""Draw docs/patches.jpg: a few patches of the demo with the centre that decides their label."""

import tempfile
from pathlib import Path

import cv2
import numpy as np

from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import make_demo
from pcam_kaggle.data.tables import read_labels

COLUMNS, EACH, GAP = 6, 144, 12
POSITIVE, NEGATIVE, PAPER = (60, 160, 30), (120, 120, 120), (255, 255, 255)


def main() -> None:
    """Write the picture: positives above, negatives below."""
    with tempfile.TemporaryDirectory() as folder:
        data = Data(Path(folder) / "demo")
        make_demo(data)
        labels = read_labels(data.labels)
        rows = []
        for label, colour in ((1, POSITIVE), (0, NEGATIVE)):
            tiles = []
            for name in labels["id"][labels["label"] == label].iloc[:COLUMNS]:
                patch = cv2.imread(str(data.patches("train") / f"{name}.tif"))
                tile = cv2.resize(patch, (EACH, EACH), interpolation=cv2.INTER_CUBIC)
                cv2.rectangle(tile, (EACH // 3, EACH // 3), (2 * EACH // 3, 2 * EACH // 3), colour, 2)
                tiles.append(cv2.copyMakeBorder(tile, GAP, 0, GAP, 0, cv2.BORDER_CONSTANT, value=PAPER))
            rows.append(np.hstack(tiles))
        picture = cv2.copyMakeBorder(np.vstack(rows), 0, GAP, 0, GAP, cv2.BORDER_CONSTANT, value=PAPER)
        cv2.imwrite(str(Path(__file__).with_name("patches.jpg")), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])


if __name__ == "__main__":
    main()
