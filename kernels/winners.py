"""Measured winners: the fastest configuration of a kernel for a shape on a kind of device, read from a shipped table.

``winners.json`` maps ``"OPERATION smMAJOR.MINOR N K M-BUCKET"`` to the fields of a tile. Rows are counted in buckets,
the next power of two above, so that a new resolution needs no new measurement. ``scripts/bench_quant.py --tune``
measures and writes it.
"""

from __future__ import annotations

import functools
import json
from importlib import resources
from typing import Any


def key(operation: str, capability: tuple[int, int], m: int, n: int, k: int) -> str:
    """Return the name of a shape in the table."""
    bucket = 1 << max(0, m - 1).bit_length()
    return f"{operation} sm{capability[0]}.{capability[1]} {n} {k} {bucket}"


def winner(operation: str, capability: tuple[int, int], m: int, n: int, k: int) -> dict[str, Any] | None:
    """Return the fields of the measured winner, or None where nothing was measured."""
    return _table().get(key(operation, capability, m, n, k))


def forget() -> None:
    """Read the table again at its next use, after it was written."""
    _table.cache_clear()


@functools.cache
def _table() -> dict[str, dict[str, Any]]:
    text = resources.files("diffaccel.kernels").joinpath("winners.json").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = json.loads(text)["winners"]
    return table
