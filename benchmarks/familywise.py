"""Family-wise error of comparisons: how often equal runs are called different; writes a table of RESULTS.md.

`python -m benchmarks.familywise [REPLICATES]`. Scores are normal, with 300 positives and 700 negatives and an AUC of 0.95.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from benchmarks.results import RESULTS, markdown, replace_block
from pcam_kaggle.scoring.intervals import PATCHES, Clusters, joint_aucs, not_worse, pairs_to_test, simultaneous_differences

LABELS = np.repeat([0, 1], [700, 300])
SHIFT = 2**0.5 * norm.ppf(0.95)
# Patches of a slide share a random shift of this variance, of a total of 1.
SLIDES, OF_SLIDE = 20, 0.3
REPLICATES = 2000
COLUMNS = (
    "unit",
    "runs",
    "correlation",
    "best run as baseline, Holm (before)",
    "named baseline",
    "no baseline: a run is left out",
    "no baseline: a given run is left out",
)


def errors(runs: int, correlation: float, unit: str, seed: int) -> NDArray[np.bool_]:
    """Return which of the procedures, in the order of `COLUMNS`, call some of `runs` equal runs different."""
    rng = np.random.default_rng(seed)
    slides = rng.permutation(np.arange(len(LABELS)) % SLIDES)
    noise = [rng.normal(size=(count, len(LABELS))) for count in (1, runs)]
    if unit == "slide":
        noise = [
            OF_SLIDE**0.5 * rng.normal(size=(len(each), SLIDES))[:, slides] + (1 - OF_SLIDE) ** 0.5 * each for each in noise
        ]
    scores = LABELS * SHIFT + correlation**0.5 * noise[0] + (1 - correlation) ** 0.5 * noise[1]
    joint = joint_aucs(LABELS, scores, Clusters("slide", slides) if unit == "slide" else PATCHES)
    best, pairs = int(joint.areas.argmax()), pairs_to_test(runs, "all pairs")
    of_all, of_named = (simultaneous_differences(joint, each) for each in (pairs, pairs_to_test(runs, "baseline")))
    # Holm finds a difference exactly if Bonferroni does.
    smallest = min(made.p for pair, made in zip(pairs, of_all, strict=True) if best in pair and made.p is not None)
    left = not_worse(runs, pairs, of_all)
    named = any(made.is_significant for made in of_named)
    return np.array([smallest * (runs - 1) < 0.05, named, len(left) < runs, 0 not in left])


def main(replicates: int) -> None:
    rows = []
    with ProcessPoolExecutor() as pool:
        # A bootstrap takes longer.
        for unit, count in (("patch", replicates), ("slide", replicates // 4)):
            for runs, correlation in ((5, 0.0), (5, 0.8), (20, 0.0), (20, 0.8)):
                found = pool.map(partial(errors, runs, correlation, unit), range(count), chunksize=25)
                rows.append((unit, runs, correlation, *(f"{share:.1%}" for share in np.mean([*found], axis=0))))
                print(*rows[-1], sep="\t", flush=True)
    replace_block(RESULTS, "familywise", markdown(COLUMNS, [tuple(map(str, row)) for row in rows]))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else REPLICATES)
