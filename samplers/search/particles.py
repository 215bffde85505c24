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


@dataclass(eq=False)
class Particle:
    """A state that a transition led to.

    Attributes:
        sigma, stage, key: those of its transition.
        reward: reward of its ``x0``, or of the sample; NaN where it was not scored.
        end: whether it is a sample.
        number: its place among all particles of the call, in the order in which they were asked for.
        log_ratio: ``log p(x' | x) / q(x' | x)`` of its transition, where a guided kernel q stands in for p; else 0.
        slot: where its latents are; None in a resumed search for those that nothing starts from any more.
    """

    sigma: float
    stage: int
    key: Key
    reward: float = math.nan
    end: bool = False
    number: int = 0
    log_ratio: float = 0.0
    slot: Slot | None = field(default=None, repr=False)

    @classmethod
    def from_transition(cls, transition: Transition, number: int = 0) -> Particle:
        """Make the particle that a transition leads to, before its latents and its reward are known."""
        return cls(transition.sigma, transition.stage, transition.key, end=transition.end, number=number)

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

    __slots__ = ("__weakref__", "index", "pool")

    def __init__(self, pool: Pool, index: int) -> None:
        self.pool, self.index = pool, index

    def __del__(self) -> None:
        self.pool.free.append(self.index)


class Pool:
    """Latents and velocities of the living particles: memory grows with their number, not with the budget.

    Attributes:
        tensors: ``(capacity, C, H, W)`` each: states ``x``, predictions ``v``, and what else is kept of every particle.
        free: indices of unused rows.
    """

    def __init__(self, like: Tensor, tensors: int = 2) -> None:
        """Make an empty pool with the shape ``(C, H, W)``, dtype and device of the rows of ``like``."""
        self.tensors = [like.new_empty(0, *like.shape[1:]) for _ in range(tensors)]
        self.free: list[int] = []

    @property
    def capacity(self) -> int:
        """Number of rows, used or not."""
        return len(self.tensors[0])

    def put(self, *rows: Tensor) -> list[Slot]:
        """Store rows ``(R, *shape)`` of every tensor, and return one slot for each."""
        count = len(rows[0])
        if len(self.free) < count:
            self._grow(count - len(self.free))
        slots = [Slot(self, self.free.pop()) for _ in range(count)]
        index = self._index(slots)
        for stored, new in zip(self.tensors, rows, strict=True):
            stored.index_copy_(0, index, new)
        return slots

    def get(self, slots: Sequence[Slot]) -> list[Tensor]:
        """Return the rows of the slots, ``(R, *shape)`` of every tensor."""
        index = self._index(slots)
        return [stored.index_select(0, index) for stored in self.tensors]

    def _grow(self, missing: int) -> None:
        capacity = self.capacity
        added = max(missing, capacity // 4)
        self.tensors = [torch.cat([stored, stored.new_empty(added, *stored.shape[1:])]) for stored in self.tensors]
        self.free += range(capacity + added - 1, capacity - 1, -1)

    def _index(self, slots: Sequence[Slot]) -> Tensor:
        device = self.tensors[0].device
        return torch.tensor([slot.index for slot in slots], dtype=torch.int64, device="cpu").to(device)
