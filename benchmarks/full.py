"""Seconds and peak memory of each stage at the competition's full size, on synthetic patches, and at a tenth of it.

`python -m benchmarks.full [SHARE]` writes 220,025 train and 57,458 test patches, 8 GB, and a store of the same size into the
folder for temporary files, and removes both afterwards. With SHARE it takes a SHARE-th of them and only prints the table. The
net is the smallest possible, so that the rest is what is measured.
"""

import sys
import tempfile
from hashlib import sha1
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from benchmarks.measures import TRAIN_PATCHES
from benchmarks.results import RESULTS, markdown, provenance, replace_block
from benchmarks.turns import Bench
from pcam_kaggle.core.files import write_csv
from pcam_kaggle.core.paths import Data
from pcam_kaggle.data.demo import draw_patch, tumour_place

SIZES = {"train": TRAIN_PATCHES, "test": 57_458}
DRAWN, SLIDES = 500, 216
NET = ("n_blocks=1", "width=4", "side=32", "hidden=8", "epochs=1", "tta=1", "precision=fp32")
STAGES = ("prepare", "folds", "train", "predict", "blend", "submission", "compare")


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


def measured(share: int) -> dict[str, tuple[float, float]]:
    """Return seconds and peak bytes of each stage at one `share`-th of the full size."""
    with tempfile.TemporaryDirectory() as folder:
        data, work = Data(Path(folder) / "data"), Path(folder) / "work"
        make(data, share)
        bench = Bench(data.root, work)
        changes = [part for option in NET for part in ("--set", option)]
        return {stage: bench.command(work, stage, *(changes if stage != "compare" else ())) for stage in STAGES}


def main(share: int = 1) -> str:
    """Return the table of one `share`-th of the full size beside a tenth of that."""
    tenth, full = measured(10 * share), measured(share)
    lines = [
        (stage, f"{tenth[stage][0]:.1f}", f"{seconds:.1f}", f"{tenth[stage][1] / 1e9:.2f}", f"{peak / 1e9:.2f}")
        for stage, (seconds, peak) in full.items()
    ]
    return f"{provenance()}\n\n{markdown(('stage', 's, a tenth', 's, full size', 'GB, a tenth', 'GB, full size'), lines)}"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(main(int(sys.argv[1])))
    else:
        replace_block(RESULTS, "full", main())
