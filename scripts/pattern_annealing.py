"""Search a set of real steps of a given size by simulated annealing and hill climbing, as arXiv 2606.13496 does.

Of ``steps`` steps ``budget`` are real. The first of them always are; the others move: mostly one, mostly by up to three
places. A worse set is taken over with probability ``exp(-increase / T)`` while the temperature ``T`` falls
geometrically. Then the best move of all that lie within three places, and of two far ones for each step, is made until
none is a gain. A set that was measured once is not measured again and counts once.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

Steps = frozenset[int]
HOT, COLD = 0.05, 1e-5  # temperatures
NEAR = 3  # places
ANNEALED = 200  # proposals of the annealing, at most
ROUNDS = 20  # of the climb, at most


class Spent(Exception):
    """The evaluations are spent."""


@dataclass
class PatternSearch:
    """One search.

    Args:
        loss: of a set of real steps.
        steps, budget: of the call, and how many of them are real.
        evaluations: sets that may be measured.
        prefix: first steps that are always real; None for a quarter of the budget, at least one.
        seed: of the proposals.

    Attributes:
        measured: losses of the sets that were measured.
        hits: number of times that a set was known.
    """

    loss: Callable[[Steps], float]
    steps: int
    budget: int
    evaluations: int
    prefix: int | None = None
    seed: int = 0
    measured: dict[Steps, float] = field(default_factory=dict)
    hits: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.budget <= self.steps:
            raise ValueError(f"{self.budget} real steps of {self.steps} were asked for; it must be from 1 to all.")
        self.first = max(1, self.budget // 4) if self.prefix is None else self.prefix
        self._rng = random.Random(f"real steps {self.seed}")

    def run(self) -> Steps:
        """Return the best set that was measured; all steps, unmeasured, where all are real."""
        if self.budget == self.steps:
            return frozenset(range(self.steps))
        try:
            self._climb(self._anneal(self._start()))
        except Spent:
            pass
        return min(self.measured, key=lambda real: (self.measured[real], sorted(real)))

    def value(self, real: Steps) -> float:
        """Return the loss of a set, measured at most once.

        Raises:
            Spent: for a set that is not known when all evaluations are spent.
        """
        if real in self.measured:
            self.hits += 1
        elif len(self.measured) >= self.evaluations:
            raise Spent
        else:
            self.measured[real] = self.loss(real)
        return self.measured[real]

    def _start(self) -> Steps:
        rest = self._rng.sample(range(self.first, self.steps), self.budget - self.first)
        return frozenset([*range(self.first), *rest])

    def _anneal(self, state: Steps) -> Steps:
        now = self.value(state)
        best, best_value = state, now
        count = min(ANNEALED, max(1, self.evaluations // 2))
        for i in range(count):
            temperature = HOT * (COLD / HOT) ** (i / max(1, count - 1))
            proposal = self._moved(state, 1 if self._rng.random() < 0.9 else 2)
            value = self.value(proposal)
            if value <= now or self._rng.random() < math.exp((now - value) / temperature):
                state, now = proposal, value
                if now < best_value:
                    best, best_value = state, now
        return best

    def _moved(self, state: Steps, count: int) -> Steps:
        """Return a set with some of its free steps elsewhere."""
        for _ in range(count):
            movable = sorted(step for step in state if step >= self.first)
            if not movable:
                break
            step = self._rng.choice(movable)
            free = [place for place in range(self.first, self.steps) if place not in state]
            near = [place for place in free if abs(place - step) <= NEAR]
            places = near if near and self._rng.random() < 0.7 else free
            if places:
                state = state - {step} | {self._rng.choice(places)}
        return state

    def _climb(self, state: Steps) -> None:
        """Make the best move until none is a gain."""
        for _ in range(ROUNDS):
            now = self.value(state)
            moves = {proposal: self.value(proposal) for proposal in self._neighbours(state)}
            best = min(moves, key=lambda real: (moves[real], sorted(real)), default=state)
            if not moves or moves[best] >= now:
                return
            state = best

    def _neighbours(self, state: Steps) -> list[Steps]:
        free = [place for place in range(self.first, self.steps) if place not in state]
        proposals: list[Steps] = []
        for step in sorted(step for step in state if step >= self.first):
            near = [place for place in free if abs(place - step) <= NEAR]
            far = [place for place in free if abs(place - step) > NEAR]
            places = [*near, *self._rng.sample(far, min(2, len(far)))]
            proposals += [state - {step} | {place} for place in places]
        return proposals
