"""Moves that a policy asks for, particles that it gets back, and the memory that holds their latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.samplers.search.transitions import Coefficients


class Key(NamedTuple):
    """Which noise a move draws: a pure function of these and of the prompt's seed."""

    chain: int
    stage: int
    attempt: int


@dataclass(frozen=True, eq=False)
class Lineage:
    """How a state came to be: enough to compute its latents again."""

    sigma: float
    stage: int
    coefficients: Coefficients
    key: Key
    score: bool
    predict: bool
    parent: Lineage | None


@dataclass(frozen=True, eq=False)
class Move:
    """Ask for a state at ``sigma``, and what is predicted and scored there.

    Attributes:
        parent: where it starts; None starts from noise, and the coefficients do not matter.
        sigma: the level that it arrives at, in the session's coordinates.
        coefficients: of the parent's ``x`` and ``v``, and of noise.
        key: of the noise.
        stage: index of the searched level that it arrives at; the count of levels for one beyond them.
        score: whether the reward is asked, of ``x0``, or of ``x`` itself where nothing is predicted.
        predict: whether the network is asked at the state.
        end: the state is a sample, not one on the way.
    """

    parent: Particle | None
    sigma: float
    coefficients: Coefficients
    key: Key
    stage: int
    score: bool = True
    predict: bool = True
    end: bool = False

    @property
    def lineage(self) -> Lineage:
        """Of the state that it makes."""
        parent = None if self.parent is None else self.parent.lineage
        return Lineage(self.sigma, self.stage, self.coefficients, self.key, self.score, self.predict, parent)


@dataclass(eq=False)
class Particle:
    """A state that was reached.

    Attributes:
        sigma, stage, key: of its move.
        reward: of its ``x0``, or of the sample; NaN where it was not asked for.
        lineage: how it came to be.
        end: it is a sample.
        slot: where its latents are; None until they are computed again, in a search that goes on from a trace.
    """

    sigma: float
    stage: int
    key: Key
    reward: float
    lineage: Lineage
    end: bool = False
    slot: Slot | None = field(default=None, repr=False)

    @classmethod
    def of(cls, move: Move) -> Particle:
        """What a move makes, before its latents and its reward are known."""
        return cls(move.sigma, move.stage, move.key, math.nan, move.lineage, move.end)

    def better(self, other: Particle | None) -> bool:
        """Whether its reward is higher, strictly: of two equal ones the first stays. A sample is better than any state
        on the way to one, whose reward is a guess; of two that were not scored, the one further on is."""
        if other is None:
            return True
        if math.isnan(self.reward):
            return math.isnan(other.reward) and self.stage > other.stage
        if math.isnan(other.reward):
            return True
        return self.reward > other.reward if self.end == other.end else self.end


class Slot:
    """A row of a :class:`Pool`, given back when nobody holds it."""

    __slots__ = ("index", "pool")

    def __init__(self, pool: Pool, index: int) -> None:
        self.pool, self.index = pool, index

    def __del__(self) -> None:
        self.pool.free.append(self.index)


class Pool:
    """Latents and velocities of the particles that are alive: memory follows their number, not the budget.

    Attributes:
        x, v: ``(capacity, C, H, W)``.
    """

    def __init__(self, like: Tensor) -> None:
        """``like`` is ``(B, C, H, W)``, for shape, dtype and device."""
        self.x = like.new_empty(0, *like.shape[1:])
        self.v = like.new_empty(0, *like.shape[1:])
        self.free: list[int] = []

    def put(self, x: Tensor, v: Tensor) -> list[Slot]:
        """Keep rows ``(R, C, H, W)``; one slot each."""
        if len(self.free) < len(x):
            self._grow(len(x) - len(self.free))
        slots = [Slot(self, self.free.pop()) for _ in range(len(x))]
        index = self._index(slots)
        self.x.index_copy_(0, index, x)
        self.v.index_copy_(0, index, v)
        return slots

    def get(self, slots: Sequence[Slot]) -> tuple[Tensor, Tensor]:
        """``x`` and ``v``, ``(R, C, H, W)`` each."""
        index = self._index(slots)
        return self.x.index_select(0, index), self.v.index_select(0, index)

    def _grow(self, missing: int) -> None:
        old = len(self.x)
        more = max(missing, old // 4)
        self.x = torch.cat([self.x, self.x.new_empty(more, *self.x.shape[1:])])
        self.v = torch.cat([self.v, self.v.new_empty(more, *self.v.shape[1:])])
        self.free += range(old + more - 1, old - 1, -1)

    def _index(self, slots: Sequence[Slot]) -> Tensor:
        return torch.tensor([slot.index for slot in slots]).to(self.x.device)
