"""The competition's full size on synthetic patches: what each stage takes, and how that grows from a tenth of it.

`python -m benchmarks.full`: makes 220,025 train and 57,458 test patches, 8 GB, and a store of as much, in the folder for
temporary files; both are removed afterwards.
"""

import tempfile
from hashlib import sha1
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.bench import Bench, say
from benchmarks.results import TEST_PATCHES, TRAIN_PATCHES, keep, page
from pcam_kaggle.data.atomic_io import write_csv
from pcam_kaggle.data.demo import draw_patch, tumour_place
from pcam_kaggle.data.layout import Data

SIZES = {"train": TRAIN_PATCHES, "test": TEST_PATCHES}
DRAWN = 500
SLIDES = 216
# The smallest net there is: what is measured is everything else.
NET = ("n_blocks=1", "width=4", "side=32", "hidden=8", "epochs=1", "tta=1", "precision=fp32", "memory_format=channels_last")
STAGES = ("prepare", "folds", "train", "predict", "blend", "submission")


def make(data: Data, share: int) -> None:
    """Write one `share`-th of the full size into `data`, as the competition's files are, and a slide map.

    A patch is one of 500 drawn ones, with its number in its corner so that no two are the same.
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
            name = sha1(patch, usedforsecurity=False).hexdigest()
            Image.fromarray(patch).save(data.patches(split) / f"{name}.tif")
            rows.append((name, positive[number % DRAWN], f"slide_{number % SLIDES}"))
        table = pd.DataFrame(rows, columns=["id", "label", "wsi"])
        write_csv(data.labels if split == "train" else data.sample, table[["id", "label"]].assign(**_unlabelled(split)))
        if split == "train":
            write_csv(data.root / "patch_id_wsi.csv", table[["id", "wsi"]])


def _unlabelled(split: str) -> dict[str, int]:
    return {"label": 0} if split == "test" else {}


def measured(share: int) -> dict[str, list[float]]:
    """Return seconds and peak bytes of each stage at one `share`-th of the full size."""
    with tempfile.TemporaryDirectory() as folder:
        data, work = Data(Path(folder) / "data"), Path(folder) / "work"
        make(data, share)
        say(f"one in {share}: the patches are written")
        bench = Bench(data.root, work)
        changes = [part for option in NET for part in ("--set", option)]
        seen = {}
        for stage in (*STAGES, "compare"):
            seen[stage] = list(bench.command(work, stage, *(changes if stage != "compare" else ())))
            say(f"one in {share}, {stage}: {seen[stage][0]:.1f} s, {seen[stage][1] / 1e9:.2f} GB")
    return seen


if __name__ == "__main__":
    keep("full", {"tenth": measured(10), "full": measured(1)})
    say(page())
