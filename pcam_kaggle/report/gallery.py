"""Pictures of patches for the report and for notebooks: examples, augmented patches, the worst mistakes, suspect labels."""

import base64
import html
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
import pandas as pd
from matplotlib import colormaps
from numpy.typing import NDArray

from pcam_kaggle.core.config import Config
from pcam_kaggle.report.figures import Html, html_figure
from pcam_kaggle.training.augment import augmentation

LABELLED_SIDE = 32
SIDE, VERSION_SIDE = 168, 96
PATCHES_PER_LABEL, VERSIONS = 8, 5
CERTAIN = 0.9
HEAT_OPACITY, JPEG_QUALITY = 0.6, 85
LABELS = ("Tumour in the centre", "No tumour in the centre")
ERRORS = ("False negatives", "False positives")

Images = NDArray[np.uint8]
# A JPEG as data URI, and its text alternative.
Picture = tuple[str, str]


def draw_examples(labels: pd.DataFrame, count: int = PATCHES_PER_LABEL, seed: int = 0) -> pd.DataFrame:
    """Return id and label of `count` random rows of `labels` of each label, or of all if there are fewer; tumour first."""
    drawn = [part.sample(min(count, len(part)), random_state=seed) for _, part in labels.groupby("label")]
    return pd.concat(drawn[::-1], ignore_index=True)[["id", "label"]]


def worst_mistakes(oof: pd.DataFrame, count: int = PATCHES_PER_LABEL) -> pd.DataFrame:
    """Return the `count` lowest-scored rows of `oof` (id, label, probability) with tumour, then the highest-scored without."""
    by_score = oof.sort_values(["probability", "id"])
    negatives, positives = by_score[by_score["label"] == 1].head(count), by_score[by_score["label"] == 0].tail(count)[::-1]
    return pd.concat([negatives, positives], ignore_index=True)


def suspect_labels(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return patches with an OOF probability below 0.1 though labelled 1, or above 0.9 though labelled 0, in every run.

    `tables` are the OOF tables (id, label, probability) by run. A run that lacks a patch does not count for it, but two runs
    must have it if there are two. Returned are id, label and `probability_<run>`, NaN where lacking; largest mean error first.
    """
    columns = [oof.set_index(["id", "label"])["probability"].rename(f"probability_{name}") for name, oof in tables.items()]
    joined = pd.concat(columns, axis=1).sort_index()
    errors = joined.sub(joined.index.get_level_values("label"), axis=0).abs()
    is_suspect = (errors.isna() | (errors > CERTAIN)).all(axis=1) & (errors.count(axis=1) >= min(2, len(columns)))
    extreme_first = errors[is_suspect].mean(axis=1).sort_values(ascending=False, kind="stable").index
    return joined.loc[extreme_first].reset_index()


def augmented(patches: Images, config: Config) -> Images:
    """Return `patches` (n, 96, 96, 3) after the random augmentation that training with `config` uses: (n, side, side, 3)."""
    augment = augmentation(config.side, config.stain_jitter, config.color_jitter)
    augment.set_random_seed(config.seed)
    return np.stack([augment(image=patch)["image"] for patch in patches])


def patch_tiles(
    patches: Images,
    table: pd.DataFrame,
    headings: tuple[str, str] = LABELS,
    beside: Sequence[Sequence[Picture]] = (),
    side: int = SIDE,
) -> Html:
    """Return tiles of the RGB `patches` (n, h, w, 3) under the `headings` of label 1 and label 0, with their centres marked.

    The first columns of `table` (n rows) are id and label; captions show the others. `beside` are further pictures of each.
    """
    tiles: dict[str, list[str]] = {f"<h3>{heading}</h3>": [] for heading in headings}
    by_label, rows = [*tiles.values()][::-1], table.itertuples(index=False, name=None)
    for patch, others, (name, label, *values) in zip(patches, beside or [()] * len(patches), rows, strict=True):
        pictures = [(jpeg(patch, side=side), f"Patch {name}; a square marks its centre"), *others]
        images = (f'<img src="{source}" alt="{html.escape(text)}" style="flex: 1; min-width: 0">' for source, text in pictures)
        row = f'<div style="display: flex; gap: 6px; align-items: start">{"".join(images)}</div>'
        texts = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in values)
        caption = ", ".join([name[:16], *map(" ".join, zip(table.columns[2:], texts, strict=True))])
        by_label[label].append(html_figure(row, len(pictures) * (side + 6) - 6, caption))
    return Html("\n".join(heading + "".join(made) for heading, made in tiles.items() if made))


def augmentation_tiles(patches: Images, table: pd.DataFrame, config: Config) -> Html:
    """Return `patch_tiles` of `patches`, each beside random versions of it as training with `config` augments it."""
    versions = np.split(augmented(np.repeat(patches, VERSIONS, axis=0), config), len(patches))
    text = "The same patch, augmented"
    beside = [[(jpeg(version, side=VERSION_SIDE, marked=False), text) for version in own] for own in versions]
    return patch_tiles(patches, table, beside=beside, side=VERSION_SIDE)


def jpeg(patch: NDArray[np.uint8], heat: NDArray[np.float32] | None = None, side: int = SIDE, marked: bool = True) -> str:
    """Return the RGB `patch` as a data URI of `side` px, under `heat` (96, 96) in [0, 1], with its labelled centre `marked`."""
    image = patch.astype(np.float32)
    if heat is not None:
        weight = HEAT_OPACITY * heat[..., None]
        image = (1 - weight) * image + weight * 255 * colormaps["viridis"](heat)[..., :3]
    picture = cv2.resize(image.clip(0, 255).astype(np.uint8), (side, side), interpolation=cv2.INTER_CUBIC)
    centre = side * LABELLED_SIDE // len(patch)
    start, end = (side - centre) // 2, (side + centre) // 2 - 1
    # White on black is visible on any tissue.
    for grey, width in ((0, 3), (255, 1)) if marked else ():
        cv2.rectangle(picture, (start, start), (end, end), (grey,) * 3, width)
    _, content = cv2.imencode(".jpg", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(content.tobytes()).decode()}"
