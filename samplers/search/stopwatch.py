"""Where the seconds of a search went: its network, its decoder, its reward, and the rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class Stopwatch:
    """Sums the seconds of named parts; on a CUDA device by events, read once at the end, so that no queue is drained.

    Args:
        device: where the parts run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: list[tuple[str, Any, Any]] = []
        self._begin = self._now()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block as a part of that name."""
        begin = self._now()
        yield
        self._spans.append((name, begin, self._now()))

    def report(self) -> dict[str, float]:
        """Return the seconds of "network", "decode" and "reward", and as "engine" the rest of all since the start.

        Where scoring overlaps with predictions, the parts add up to more than the whole, and the engine has none.
        """
        end = self._now()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = dict.fromkeys(("network", "decode", "reward"), 0.0)
        for name, begin, finish in self._spans:
            seconds[name] += self._between(begin, finish)
        whole = self._between(self._begin, end)
        return {**seconds, "engine": max(0.0, whole - sum(seconds.values())), "whole": whole}

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1000 if self.device.type == "cuda" else float(end - begin)
