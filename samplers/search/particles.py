"""Transitions that a policy asks for, particles that it receives, and the memory that holds their latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffaccel.samplers.search.transitions import Coefficients


class Key(NamedTuple):
    """Key of a transition's noise, which is a pure function of it and of the prompt's seed."""

    chain: int
    stage: int
    attempt: int


@dataclass(frozen=True, eq=False)
class Lineage:
    """The transitions that led to a state, linked by parent: enough to compute its latents again."""

    sigma: float
    stage: int
    coefficients: Coefficients
    key: Key
    score: bool
    predict: bool
    parent: Lineage | None


@dataclass(frozen=True, eq=False)
class Transition:
    """A request for a state at ``sigma``, with a prediction and a score there.

    Attributes:
        parent: the state that it starts from; None starts from noise, whatever the coefficients.
        sigma: noise level that it arrives at, in the session's coordinates.
        coefficients: factors of the parent's ``x`` and ``v``, and of the noise.
        key: key of the noise.
        stage: index of the searched level that it arrives at; beyond the last one it goes on counting.
        score: whether the reward is evaluated, on ``x0``, or on ``x`` itself where nothing is predicted.
        predict: whether the network is evaluated at the new state.
        end: whether the new state is a sample, not one on the way.
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
        """Lineage of the resulting state."""
        parent = None if self.parent is None else self.parent.lineage
        return Lineage(self.sigma, self.stage, self.coefficients, self.key, self.score, self.predict, parent)


@dataclass(eq=False)
class Particle:
    """A state that a transition led to.

    Attributes:
        sigma, stage, key: those of its transition.
        reward: reward of its ``x0``, or of the sample; NaN where it was not scored.
        lineage: the transitions that led to it.
        end: whether it is a sample.
        slot: where its latents are; None in a resumed search until they are computed again.
    """

    sigma: float
    stage: int
    key: Key
    reward: float
    lineage: Lineage
    end: bool = False
    slot: Slot | None = field(default=None, repr=False)

    @classmethod
    def from_transition(cls, transition: Transition) -> Particle:
        """Make the particle that a transition leads to, before its latents and its reward are known."""
        lineage = transition.lineage
        return cls(lineage.sigma, lineage.stage, lineage.key, math.nan, lineage, transition.end)

    def better(self, other: Particle | None) -> bool:
        """Return whether it is strictly better than another particle, so that of two equal ones the first stays.

        A scored particle is better than an unscored one, and of two unscored ones the later stage is better. A sample
        is better than any state on the way to one, whose reward is an estimate. Otherwise the higher reward is better.
        """
        if other is None:
            return True
        if math.isnan(self.reward):
            return math.isnan(other.reward) and self.stage > other.stage
        if math.isnan(other.reward):
            return True
        return self.reward > other.reward if self.end == other.end else self.end


class Slot:
    """A row of a :class:`Pool`, freed when its last holder is gone."""

    __slots__ = ("index", "pool")

    def __init__(self, pool: Pool, index: int) -> None:
        self.pool, self.index = pool, index

    def __del__(self) -> None:
        self.pool.free.append(self.index)


class Pool:
    """Latents and velocities of the living particles: memory grows with their number, not with the budget.

    Attributes:
        x, v: ``(capacity, C, H, W)``.
        free: indices of unused rows.
    """

    def __init__(self, like: Tensor) -> None:
        """Make an empty pool with the shape ``(C, H, W)``, dtype and device of the rows of ``like``."""
        self.x = like.new_empty(0, *like.shape[1:])
        self.v = like.new_empty(0, *like.shape[1:])
        self.free: list[int] = []

    def put(self, x: Tensor, v: Tensor) -> list[Slot]:
        """Store rows ``(R, C, H, W)`` and return one slot for each."""
        if len(self.free) < len(x):
            self._grow(len(x) - len(self.free))
        slots = [Slot(self, self.free.pop()) for _ in range(len(x))]
        index = self._index(slots)
        self.x.index_copy_(0, index, x)
        self.v.index_copy_(0, index, v)
        return slots

    def get(self, slots: Sequence[Slot]) -> tuple[Tensor, Tensor]:
        """Return ``x`` and ``v`` of the slots, ``(R, C, H, W)`` each."""
        index = self._index(slots)
        return self.x.index_select(0, index), self.v.index_select(0, index)

    def _grow(self, missing: int) -> None:
        capacity = len(self.x)
        added = max(missing, capacity // 4)
        self.x = torch.cat([self.x, self.x.new_empty(added, *self.x.shape[1:])])
        self.v = torch.cat([self.v, self.v.new_empty(added, *self.v.shape[1:])])
        self.free += range(capacity + added - 1, capacity - 1, -1)

    def _index(self, slots: Sequence[Slot]) -> Tensor:
        return torch.tensor([slot.index for slot in slots], dtype=torch.int64, device="cpu").to(self.x.device)
