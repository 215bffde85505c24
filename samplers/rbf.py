"""Rollover Budget Forcing: go on at the first child that beats all before it, and take the unspent tries along."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.budget import RULES
from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import PathSearchConfig

EACH = 4  # least tries a level for a state of a beam


@dataclass(frozen=True, kw_only=True)
class RBF(PathSearchConfig):
    """Rollover Budget Forcing (Kim et al., arXiv 2503.19385, algorithm 1).

    Every chain starts from the best of ``initial`` noises by ``r(x0)``. At each noise level it tries children
    ``x' = alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z`` and moves on at the first with ``r(x0') > r*``, the
    highest reward of the chain so far; what is left of the level's quota goes to the next one. A level whose quota is
    spent moves on with its best child. The last level is searched until the budget is spent, then the chain's best
    goes down the deterministic tail, and the best of all chains is the result. Latents ``(B, C, H, W)``, rewards (B,).

    Two options go beyond the paper, which has one state a chain (``beam=1``). A chain goes on with its ``beam`` best
    children, which have the next ones in turn: what falls behind is dropped. And near noise ``r(x0)`` tells little of
    the sample, so the first noises may walk to the level ``begin`` without fresh noise and be compared there for the
    first time: that climbs the reward furthest, and what is its own taste with it.

    The budget is split alike: ``Q = floor((budget - tail - first) / levels)`` tries a level and chain, of the levels
    from ``begin`` on.

    Args:
        particles: chains of a picture.
        initial: noises that a chain begins from the best of; 0 for as many as a third of the budget pays for,
            whose latents are held at once.
        beam: most states that a chain goes on with: fewer where a level's quota has less than 4 tries for each of
            them, which would choose nothing. 1 is the paper's.
        begin: of the levels, the share that lies before the first that is scored.
        chunk: children that are predicted together.
        commit: of a chunk, "first": the first that is better, as if they had been tried one by one (what came after
            it is wasted, and charged); "best": all of them count.
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

    particles: int = 2
    initial: int = 4
    beam: int = 4
    begin: float = 0.0
    chunk: int = 16
    commit: Literal["first", "best"] = "best"
    against: Literal["running_max", "last_accepted"] = "running_max"
    rule: Literal["rollover", "threshold"] = "rollover"
    threshold: float | None = None
    leftover: Literal["next", "spread"] = "next"
    cap: int = -1

    def validate(self) -> None:
        super().validate()
        self.at_least(particles=1, beam=1, begin=0, initial=0, chunk=1, cap=-1)
        if self.begin >= 1:
            raise DiffAccelError(f"RBF.begin is {self.begin}; it is a share of the levels and must be below 1.")
        if self.rule == "threshold" and self.threshold is None:
            raise DiffAccelError("RBF with rule='threshold' needs a threshold: the reward that is good enough.")

    def chains(self, search: Search) -> list[Chain]:
        plan, n = search.plan, self.particles
        begin = min(int(self.begin * plan.stages), plan.stages - 2)  # one move is left at least
        initial = self.initial or max(1, search.budget // (3 * n * (begin + 1)))
        each = initial * (begin + 1) + plan.tail_nfe  # what a chain spends beside its levels
        self.check(
            search, n * (each + plan.stages - begin),
            f"{n} chains of {initial} noises at {begin + 1} of the levels, {plan.stages - begin} levels and "
            f"{plan.tail_nfe} steps of the tail",
        )  # fmt: skip
        quota = (search.budget - n * each) // (n * (plan.stages - begin))
        tries = -(-(search.budget - n * plan.tail_nfe) // n) - 1 - initial * (begin + 1)
        beam = max(1, min(self.beam, quota // EACH))
        return [rbf(search, chain, self, begin, initial, beam, quota, tries) for chain in range(n)]


def rbf(search: Search, chain: int, config: RBF, begin: int, initial: int, beam: int, each: int, tries: int) -> Chain:
    """One chain (arXiv 2503.19385, algorithm 1): ``each`` children a level, and ``tries`` in all."""
    found = yield [search.start(chain, i, score=begin == 0) for i in range(initial)]
    for stage in range(begin):
        found = yield [search.walk(state, score=stage == begin - 1) for state in found]
    states = search.ranked(found, beam)
    best, last = states[0].reward, search.plan.stages - 2
    rule = RULES[config.rule](config, each, last - begin + 1)
    for stage in range(begin, last + 1):
        # the last level is searched to the end, and every level before it leaves one try to each after it
        quota = tries if stage == last else min(rule.quota(stage - begin), tries - (last - stage))
        end, tried, accepted = quota, 0, False
        found = []
        while tried < end:
            count = min(config.chunk, quota - tried)
            children = yield [search.propose(states[i % len(states)], i) for i in range(tried, tried + count)]
            tries -= count
            fits = [tried + i for i, child in enumerate(children, 1) if rule.accepts(child.reward, best)]
            if fits and not accepted and (stage < last or config.rule == "threshold"):
                accepted, end = True, max(fits[0], min(len(states), quota))  # but every state has a child
            if config.commit == "first":
                children = children[: end - tried]
            search.ledger.nfe_wasted += count - len(children)
            tried += len(children)
            found = search.ranked([*found, *children], beam)  # all others are let go
            best = max(best, *(child.reward for child in children))
        rule.close(stage - begin, quota - tried)
        states = found
        best = best if config.against == "running_max" else states[0].reward
        search.note(chain=chain, stage=stage, tried=tried, quota=quota, reward=states[0].reward, accepted=accepted)
    return (yield from search.finish(states[:1] if search.plan.tail_nfe else states[: search.keep + 1]))
