"""Blockwise best of N: trajectories run independently for some levels, then all continue from the best one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import PathSearchConfig


@dataclass(frozen=True, kw_only=True)
class CoDe(PathSearchConfig):
    """CoDe, blockwise control for denoising (Singh et al., arXiv 2502.00968).

    Each chain runs ``K = floor((budget - tail) / (particles stages))`` trajectories in parallel, and at every
    ``block``-th level all of them continue from the one with the highest ``r(x0)``. Latents ``(B, C, H, W)``.

    Args:
        particles: chains per picture.
        block: levels between two selections; with 1 it is SVDD at temperature 0.
    """

    name: ClassVar[str] = "code"
    paper: ClassVar[str] = "CoDe: Blockwise Control for Denoising Diffusion Models, arXiv 2502.00968"

    particles: int = 4
    block: int = 2

    def validate(self) -> None:
        super().validate()
        self.require_at_least(particles=1, block=1)

    def chains(self, search: Search) -> list[Chain]:
        trajectories = self.tries_per_level(search, self.particles)
        return [code(search, chain, trajectories, self.block) for chain in range(self.particles)]


def code(search: Search, chain: int, trajectories: int, block: int) -> Chain:
    """Run one chain: ``x_j' = K(x_j, z_j)``, and ``x_j = argmax_i r(x0_i)`` after every block (arXiv 2502.00968).

    ``K`` is the plan's kernel, such as ``alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z``. The last level always
    ends a block.
    """
    last = search.plan.stages - 1

    def selects(stage: int) -> bool:
        return stage == last or (stage + 1) % block == 0

    states = yield [search.start(chain, i, score=selects(0)) for i in range(trajectories)]
    for stage in range(last + 1):
        if selects(stage):
            best = max(states, key=lambda p: p.reward)
            search.note(chain=chain, stage=stage, tried=trajectories, reward=best.reward)
            states = [best] * trajectories
        if stage < last:
            states = yield [search.propose(state, i, score=selects(stage + 1)) for i, state in enumerate(states)]
    return (yield from search.finish(states[:1]))
