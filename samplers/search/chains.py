"""The search for one prompt as its policies see it: transitions to ask for, their cost, and the budget that is left."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from diffaccel.samplers.search.particles import Key, Particle, Transition
from diffaccel.samplers.search.plan import SearchPlan
from diffaccel.samplers.search.transitions import Coefficients, cps, forward

FROM_NOISE = Coefficients(0.0, 0.0, 0.0)
Chain = Generator[list[Transition], list[Particle], list[Particle]]


@dataclass
class Ledger:
    """Cost of the search for one prompt.

    Attributes:
        nfe: predictions, one per state and level; a guided one counts once.
        nfe_wasted: the part of ``nfe`` spent on children that were not compared.
        scored: pictures decoded and scored.
    """

    nfe: int = 0
    nfe_wasted: int = 0
    scored: int = 0

    def to_dict(self) -> dict[str, int]:
        """Return the costs, JSON-ready."""
        return asdict(self)


@dataclass(eq=False)
class Search:
    """The search for one prompt (one row of the call).

    Attributes:
        row: index of the row in the call.
        seed: seed of the row's noise.
        budget: maximum number of predictions.
        keep: number of samples kept beside the best.
        ledger: cost so far.
        best: best particle so far; a sample is better than any state on the way to one.
        log: one JSON-ready line per decision.
        samples: samples of the finished chains, best first.
        rewards: lowest and highest reward so far; None before the first.
        climb: ``(NFE, reward, whether it is a sample)`` of every scored particle that became the best so far.
        own: reward of the call's own noise, the first that was scored of it.
        first, until, every: of the searched levels those are scored that lie ``every`` apart from ``first`` on, up to
            ``until``, None for all, and the last.
        log_weights: of samples, by number, what they weigh beside their rewards; 0 for those not in it.
        used: sizes that the method derived from its options and the budget, JSON-ready.
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
    own: float | None = None
    log_weights: dict[int, float] = field(default_factory=dict)
    used: dict[str, Any] = field(default_factory=dict)
    first: int = 0
    until: int | None = None
    every: int = 1

    def scores(self, stage: int) -> bool:
        """Return whether predictions at a searched level are scored and chosen by."""
        until = self.plan.stages if self.until is None else self.until
        is_due = self.first <= stage <= until and (stage - self.first) % self.every == 0
        return is_due or stage == self.plan.stages - 1

    def start(self, chain: int, attempt: int = 0, *, score: bool = True) -> Transition:
        """Ask for a first state, of pure noise; the first attempt of chain 0 has the call's own noise."""
        key = Key(chain, 0, attempt)
        return Transition(None, self.plan.sigmas[0], FROM_NOISE, key, 0, score)

    def propose(self, parent: Particle, attempt: int, *, chain: int | None = None, score: bool = True) -> Transition:
        """Ask for a child at the next searched level, with fresh noise."""
        stage = parent.stage + 1
        key = Key(parent.key.chain if chain is None else chain, stage, attempt)
        return Transition(parent, self.plan.sigmas[stage], self.plan.kernels[parent.stage], key, stage, score)

    def walk(self, parent: Particle, *, score: bool = False) -> Transition:
        """Ask for the child at the next searched level without fresh noise."""
        stage = parent.stage + 1
        key = Key(parent.key.chain, stage, parent.key.attempt)
        return Transition(parent, self.plan.sigmas[stage], self.plan.ode(parent.stage), key, stage, score)

    def step(self, parent: Particle, sigma: float, *, score: bool = False, predict: bool = True) -> Transition:
        """Ask for a child at any lower level, without fresh noise."""
        key, stage = Key(parent.key.chain, parent.stage + 1, parent.key.attempt), parent.stage + 1
        return Transition(parent, sigma, cps(self.plan.path, parent.sigma, sigma), key, stage, score, predict)

    def end(self, parent: Particle) -> Transition:
        """Ask for the sample, at the last level of the tail."""
        transition = self.step(parent, self.plan.tail[-1], score=True, predict=False)
        return replace(transition, end=True)

    def renoise(self, parent: Particle, sigma: float, key: Key, *, score: bool = False) -> Transition:
        """Ask for the parent with noise added up to a higher level."""
        return Transition(parent, sigma, forward(self.plan.path, parent.sigma, sigma), key, key.stage, score)

    def finish(self, parents: list[Particle]) -> Chain:
        """Walk from the last searched level to the end, and return the scored sample of each parent."""
        for sigma in self.plan.tail[:-1]:
            parents = yield [self.step(p, sigma) for p in parents]
        return (yield [self.end(p) for p in parents])

    def ranked(self, particles: list[Particle], count: int = 0) -> list[Particle]:
        """Sort by falling reward, equal rewards by key, and keep ``count``; 0 keeps the best and ``keep`` more."""
        return sorted(particles, key=lambda particle: (-particle.reward, particle.key))[: count or self.keep + 1]

    def charge(self, transition: Transition, *, guided: bool = False) -> None:
        """Add the cost of a transition to the ledger; guided predictions are scored for their gradients."""
        self.ledger.nfe += transition.predict
        self.ledger.scored += transition.score or (guided and transition.predict)

    def observe(self, particle: Particle) -> None:
        """Record a particle's reward, and keep the particle if it is the best so far."""
        if not math.isnan(particle.reward):
            low, high = self.rewards or (particle.reward, particle.reward)
            self.rewards = min(low, particle.reward), max(high, particle.reward)
            if self.own is None and particle.key.chain == particle.key.attempt == 0:
                self.own = particle.reward
        if particle.better(self.best):
            self.best = particle
            if not math.isnan(particle.reward):
                self.climb.append((self.ledger.nfe, particle.reward, particle.end))

    def note(self, **decision: Any) -> None:
        """Add a decision to the log, with the predictions charged so far."""
        self.log.append({**decision, "nfe": self.ledger.nfe})


@dataclass(eq=False)
class RunningChain:
    """A chain that is being run, with the transitions that it waits for.

    Attributes:
        search: the search that it belongs to.
        number: its index in that search.
        policy: the method's generator.
        transitions: what the policy asked for last; empty at its end.
    """

    search: Search
    number: int
    policy: Chain
    transitions: list[Transition] = field(default_factory=list)

    def advance(self, particles: list[Particle] | None) -> None:
        """Send the particles that the policy asked for, None at first; at its end, hand its samples to the search."""
        try:
            self.transitions = next(self.policy) if particles is None else self.policy.send(particles)
        except StopIteration as stop:
            self.transitions = []
            self.search.samples = self.search.ranked([*self.search.samples, *stop.value])
