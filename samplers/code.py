"""Blockwise best of N: trajectories run independently for some levels, then all continue from the best one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import PathSearchConfig
from diffaccel.samplers.search.published import PublishedForm


@dataclass(frozen=True, kw_only=True)
class CoDe(PublishedForm, PathSearchConfig):
    """CoDe, blockwise control for denoising (Singh et al., arXiv 2502.00968).

    Each chain runs about ``K = (budget - tail) / (particles stages)`` trajectories in parallel, rounded up or down for
    each block so that the budget is spent, at least 2. At every ``block``-th level all of them continue from the one
    with the highest ``r(x0)``. Latents ``(B, C, H, W)``.

    As published (``paper()``) it is one chain from one first noise, which is not scored.

    Args:
        particles: chains per picture.
        one_noise: whether all trajectories of a chain begin at one noise; what others would have cost is spent later.
        block: levels between two selections; with 1 it is SVDD at temperature 0.
    """

    name: ClassVar[str] = "code"
    citation: ClassVar[str] = "CoDe: Blockwise Control for Denoising Diffusion Models, arXiv 2502.00968"

    younger: ClassVar[tuple[str, ...]] = (*PathSearchConfig.younger, "preset", "one_noise")
    published: ClassVar[dict[str, Any]] = {"particles": 1, "one_noise": True}

    particles: int = 4
    one_noise: bool = False
    block: int = 2

    def validate(self) -> None:
        super().validate()
        self.require_at_least(particles=1, block=1)

    def chains(self, search: Search) -> list[Chain]:
        plan, n, one = search.plan, self.particles, int(self.one_noise)
        tries = self.tries(search, n, one_noise=self.one_noise)
        levels = [min(self.block, plan.stages - begin) for begin in range(0, plan.stages, self.block)]
        levels[0] -= one
        counts = [blocks(sum(tries[chain]) - one, levels) for chain in range(n)]
        search.used = {"trajectories": counts}
        return [code(search, chain, counts[chain], self) for chain in range(n)]


def blocks(total: int, levels: list[int]) -> list[int]:
    """Return how many trajectories each block has, of so many levels: of a chain's ``total`` predictions, evenly."""
    each, rest = divmod(total, sum(levels))
    counts, upto, spent = [], 0, 0
    for size in levels:
        if size == 0:  # the one noise alone
            counts.append(1)
            continue
        upto += size
        more = upto * rest // sum(levels) - spent >= size
        counts.append(each + more)
        spent += more * size
    return counts


def code(search: Search, chain: int, trajectories: list[int], config: CoDe) -> Chain:
    """Run one chain: ``x_j' = K(x_j, z_j)``, and ``x_j = argmax_i r(x0_i)`` after every block (arXiv 2502.00968).

    ``K`` is the plan's kernel, such as ``alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z``. The last level always
    ends a block. Of each block there are so many ``trajectories``.
    """
    last, block = search.plan.stages - 1, config.block

    def selects(stage: int) -> bool:
        if stage == 0 and config.one_noise:
            return False
        return stage == last or ((stage + 1) % block == 0 and search.scores(stage))

    states = yield [search.start(chain, i, score=selects(0)) for i in range(1 if config.one_noise else trajectories[0])]
    if config.one_noise:
        states = states * trajectories[1 // block]
    for stage in range(last + 1):
        if selects(stage):
            best = max(states, key=lambda p: p.reward)
            search.note(chain=chain, stage=stage, tried=len(states), reward=best.reward)
            states = [best] * trajectories[min(stage // block + 1, len(trajectories) - 1)]
        if stage < last:
            states = yield [search.propose(state, i, score=selects(stage + 1)) for i, state in enumerate(states)]
    return (yield from search.finish(states[:1]))
