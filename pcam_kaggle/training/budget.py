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
    """The time that the `folds` of one process, in the order of their training, still need, from the slowest epoch so far.

    The predictions of a fold take as long as `validations` validations; an epoch's `epoch_seconds` include its validation.
    """

    folds: list[int]
    epochs_left: list[int]
    validations: float
    epoch_seconds: float = 0.0
    valid_seconds: float = 0.0
    is_logged: bool = False

    def seconds_to_stop(self, index: int) -> float:
        """Return the seconds for one more epoch of the fold at `index`, and for the predictions of all folds up to it."""
        return self.epoch_seconds + self.validations * self.valid_seconds * (index + 1)

    def summary(self, seconds_left: float) -> str:
        """Return a sentence on how many of the folds will be finished in `seconds_left`."""
        prediction = self.validations * self.valid_seconds
        needed = list(itertools.accumulate(epochs * self.epoch_seconds + prediction for epochs in self.epochs_left))
        finished = sum(seconds <= seconds_left for seconds in needed)
        return (
            f"an epoch takes {self.epoch_seconds:.0f} s, a fold's predictions {prediction:.0f} s; folds "
            f"{', '.join(map(str, self.folds))} need {needed[-1] / 60:.0f} min, {finished or 'none'} of them will be finished "
            f"in the {seconds_left / 60:.0f} min left"
        )
