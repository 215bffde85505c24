"""The cost account of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Stats:
    """What a run cost.

    Attributes:
        nfe: predictions, one per row and noise level; a guided one counts once.
        forwards: rows that went through the network; a guided prediction counts twice.
        calls: network calls.
        seconds: wall time of the loop.
        peak_memory: peak of allocated device memory in bytes, 0 on a CPU.
        nfe_by_resolution: ``nfe`` by picture size, ``WIDTHxHEIGHT``.
        report: what the sampler reports about the run, JSON-ready.
    """

    nfe: int = 0
    forwards: int = 0
    calls: int = 0
    steps: int = 0
    decodes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    nfe_by_resolution: dict[str, int] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for records."""
        return asdict(self)
