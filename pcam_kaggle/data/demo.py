"""The synthetic demo: H&E-like patches drawn from a seed, in the competition's layout and with its label rule."""

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from pcam_kaggle.core.config import PATCH_SIDE
from pcam_kaggle.core.files import building, locked, read_json, write_csv, write_json
from pcam_kaggle.core.paths import Data

N_TRAIN, N_TEST = 480, 120
CENTRE = slice(32, 64)
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11])


def draw_patch(
    rng: np.random.Generator, slide: np.random.Generator, tumour_at: tuple[int, int] | None
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one patch: stroma is smooth pink noise, lymphocytes are small round nuclei, tumour nuclei are large and clustered.

    The content is drawn from `rng` and the stain from `slide`; `tumour_at` is the row and column of the tumour's centre.
    Returns the patch, RGB uint8 (96, 96, 3), and its tumour mask, bool (96, 96).
    """
    side = PATCH_SIDE
    nuclei, tumour = np.zeros((side, side), np.float32), np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(4, 12)):
        centre = tuple(int(v) for v in rng.integers(0, side, 2))
        cv2.circle(nuclei, centre, int(rng.integers(2, 4)), float(rng.uniform(0.6, 0.9)), -1, cv2.LINE_AA)
    if tumour_at is not None:
        for _ in range(rng.integers(4, 9)):
            row, column = (int(v) for v in np.asarray(tumour_at) + rng.normal(0, 4, 2))
            axes = tuple(int(v) for v in rng.integers(4, 8, 2))
            angle = float(rng.uniform(0, 180))
            cv2.ellipse(nuclei, (column, row), axes, angle, 0, 360, float(rng.uniform(0.45, 0.75)), -1, cv2.LINE_AA)
            cv2.ellipse(tumour, (column, row), axes, angle, 0, 360, 1, -1)
    stroma = 0.35 + 0.9 * cv2.GaussianBlur(rng.normal(0, 1, (side, side)).astype(np.float32), (0, 0), 3)
    factors, tint = slide.uniform(0.7, 1.3, 2), slide.normal(0, 0.03, 3)
    density = np.clip(nuclei, 0, None)[..., None] * HAEMATOXYLIN * factors[0]
    density = density + np.clip(stroma, 0.05, None)[..., None] * EOSIN * factors[1] + np.abs(tint)
    light = 255 * np.exp(-density) + rng.normal(0, 3, density.shape)
    return np.clip(np.rint(light), 0, 255).astype(np.uint8), tumour.astype(bool)


def tumour_place(rng: np.random.Generator) -> tuple[int, int] | None:
    """Return row and column of a patch's tumour: in the centre, near the edge, or None, a third of the patches each."""
    kind = rng.integers(0, 3)
    if kind == 0:
        return None
    if kind == 1:
        return int(rng.integers(36, 60)), int(rng.integers(36, 60))
    angle = rng.uniform(0, 2 * np.pi)
    reach = 44 / max(abs(np.cos(angle)), abs(np.sin(angle)))
    return int(48 + reach * np.sin(angle)), int(48 + reach * np.cos(angle))


def make_demo(data: Data, seed: int = 1) -> bool:
    """Write the demo into `data`, unless it exists; return whether it was written.

    480 train patches of 10 slides, 120 test patches of 6 slides, 4 of which are only in the test set, and a slide map of the
    train patches. A patch is positive if its central 32x32 px contain a tumour pixel. Ids are names, as dataset.json declares.
    """
    manifest = {"ids": "names", "synthetic": True, "seed": seed, "train": N_TRAIN, "test": N_TEST}
    with locked(data.root):
        if data.declaration.is_file() and read_json(data.declaration) == manifest:
            return False
        with building(data.root, _is_demo) as folder:
            made = Data(folder)
            train = _draw_split(made, "train", N_TRAIN, range(10), seed)
            test = _draw_split(made, "test", N_TEST, range(8, 14), seed)
            write_csv(made.labels, train[["id", "label"]])
            write_csv(folder / "patch_id_wsi.csv", train[["id", "wsi"]])
            write_csv(made.sample, test[["id"]].assign(label=0))
            write_json(made.declaration, manifest)
    return True


def _is_demo(folder: Path) -> bool:
    declaration = Data(folder).declaration
    return declaration.is_file() and read_json(declaration).get("synthetic") is True


def _draw_split(data: Data, split: str, count: int, slides: range, seed: int) -> pd.DataFrame:
    data.patches(split).mkdir()
    rows = []
    for number in range(count):
        slide = slides[number % len(slides)]
        rng = np.random.default_rng((seed, split == "test", number))
        patch, tumour = draw_patch(rng, np.random.default_rng((seed, slide)), tumour_place(rng))
        name = f"demo_{split}_{number:04d}"
        Image.fromarray(patch).save(data.patches(split) / f"{name}.tif")
        rows.append((name, int(tumour[CENTRE, CENTRE].any()), f"slide_{slide:02d}"))
    return pd.DataFrame(rows, columns=["id", "label", "wsi"])
