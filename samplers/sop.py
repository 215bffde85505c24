"""Search over paths: add noise to a sample and denoise it again several times, keeping the best candidate each time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.budget import shares
from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import SearchConfig
from diffaccel.samplers.search.particles import Key
from diffaccel.samplers.search.plan import at_level, descend


@dataclass(frozen=True, kw_only=True)
class SoP(SearchConfig):
    """Search over paths (Ma et al., arXiv 2501.09732, section 3.2).

    Each chain denoises K noises to the level ``seed_level`` by ``walk`` deterministic steps and keeps the best by
    ``r(x0)``. Then, until the level is 0, it adds noise up by ``forward`` (the path's exact forward kernel) K times,
    denoises each by ``backward`` and keeps the best. Levels are those of the linear path, 1 is noise. It costs
    ``walk K particles (ceil(seed_level / (backward - forward)) + 1)`` predictions, from which K follows, at least 2;
    what does not divide is spread over the rounds.

    Args:
        particles: chains per picture.
        walk: deterministic steps of one denoising.
        seed_level: level at which the first denoising ends.
        forward, backward: distance in level by which noise is added, and removed.
    """

    name: ClassVar[str] = "sop"
    citation: ClassVar[str] = (
        "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, arXiv 2501.09732"
    )

    particles: int = 2
    walk: int = 4
    seed_level: float = 0.12
    forward: float = 0.78
    backward: float = 0.81

    def validate(self) -> None:
        super().validate()
        self.require_at_least(particles=1, walk=1)
        if not 0 < self.seed_level < 1 or not 0 < self.forward < self.backward or self.seed_level + self.forward > 1:
            raise DiffAccelError(
                f"SoP goes up by forward < backward from seed_level in (0, 1) to at most 1; got {self.forward}, "
                f"{self.backward} and {self.seed_level}."
            )

    @property
    def rounds(self) -> int:
        """Rounds of noising and denoising after the first denoising."""
        return math.ceil(round(self.seed_level / (self.backward - self.forward), 6))

    def chains(self, search: Search) -> list[Chain]:
        nfe = self.walk * self.particles * (self.rounds + 1)  # of one candidate in every chain and round
        if search.budget < 2 * nfe:
            raise DiffAccelError(
                f"SoP: a budget of {search.budget} NFE is too small for {self.particles} chains of {self.rounds + 1} "
                f"rounds, each with 2 ways of {self.walk} steps to choose from. Give at least {2 * nfe}."
            )
        ways = shares(search.budget // self.walk, self.particles, self.rounds + 1)
        search.used = {"ways": ways}
        return [sop(search, chain, counts, self) for chain, counts in enumerate(ways)]


def sop(search: Search, chain: int, counts: list[int], config: SoP) -> Chain:
    """Run one chain with so many candidates in each round (arXiv 2501.09732, section 3.2).

    Noise: ``x' = (alpha'/alpha) x + sqrt(sigma'^2 - (alpha'/alpha)^2 sigma^2) z``; then ``walk`` steps of
    ``x' = x + (sigma' - sigma) v``, and ``x = argmax_i r(x0_i)``.
    """
    path, top, level, walk = search.plan.path, search.plan.sigmas[0], config.seed_level, config.walk
    states = yield [search.start(chain, i, score=walk == 1) for i in range(counts[0])]
    for number in range(config.rounds + 1):
        if number > 0:
            noised = min(at_level(path, level + config.forward), top)
            level = level - (config.backward - config.forward) if number < config.rounds else 0.0
            keys = [Key(chain, number * (walk + 1), i) for i in range(counts[number])]
            states = yield [search.renoise(states[0], noised, key, score=walk == 1) for key in keys]
        *between, bottom = descend(path, states[0].sigma, level, walk)
        for i, sigma in enumerate(between, 2):
            states = yield [search.step(state, sigma, score=i == walk) for state in states]
        best = max(states, key=lambda p: p.reward)
        search.note(chain=chain, way=number, tried=counts[number], reward=best.reward)
        if number < config.rounds:
            states = yield [search.step(best, bottom, predict=False)]
    samples = yield [search.end(state) for state in states]
    return search.ranked(samples)
