"""Random damage to a file: changed bytes, or one changed value of its format."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

VALUES: tuple[Any, ...] = (
    *(-1, 0, 1, 2**63, 0.5, float("inf"), float("nan"), None, True),
    *("", "x", "../x", "x" * 300, "0", "1e999", [], {}, [1, "x"], {"x": 1}),
)


def mutated(file: Path, rng: np.random.Generator) -> bytes:
    """Return the content of `file` with up to three changed places or, if its format is known, with one changed value."""
    content = file.read_bytes()
    change = FORMATS.get(file.suffix)
    if change and rng.integers(2):
        return change(content, rng)
    changed = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        place, length = int(rng.integers(0, max(1, len(changed)))), int(rng.integers(1, 64))
        flipped = bytes([changed[place] ^ (1 << int(rng.integers(8)))]) if place < len(changed) else b"\0"
        kinds = (
            (place, place + 1, flipped),
            (place, len(changed), b""),
            (place, place + length, b""),
            (place, place, rng.bytes(length)),
            (place, place, bytes(changed[place : place + length])),
            (place, place + 1, bytes(rng.choice([b"\xff", b"\n", b",", b'"', b"../", b"\r"]))),
        )
        start, end, changed_bytes = kinds[rng.integers(len(kinds))]
        changed[start:end] = changed_bytes
    return bytes(changed)


def _change_value(node: Any, rng: np.random.Generator) -> Any:
    """Return `node`, nested dicts and lists, with one value replaced or removed."""
    if isinstance(node, dict) and node and rng.integers(8):
        key = list(node)[rng.integers(len(node))]
        if not rng.integers(6):
            return {other: value for other, value in node.items() if other != key}
        return node | {key: _change_value(node[key], rng)}
    if isinstance(node, list) and node and rng.integers(8):
        place = int(rng.integers(len(node)))
        return [*node[:place], _change_value(node[place], rng), *node[place + 1 :]]
    return VALUES[rng.integers(len(VALUES))]


def _change_checkpoint(content: bytes, rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    torch.save(_change_value(torch.load(io.BytesIO(content), weights_only=True), rng), buffer)
    return buffer.getvalue()


def _change_cell(content: bytes, rng: np.random.Generator) -> bytes:
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    row = rows[rng.integers(len(rows))]
    row[rng.integers(len(row))] = str(VALUES[rng.integers(len(VALUES))])
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()


FORMATS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    ".json": lambda content, rng: json.dumps(_change_value(json.loads(content), rng)).encode(),
    ".pt": _change_checkpoint,
    ".csv": _change_cell,
}
