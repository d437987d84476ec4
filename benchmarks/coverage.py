"""How often the paired tests reject equal models and how often their intervals cover a known difference, by simulation.

Run: python -m benchmarks.coverage
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from pcam_kaggle.scoring.metrics import auc_difference, slide_difference, slide_pairs

PAIRS, SLIDES, PATCHES = 200, 80, 30
SHARED, OWN, SLIDE = 0.7, 0.7, 0.5
Floats = NDArray[np.float64]


def true_auc(shift: float, clustered: bool) -> float:
    """Return the AUC of normal scores whose positives are shifted by `shift`."""
    variance = SHARED**2 + OWN**2 + (SLIDE**2 if clustered else 0)
    return float(stats.norm.cdf(shift / np.sqrt(2 * variance)))


def models(rng: np.random.Generator, shifts: tuple[float, float], clustered: bool) -> tuple[Floats, Floats, Floats, Floats]:
    """Return labels, slides and the scores of two models on the same patches.

    Clustered, every slide has a share of positives of its own, and every model a shift of its own on every slide.
    """
    slides = np.repeat(np.arange(SLIDES), PATCHES)
    share = rng.beta(1, 1.5, SLIDES) if clustered else np.full(SLIDES, 0.4)
    labels = (rng.random(len(slides)) < share[slides]).astype(int)
    shared = SHARED * rng.normal(size=len(slides))
    scores = [
        shift * labels + shared + OWN * rng.normal(size=len(slides)) + clustered * SLIDE * rng.normal(size=SLIDES)[slides]
        for shift in shifts
    ]
    return labels, slides, *scores


def main() -> None:
    """Print a row per situation and test: share of rejections at 5 % of equal models, share of 95 % intervals that cover."""
    rows = []
    for clustered in (False, True):
        for name, by_slide in (("DeLong, patches", False), ("bootstrap, slides", True)):
            rejected, covered = 0, 0
            for seed in range(PAIRS):
                rng = np.random.default_rng((seed, clustered))
                for shifts in ((1.2, 1.2), (1.4, 1.2)):
                    labels, slides, first, second = models(rng, shifts, clustered)
                    if by_slide:
                        pairs = (slide_pairs(labels, slides, scores) for scores in (first, second))
                        test = slide_difference(labels, slides, *pairs)
                    else:
                        test = auc_difference(labels, first, second)
                    known = true_auc(shifts[0], clustered) - true_auc(shifts[1], clustered)
                    rejected += shifts[0] == shifts[1] and test.p < 0.05
                    covered += shifts[0] != shifts[1] and test.low <= known <= test.high
            patches = "share slides" if clustered else "are independent"
            rows.append((patches, name, f"{rejected / PAIRS:.1%}", f"{covered / PAIRS:.1%}"))
    print(
        pd.DataFrame(rows, columns=["patches", "test", "rejects equal models", "covers the known difference"]).to_string(
            index=False
        )
    )


if __name__ == "__main__":
    main()
