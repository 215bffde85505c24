"""One prompt's search as its policy sees it: how moves are made, what they cost, what is left of the budget."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from diffaccel.samplers.search.particles import Key, Move, Particle
from diffaccel.samplers.search.plan import SearchPlan
from diffaccel.samplers.search.transitions import Coefficients, cps, forward

FROM_NOISE = Coefficients(0.0, 0.0, 0.0)
Chain = Generator[list[Move], list[Particle], list[Particle]]


@dataclass
class Ledger:
    """What a search of one prompt cost.

    Attributes:
        nfe: predictions, one per state and level; a guided one counts once.
        nfe_wasted: of them, those of proposals that nobody looked at.
        nfe_recomputed: on top: states computed again when a search went on from its trace.
        scored: pictures decoded and scored.
    """

    nfe: int = 0
    nfe_wasted: int = 0
    nfe_recomputed: int = 0
    scored: int = 0

    def to_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return asdict(self)


@dataclass(eq=False)
class Search:
    """The search for one prompt (one row of the call).

    Attributes:
        row: of the call.
        seed: of its noise.
        budget: most predictions.
        keep: samples that are kept beside the best.
        ledger: what it has cost so far.
        best: the best particle so far; one at the end of its way is better than any before it.
        log: a line a decision, JSON-ready.
        samples: what its chains came to, best first.
        rewards: the lowest and the highest reward that was seen; None before the first.
        climb: whenever a scored one became the best so far: NFE, reward, whether it is a sample.
    """

    row: int
    prompt: str
    seed: int
    plan: SearchPlan
    budget: int
    keep: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    best: Particle | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Particle] = field(default_factory=list)
    rewards: tuple[float, float] | None = None
    climb: list[tuple[int, float, bool]] = field(default_factory=list)

    def start(self, chain: int, attempt: int = 0, *, score: bool = True) -> Move:
        """A first state, of noise; the first attempt of chain 0 is the call's own."""
        key = Key(chain, 0, attempt)
        return Move(None, self.plan.sigmas[0], FROM_NOISE, key, 0, score)

    def propose(self, parent: Particle, attempt: int, *, chain: int | None = None, score: bool = True) -> Move:
        """A child at the next searched level, with fresh noise."""
        stage = parent.stage + 1
        key = Key(parent.key.chain if chain is None else chain, stage, attempt)
        return Move(parent, self.plan.sigmas[stage], self.plan.kernels[parent.stage], key, stage, score)

    def walk(self, parent: Particle, *, score: bool = False) -> Move:
        """The child at the next searched level without fresh noise."""
        stage = parent.stage + 1
        key = Key(parent.key.chain, stage, parent.key.attempt)
        return Move(parent, self.plan.sigmas[stage], self.plan.ode(parent.stage), key, stage, score)

    def step(self, parent: Particle, sigma: float, *, score: bool = False, predict: bool = True) -> Move:
        """A child at any lower level without fresh noise."""
        key = Key(parent.key.chain, parent.stage + 1, parent.key.attempt)
        return Move(parent, sigma, cps(self.plan.path, parent.sigma, sigma), key, parent.stage + 1, score, predict)

    def end(self, parent: Particle) -> Move:
        """The sample: the last level of the tail."""
        move = self.step(parent, self.plan.tail[-1], score=True, predict=False)
        return replace(move, end=True)

    def renoise(self, parent: Particle, sigma: float, key: Key, *, score: bool = False) -> Move:
        """The parent with noise added up to a higher level."""
        return Move(parent, sigma, forward(self.plan.path, parent.sigma, sigma), key, key.stage, score)

    def finish(self, parents: list[Particle]) -> Chain:
        """Walk from the last searched level to the end: the sample of each parent, scored."""
        for sigma in self.plan.tail[:-1]:
            parents = yield [self.step(p, sigma) for p in parents]
        return (yield [self.end(p) for p in parents])

    def ranked(self, samples: list[Particle], count: int = 0) -> list[Particle]:
        """The best first, of equal ones that of the smaller key; ``count`` of them, or the best and those kept."""
        return sorted(samples, key=lambda sample: (-sample.reward, sample.key))[: count or self.keep + 1]

    def charge(self, move: Move) -> None:
        """Enter a move into the ledger."""
        self.ledger.nfe += move.predict
        self.ledger.scored += move.score

    def see(self, particle: Particle) -> None:
        """Remember its reward, and it if it is the best so far."""
        if not math.isnan(particle.reward):
            low, high = self.rewards or (particle.reward, particle.reward)
            self.rewards = min(low, particle.reward), max(high, particle.reward)
        if particle.better(self.best):
            self.best = particle
            if not math.isnan(particle.reward):
                self.climb.append((self.ledger.nfe, particle.reward, particle.end))

    def note(self, **what: Any) -> None:
        """Add a line to the log, with the predictions charged so far."""
        self.log.append({**what, "nfe": self.ledger.nfe})


@dataclass(eq=False)
class Task:
    """The ``number``-th chain of a search, and where it stands."""

    search: Search
    number: int
    chain: Chain
    moves: list[Move] = field(default_factory=list)

    def advance(self, particles: list[Particle] | None) -> None:
        """Give the policy what it asked for, and take its next moves; at its end, the search has its samples."""
        try:
            self.moves = next(self.chain) if particles is None else self.chain.send(particles)
        except StopIteration as stop:
            self.moves = []
            self.search.samples = self.search.ranked([*self.search.samples, *stop.value])
