"""Rollover Budget Forcing: continue from the first child that beats the best so far and carry unspent tries over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.budget import RULES
from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import PathSearchConfig
from diffaccel.samplers.search.particles import Particle
from diffaccel.samplers.search.published import PublishedForm

MIN_TRIES = 4  # per level and state of a beam


@dataclass(frozen=True, kw_only=True)
class RBF(PublishedForm, PathSearchConfig):
    """Rollover Budget Forcing (Kim et al., arXiv 2503.19385, algorithm 1).

    Every chain starts from the best of ``initial`` noises by ``r(x0)``. At each noise level it tries children
    ``x' = alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z`` and continues from the first with ``r(x0') > r*``, the
    highest reward of the chain so far; the rest of the level's quota is added to the next level's. A level that spends
    its quota continues from its best child. The last level is searched until the budget is spent, then the chain's best
    state follows the deterministic tail, and the best of all chains is the result. Latents ``(B, C, H, W)``, rewards
    (B,).

    Two options go beyond the paper, which keeps one state per chain (``beam=1``). A chain continues from its ``beam``
    best children, which take turns as parents of the next ones; all others are dropped. And since ``r(x0)`` says little
    of the sample near pure noise, the first noises may be denoised to the level ``begin`` without fresh noise and
    scored there for the first time. That raises the reward most, and with it what is peculiar to this reward.

    The budget is split equally: ``Q = floor((budget - tail - first) / levels)`` tries per level and chain, over the
    levels from ``begin`` on; the last level has what that leaves. The trace says which sizes were used.

    As published (``paper()``), it has one state a chain and tries one child at a time on the variance-preserving
    path, to a posterior mean; its 25 first noises and 10 levels need a budget of about 500 NFE.

    Args:
        particles: chains per picture.
        initial: number of noises of which a chain starts from the best; 0 for as many as a third of the budget pays
            for. Their latents are held in memory at once.
        beam: maximum number of states that a chain continues from. It is lowered where a level's quota has less than 4
            tries for each of them, which would select nothing. 1 is the paper's.
        begin: share of the levels that lie before the first one that is scored.
        chunk: children that are predicted together.
        commit: which children of a chunk count. "first": those up to the first accepted one, as if they had been tried
            one by one; the rest is wasted, and charged. "best": all of them.
        against: what a child must beat: "running_max", the highest reward of the chain so far, or "last_accepted", the
            reward of the current state.
        rule: "rollover" (the paper's), or "threshold": a level ends at the first child whose reward reaches
            ``threshold``, and carries nothing over.
        threshold: a reward that is good enough; required by the rule "threshold".
        leftover: unspent tries go to the "next" level, or "spread" over all that remain.
        cap: maximum number of tries carried over to one level; -1 for no limit.
    """

    name: ClassVar[str] = "rbf"
    citation: ClassVar[str] = (
        "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing, arXiv 2503.19385"
    )

    younger: ClassVar[tuple[str, ...]] = (*PathSearchConfig.younger, "preset")
    published: ClassVar[dict[str, Any]] = {  # arXiv 2503.19385, section 5
        "path": "vp", "kernel": "em", "tail_steps": 0, "particles": 2, "initial": 25, "beam": 1, "chunk": 1,
    }  # fmt: skip

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
        self.require_at_least(particles=1, beam=1, begin=0, initial=0, chunk=1, cap=-1)
        if self.begin >= 1:
            raise DiffAccelError(f"RBF.begin is {self.begin}; it is a share of the levels and must be below 1.")
        if self.rule == "threshold" and self.threshold is None:
            raise DiffAccelError("RBF with rule='threshold' needs a threshold: the reward that is good enough.")
        if self.rule == "threshold":
            why = "the rule 'threshold' compares with the threshold alone and carries nothing over"
            self.refuse_without_effect("rule='rollover'", why, against="running_max", leftover="next", cap=-1)
        else:
            self.refuse_without_effect("rule='threshold'", "the rule 'rollover' has none", threshold=None)

    def chains(self, search: Search) -> list[Chain]:
        plan, n = search.plan, self.particles
        begin = min(int(max(self.begin, self.score_from) * plan.stages), plan.stages - 2)  # leaves one to search
        search.first = begin
        initial = self.initial or max(1, search.budget // (3 * n * (begin + 1)))
        overhead = initial * (begin + 1) + plan.tail_nfe  # predictions of a chain outside its searched levels
        transitions = plan.stages - 1 - begin
        self.check_budget(
            search, n * (overhead + transitions),
            f"{n} chains of {initial} noises at {begin + 1} of the levels, {transitions} levels with one try and "
            f"{plan.tail_nfe} steps of the tail",
        )  # fmt: skip
        quota = max(1, (search.budget - n * overhead) // (n * (transitions + 1)))
        tries = max(transitions, -(-(search.budget - n * plan.tail_nfe) // n) - 1 - initial * (begin + 1))
        beam = max(1, min(self.beam, quota // MIN_TRIES))
        search.used = {"initial": initial, "begin_level": begin, "beam": beam, "quota": quota, "tries": tries}
        return [rbf(search, chain, self, begin, initial, beam, quota, tries) for chain in range(n)]


def rbf(
    search: Search, chain: int, config: RBF, begin: int, initial: int, beam: int, base_quota: int, tries: int
) -> Chain:
    """Run one chain: ``x = x'_i``, ``i = min {i : r(x0'_i) > r*}``, or the argmax where no child passes.

    ``x'_i = alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z_i`` (arXiv 2503.19385, algorithm 1). There are
    ``base_quota`` children per level and what is carried over, and ``tries`` in all.
    """
    noises = yield [search.start(chain, i, score=begin == 0) for i in range(initial)]
    for stage in range(begin):
        noises = yield [search.walk(state, score=stage == begin - 1) for state in noises]
    states = search.ranked(noises, beam)
    best, last = states[0].reward, search.plan.stages - 2
    rule = RULES[config.rule](config, base_quota, last - begin + 1)
    for stage in range(begin, last + 1):
        if not search.scores(stage + 1):  # all states go on, with fresh noise
            count = min(len(states), tries - (last - stage))
            states = yield [search.propose(states[i], i, score=False) for i in range(count)]
            rule.close(stage - begin, rule.quota(stage - begin) - count)
            tries -= count
            continue
        # Every level leaves one try for each later one; the last level takes all that are left.
        quota = tries if stage == last else min(rule.quota(stage - begin), tries - (last - stage))
        stop, tried, accepted = quota, 0, False
        survivors: list[Particle] = []
        while tried < stop:
            count = min(config.chunk, quota - tried)
            children = yield [search.propose(states[i % len(states)], i) for i in range(tried, tried + count)]
            tries -= count
            passing = [tried + i for i, child in enumerate(children, 1) if rule.accepts(child.reward, best)]
            if passing and not accepted and (stage < last or config.rule == "threshold"):
                accepted, stop = True, max(passing[0], min(len(states), quota))  # one child of every state at least
            if config.commit == "first":
                children = children[: stop - tried]
            search.ledger.nfe_wasted += count - len(children)
            tried += len(children)
            survivors = search.ranked([*survivors, *children], beam)  # the latents of all others are freed
            best = max(best, *(child.reward for child in children))
        rule.close(stage - begin, quota - tried)
        states = survivors
        best = best if config.against == "running_max" else states[0].reward
        search.note(chain=chain, stage=stage, tried=tried, quota=quota, reward=states[0].reward, accepted=accepted)
    return (yield from search.finish(states[:1] if search.plan.tail_nfe else states[: search.keep + 1]))
