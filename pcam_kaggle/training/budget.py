"""The time that a session has, and what of it is left."""

import math
import time
from dataclasses import dataclass

FOR_ENDING = 120.0


@dataclass(frozen=True, slots=True)
class Budget:
    """The moment at which everything must be written, in seconds of the system's monotonic clock; without one, never."""

    end: float = math.inf

    @classmethod
    def of_hours(cls, hours: float) -> "Budget":
        """Return the budget that ends `hours` from now."""
        return cls(time.monotonic() + 3600 * hours)

    def left(self) -> float:
        """Return the seconds left, less two minutes for the blend and the submission; below 0 when it is time to end."""
        return self.end - FOR_ENDING - time.monotonic()


ENDLESS = Budget()
