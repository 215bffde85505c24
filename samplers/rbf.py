"""Rollover Budget Forcing: go on at the first child that beats all before it, and take the unspent tries along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.budget import RULES
from diffaccel.samplers.search.config import PathSearchConfig
from diffaccel.samplers.search.particles import Particle
from diffaccel.samplers.search.task import Chain, Search


@dataclass(frozen=True, kw_only=True)
class RBF(PathSearchConfig):
    """Rollover Budget Forcing (Kim et al., arXiv 2503.19385, algorithm 1).

    Every chain starts from the best of ``initial`` noises by ``r(x0)``. At each noise level it tries children
    ``x' = alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z`` and moves on at the first with ``r(x0') > r*``, the
    highest reward of the chain so far; what is left of the level's quota goes to the next one. A level whose quota is
    spent moves on with its best child. The last level is searched until the budget is spent, then the chain's best
    goes down the deterministic tail, and the best of all chains is the result. Latents ``(B, C, H, W)``, rewards (B,).

    The budget is split alike: ``Q = floor((budget - tail - initial) / stages)`` tries a level and chain.

    Args:
        particles: chains of a picture.
        initial: noises that a chain begins from the best of.
        chunk: children that are predicted together.
        commit: of a chunk, "first": the first that is better, as if they had been tried one by one (what came after
            it is wasted, and charged); "best": the best, if it is better.
        against: what a child must beat: the highest reward that the chain was at, or that of the state it is at.
        rule: "rollover" (the paper's), or "threshold": a level ends at the first child whose reward reaches
            ``threshold`` and passes nothing on.
        threshold: a reward that is good enough; for the rule of that name, where it is required.
        leftover: unspent tries go to the "next" level, or "spread" over all that remain.
        cap: most tries that a level takes over; -1 for no limit.
    """

    name: ClassVar[str] = "rbf"
    paper: ClassVar[str] = (
        "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing, arXiv 2503.19385"
    )

    particles: int = 4
    initial: int = 4
    chunk: int = 8
    commit: Literal["first", "best"] = "best"
    against: Literal["running_max", "last_accepted"] = "running_max"
    rule: Literal["rollover", "threshold"] = "rollover"
    threshold: float | None = None
    leftover: Literal["next", "spread"] = "next"
    cap: int = -1

    def validate(self) -> None:
        super().validate()
        self.at_least(particles=1, initial=1, chunk=1, cap=-1)
        if self.rule == "threshold" and self.threshold is None:
            raise DiffAccelError("RBF with rule='threshold' needs a threshold: the reward that is good enough.")

    def chains(self, search: Search) -> list[Chain]:
        plan, n = search.plan, self.particles
        tail = n * plan.tail_nfe
        self.check(
            search, tail + n * (self.initial + plan.stages),
            f"{n} chains of {self.initial} noises, {plan.stages} levels and {plan.tail_nfe} steps of the tail",
        )  # fmt: skip
        each = (search.budget - tail - n * self.initial) // (n * plan.stages)
        tries = -(-(search.budget - tail) // n) - 1 - self.initial
        return [rbf(search, chain, self, each, tries) for chain in range(n)]


def rbf(search: Search, chain: int, config: RBF, each: int, tries: int) -> Chain:
    """One chain (arXiv 2503.19385, algorithm 1): ``each`` children a level, and ``tries`` in all."""
    state = max((yield [search.start(chain, i) for i in range(config.initial)]), key=lambda p: p.reward)
    best, last = state.reward, search.plan.stages - 2
    rule = RULES[config.rule](config, each, last + 1)
    for stage in range(last + 1):
        # the last level is searched to the end, and every level before it leaves one try to each after it
        quota = tries if stage == last else min(rule.quota(stage), tries - (last - stage))
        found: list[Particle] = []  # the best of the level so far: all others are let go
        tried, accepted = 0, False
        while tried < quota and not accepted:
            count = min(config.chunk, quota - tried)
            children = yield [search.propose(state, tried + i) for i in range(count)]
            tries -= count
            fits = [rule.accepts(child.reward, best) for child in children]
            accepted = any(fits) and (stage < last or config.rule == "threshold")
            if accepted and config.commit == "first":
                children = children[: fits.index(True) + 1]
            search.ledger.nfe_wasted += count - len(children)
            tried += len(children)
            found = [max([*found, *children], key=lambda p: p.reward)]
            best = max(best, *(child.reward for child in children))
        rule.close(stage, quota - tried)
        state = found[0]
        best = best if config.against == "running_max" else state.reward
        search.note(chain=chain, stage=stage, tried=tried, quota=quota, reward=state.reward, accepted=accepted)
    return (yield from search.finish([state]))
