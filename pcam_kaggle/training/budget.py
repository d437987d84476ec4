"""The time that a session has, and the time that its folds need."""

import itertools
import math
import time
from dataclasses import dataclass

# Seconds reserved for the blend and the submission.
RESERVED = 120.0


@dataclass(frozen=True, slots=True)
class Budget:
    """The time by which everything must be written: `end`, in seconds of the monotonic clock, infinite without a limit."""

    end: float = math.inf

    @classmethod
    def of_hours(cls, hours: float) -> "Budget":
        """Return the budget that ends `hours` from now."""
        return cls(time.monotonic() + 3600 * hours)

    def left(self) -> float:
        """Return the seconds left for training and prediction, negative when none are left."""
        return self.end - RESERVED - time.monotonic()


ENDLESS = Budget()


@dataclass(slots=True)
class Forecast:
    """The time that folds, in the order of their training, still need; predictions of one take `validations` validations."""

    epochs_left: dict[int, int]
    validations: float
    epoch_seconds: float = 0.0
    valid_seconds: float = 0.0

    def seconds_to_stop(self, fold: int) -> float:
        """Return the seconds for one more epoch of `fold`, and for the predictions of all folds up to it."""
        return self.epoch_seconds + self.validations * self.valid_seconds * (1 + list(self.epochs_left).index(fold))

    def summary(self, seconds_left: float) -> str:
        """Return a sentence on how many of the folds will be finished in `seconds_left`."""
        prediction = self.validations * self.valid_seconds
        durations = (epochs * self.epoch_seconds + prediction for epochs in self.epochs_left.values())
        needed = list(itertools.accumulate(durations))
        finished = sum(seconds <= seconds_left for seconds in needed) or "none"
        folds = ", ".join(map(str, self.epochs_left))
        return (
            f"an epoch takes {self.epoch_seconds:.0f} s, a fold's predictions {prediction:.0f} s; folds {folds} need "
            f"{needed[-1] / 60:.0f} min, {finished} of them will be finished in the {seconds_left / 60:.0f} min left"
        )
