"""How the rank of the side branch falls: phases, what each keeps, and the gate of the part that fades."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Gate = Literal["cosine", "linear"]


@dataclass(frozen=True)
class RankPoint:
    """The side branch at one step: its first ``keep`` of ``rank`` columns count fully, the others by ``gate``."""

    rank: int
    keep: int
    gate: float


@dataclass(frozen=True)
class RankSchedule:
    """A rank that falls from ``rank`` to ``last`` in phases of equal length.

    A phase of rank r keeps ``floor((1 - shrink) r)`` columns, at least ``last`` and at most ``r - 1``; the gate of the
    others falls from 1 to 0 as ``u = (1 + cos(pi tau)) / 2`` or ``1 - tau``, tau the part of the phase that is over.
    """

    rank: int
    last: int
    shrink: float
    gate: Gate
    phase_steps: int

    @property
    def ranks(self) -> list[int]:
        """Ranks of the phases, then the last rank."""
        ranks = [self.rank]
        while ranks[-1] > self.last:
            kept = math.floor((1 - self.shrink) * ranks[-1] + 1e-9)
            ranks.append(max(self.last, min(kept, ranks[-1] - 1)))
        return ranks

    @property
    def phases(self) -> int:
        """Number of phases until the last rank is reached."""
        return len(self.ranks) - 1

    def at(self, step: int) -> RankPoint:
        """Return the side branch at a step, counted from 0."""
        ranks, phase = self.ranks, step // self.phase_steps
        if phase >= self.phases:
            return RankPoint(ranks[-1], ranks[-1], 1.0)
        part = (step % self.phase_steps) / self.phase_steps
        gate = (1 + math.cos(math.pi * part)) / 2 if self.gate == "cosine" else 1 - part
        return RankPoint(ranks[phase], ranks[phase + 1], gate)
