"""The cost account of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

RunPath = Literal["native", "stock loop", "stock call"]


@dataclass
class Stats:
    """What a run cost.

    Attributes:
        nfe: predictions, one per row and noise level; a guided one counts once.
        forwards: rows that went through the network; a guided prediction counts twice.
        calls: network calls.
        seconds: wall time of the loop; of the whole call where it ran in the pipeline's own loop.
        peak_memory: peak of allocated device memory in bytes, 0 on a CPU.
        nfe_by_resolution: ``nfe`` by picture size, ``WIDTHxHEIGHT``.
        report: what the sampler reports about the run, JSON-ready.
        caches: real and skipped network calls and their seconds, where a cache is on the network; JSON-ready.
        path: what ran the loop: our driver ("native"), the pipeline's loop with a sampler in the place of its solver
            ("stock loop"), or the pipeline's own call with its own solver ("stock call").
        not_counted: names of the fields that this path cannot count.
    """

    nfe: int = 0
    forwards: int = 0
    calls: int = 0
    steps: int = 0
    decodes: int = 0
    encodes: int = 0
    seconds: float = 0.0
    peak_memory: int = 0
    nfe_by_resolution: dict[str, int] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    caches: dict[str, Any] = field(default_factory=dict)
    path: RunPath = "native"
    not_counted: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict for records."""
        return asdict(self)

    @contextlib.contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Note wall time and peak device memory of a block that ends well."""
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            self.peak_memory = torch.cuda.max_memory_allocated(device)
        self.seconds = time.perf_counter() - start
