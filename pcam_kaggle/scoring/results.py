"""Results as typed records: an AUC with its interval, a paired difference, and the scores of a blend."""

from typing import ClassVar, Literal, Self

import numpy as np

from pcam_kaggle.core.records import Record

LEVEL = 0.95
# Below any standard error that is not zero (one pair of 10^12 in another order gives 1e-12), above its rounding error.
ROUNDING = 1e-14
ZERO_VARIANCE = "an estimated variance of zero"
Unit = Literal["patch", "slide", "stain group"]
# Which differences are tested together: those to a baseline that was named beforehand, or those of all pairs of runs. Files of
# earlier versions have p-values corrected by Holm 1979, and intervals of each difference by itself.
Family = Literal["holm", "baseline", "all pairs"]


class Estimate(Record):
    """An AUC with its 95 % interval over `units` units; where `undefined` gives the reason, `low` and `high` are None.

    Files of earlier versions that lack the unit have DeLong's interval over patches.
    """

    _possible: ClassVar = (0.0, 1.0)

    value: float
    low: float | None
    high: float | None
    unit: Unit = "patch"
    units: int = 0
    undefined: str = ""

    @classmethod
    def from_error(cls, value: float, error: float, critical: float, unit: Unit, units: int, undefined: str) -> Self:
        """Return the AUC `value` with its interval: `critical` standard errors on either side, clipped to possible values."""
        undefined = ZERO_VARIANCE if error < ROUNDING else undefined
        if undefined:
            return cls(value=value, low=None, high=None, unit=unit, units=units, undefined=undefined)
        low, high = np.clip([value - critical * error, value + critical * error], *cls._possible).tolist()
        return cls(value=value, low=low, high=high, unit=unit, units=units)

    def text(self, form: str = ".4f") -> str:
        """Return value and interval as text."""
        return f"{self.value:{form}} {self.interval_text(form)}"

    def interval_text(self, form: str = ".4f") -> str:
        """Return the interval as text, or why there is none."""
        return f"[n/a ({self.undefined})]" if self.undefined else f"[{self.low:{form}}, {self.high:{form}}]"


class Difference(Estimate):
    """A paired difference of two AUCs with its interval, standard error and two-sided p-value, None where undefined.

    Of differences that were tested together, the intervals and `corrected_p` hold for all at once, `p` for each by itself.
    """

    _possible: ClassVar = (-1.0, 1.0)

    error: float | None = None
    p: float | None = None
    corrected_p: float | None = None

    @classmethod
    def from_error(cls, value: float, error: float, critical: float, unit: Unit, units: int, undefined: str) -> Self:
        """Return the difference `value` with its interval as for an AUC, or, for a constant zero, with p-values of 1."""
        if error < ROUNDING and abs(value) < ROUNDING:
            return cls(value=value, low=value, high=value, unit=unit, units=units, error=0.0, p=1.0, corrected_p=1.0)
        return super().from_error(value, error, critical, unit, units, undefined)

    @property
    def is_significant(self) -> bool:
        """Whether the interval is known and does not hold zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


class OofScore(Record):
    """The score of out-of-fold predictions.

    `patches` and `fold_auc` belong to the numbers in `folds`; `sd` is the sample standard deviation over folds, None for one.
    `pooled` is the AUC of all predictions together, `ranked` that after ranking within folds.
    """

    folds: list[int] = []
    patches: list[int] = []
    fold_auc: list[float]
    mean: float
    sd: float | None = None
    pooled: Estimate
    ranked: Estimate


class BlendMetrics(OofScore):
    """The score of blended predictions, `metrics.json` of a run.

    `members` has the weight of each run by its name; in files of earlier versions weights may differ. `scheme` is empty there.
    """

    members: dict[str, float]
    method: str
    scheme: str = ""
    folds_sha256: str
    missing_folds: list[int] = []
    oof_sha256: str = ""
    test_sha256: str = ""
