"""Embedding map: the features of validation patches in two dimensions."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from pcam_kaggle.core.errors import UserError
from pcam_kaggle.data.store import PatchStore
from pcam_kaggle.report.figures import GREY, HEIGHT, PRIMARY, SECONDARY, STYLE, TEXT, WIDTH, Plot
from pcam_kaggle.report.mistakes import BACKEND
from pcam_kaggle.runs.run import Run
from pcam_kaggle.training.engine import PREDICT_BATCH, adapt_norms, net_input
from pcam_kaggle.training.learner import load_best

# A point takes 100 bytes of the page. Of large models there are fewer, to bound the multiply-accumulate operations.
MIN_PATCHES, MAX_PATCHES, MAX_MACS = 200, 1000, 4e11
COLOURS = (PRIMARY, SECONDARY, "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#e7ba52", "#bcbd22", "#17becf")


def embedding(runs: Sequence[Run], number: int, store: PatchStore) -> tuple[Run, pd.DataFrame]:
    """Return the run whose model of fold `number` has the highest validation AUC, and a table of patches of that fold.

    Columns: id, label, fold, probability (out of fold), and x and y, the first two principal components of the features that
    the model's classifier reads. There are at most 1,000 patches. Raises UserError if all of `runs` lack a model or are probes.
    """
    models = [run for run in runs if run.fold(number).is_trained and not run.config().probe]
    if not models:
        raise UserError(f"no run here has a model of fold {number}; a probe has the features of a pretrained model")
    run = max(models, key=lambda each: each.fold(number).metrics().valid_auc)
    config, fold = run.config(), run.fold(number)
    count = int(np.clip(MAX_MACS / max(1, fold.metrics().macs), MIN_PATCHES, MAX_PATCHES))
    oof = fold.oof()
    drawn = oof.sample(min(count, len(oof)), random_state=0).reset_index(drop=True)
    rows = store.rows("train", drawn["id"].to_numpy())
    net = load_best(fold, config, BACKEND)
    if config.norm == "test":
        adapt_norms(net, store, rows, config, BACKEND)
    batches = (rows[start : start + PREDICT_BATCH] for start in range(0, len(rows), PREDICT_BATCH))
    values = torch.cat([features(net, net_input(store.images(batch), config, BACKEND)) for batch in batches]).numpy()
    # With a row and a column of zeros there are two components, however few the patches and features.
    left, scales, _ = np.linalg.svd(np.pad(values - values.mean(axis=0), (0, 1)), full_matrices=False)
    x, y = (left * scales)[:-1, :2].T
    return run, drawn.assign(x=x, y=y)


def features(net: nn.Module, images: Tensor) -> Tensor:
    """Return what the classifier of `net`, its last linear layer with one output, reads of `images`: (n, features)."""
    layers = [module for module in net.modules() if isinstance(module, nn.Linear) and module.out_features == 1]
    if not layers:
        raise UserError("the model's classifier is not a linear layer")
    read: list[Tensor] = []
    with torch.inference_mode(), layers[-1].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten(1))):
        net(images)
    return read[-1]


@mpl.rc_context(STYLE)
def embedding_map(name: str, table: pd.DataFrame, keys: pd.Series, kind: str) -> Plot:
    """Return the points of `table` (label, probability, x, y) by their `keys` (n,), which are labels or groups: the `kind`.

    The 10 most frequent keys are coloured, the others grey. A cross marks a mistake at a threshold of 0.5.
    """
    counts, is_wrong = keys.value_counts(), table["label"] != (table["probability"] >= 0.5)
    coloured = sorted(counts.index[: len(COLOURS)])
    layers = [("others", ~keys.isin(coloured), GREY)]
    layers += [(f"{key} ({counts[key]:,})", keys == key, colour) for key, colour in zip(coloured, COLOURS, strict=False)]
    shown = [layer for layer in layers if layer[1].any()]
    figure = Figure((WIDTH, HEIGHT + 0.09 * len(shown)), layout="constrained")
    ax = figure.add_subplot()
    for text, inside, colour in shown:
        ax.plot(table["x"][inside], table["y"][inside], "o", color=colour, markersize=3, label=text)
    ax.plot(table["x"][is_wrong], table["y"][is_wrong], "x", color=TEXT, markersize=5, label="mistake")
    ax.set(xlabel="First principal component", ylabel="Second principal component", xticks=[], yticks=[])
    figure.legend(loc="outside lower center", ncols=2)
    caption = f"{name}: {len(table):,} patches by {kind} ({len(counts)} in all); {is_wrong.sum():,} mistakes."
    return Plot(figure, f"Embedding of {name} by {kind}", caption)
