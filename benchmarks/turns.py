"""Turns of measured processes in interleaved rounds."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pcam_kaggle.core.errors import UserError

ROUNDS = 3
Turn = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Bench:
    """The patches to measure on, a workspace with their store, and whether one short round is enough."""

    data: Path
    work: Path
    quick: bool = False

    def turn(self, measure: str, environment: dict[str, str], **arguments: Any) -> dict[str, Any]:
        """Return the values that `measure` of `benchmarks.measures` reports in a new process."""
        given = (str(self.data), str(self.work), "0.1" if self.quick else "3", json.dumps(arguments))
        line = [sys.executable, "-m", "benchmarks.measures", measure, *given]
        root = Path(__file__).parent.parent
        ended = subprocess.run(line, check=False, capture_output=True, text=True, cwd=root, env=os.environ | environment)
        if not ended.stdout:
            lines = [f"ended with status {ended.returncode}", *ended.stderr.strip().splitlines()]
            raise UserError(f"{measure} {arguments}: {lines[-1]}")
        return json.loads(ended.stdout)

    def rounds(self, turns: Mapping[Any, Turn]) -> dict[Any, list[Any]]:
        """Return the values of all `turns` in each round; the value `rate` of a turn is stored under the turn's name."""
        values: dict[Any, list[Any]] = {}
        for _ in range(1 if self.quick else ROUNDS):
            for name, turn in turns.items():
                for key, value in turn().items():
                    values.setdefault(name if key == "rate" else key, []).append(value)
        return values

    def command(self, work: Path, *options: str) -> float:
        """Run our command line in the folder `work`; return its seconds."""
        line = [sys.executable, "-m", "pcam_kaggle", *options, "--work", str(work)]
        start = time.perf_counter()
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "PCAM_DATA": str(self.data)})
        return time.perf_counter() - start
