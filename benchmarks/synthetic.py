"""Synthetic data sets of any size, up to the competition's 220,025 train and 57,458 test patches."""

from hashlib import sha1

import numpy as np
import pandas as pd
from PIL import Image

from pcam_kaggle.core.files import write_csv
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import draw_patch, tumour_place

SIZES = {"train": 220_025, "test": 57_458}
DRAWN, SLIDES = 500, 216


def make(data: Data, share: int) -> None:
    """Write one `share`-th of the full size into `data` in the competition's layout, with a slide map.

    Patches repeat 500 drawn ones, each with its number in the corner so that no two are equal.
    """
    rng = np.random.default_rng(0)
    drawn = [draw_patch(rng, np.random.default_rng(slide % 10), tumour_place(rng)) for slide in range(DRAWN)]
    positive = [int(tumour[32:64, 32:64].any()) for _, tumour in drawn]
    for split, size in SIZES.items():
        data.patches(split).mkdir(parents=True)
        rows = []
        for number in range(size // share):
            patch = drawn[number % DRAWN][0].copy()
            patch[0, :2, :] = np.frombuffer(np.int64(number * 2 + (split == "test")).tobytes(), np.uint8)[:6].reshape(2, 3)
            name = sha1(patch.tobytes(), usedforsecurity=False).hexdigest()
            Image.fromarray(patch).save(data.patches(split) / f"{name}.tif")
            rows.append((name, positive[number % DRAWN] if split == "train" else 0, f"slide_{number % SLIDES}"))
        table = pd.DataFrame(rows, columns=["id", "label", "wsi"])
        write_csv(data.table(split), table[["id", "label"]])
        if split == "train":
            write_csv(data.root / "patch_id_wsi.csv", table[["id", "wsi"]])
