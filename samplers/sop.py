"""Search over paths: add noise to a sample and denoise it again several times, keeping the best candidate each time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.budget import shares
from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.particles import Key
from diffaccel.samplers.search.plan import at_level, descend
from diffaccel.samplers.search.published import PublishedForm


@dataclass(frozen=True, kw_only=True)
class SoP(PublishedForm):
    """Search over paths (Ma et al., arXiv 2501.09732, section 3.2).

    Each chain denoises K noises to the level ``seed_level`` by ``walk`` deterministic steps and keeps the best by
    ``r(x0)``. Then, until the level is 0, it adds noise up by ``forward`` (the path's exact forward kernel) K times,
    denoises each by ``backward`` and keeps the best. Levels are those of the linear path, 1 is noise. It costs
    ``walk K particles (ceil(seed_level / (backward - forward)) + 1)`` predictions, from which K follows, at least 2;
    what does not divide is spread over the rounds.

    As published (``paper()``, ``top="all"``) there are ``particles`` first noises, and of all ways back of a round
    the best ``particles`` go on, whatever they come from.

    Args:
        particles: chains per picture, each of which keeps one sample; with ``top="all"`` the samples that are kept.
        top: a "chain" keeps its own best, or the best of "all" are kept.
        walk: deterministic steps of one denoising.
        seed_level: level at which the first denoising ends.
        forward, backward: distance in level by which noise is added, and removed.
    """

    name: ClassVar[str] = "sop"
    citation: ClassVar[str] = (
        "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, arXiv 2501.09732"
    )

    younger: ClassVar[tuple[str, ...]] = (*PublishedForm.younger, "preset", "top")
    published: ClassVar[dict[str, Any]] = {"top": "all"}

    particles: int = 2
    top: Literal["chain", "all"] = "chain"
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
        n, together = self.particles, self.top == "all"
        least = self.walk * n * (2 * (self.rounds + 1) - together)  # two candidates in every chain and round
        if search.budget < least:
            raise DiffAccelError(
                f"SoP: a budget of {search.budget} NFE is too small for {n} chains of {self.rounds + 1} "
                f"rounds, each with 2 ways of {self.walk} steps to choose from. Give at least {least}."
            )
        total = search.budget // self.walk
        if together:
            ways = [[n, *shares(total - n, 1, self.rounds)[0]]]
        else:
            ways = shares(total, n, self.rounds + 1)
        search.used = {"ways": ways}
        return [sop(search, chain, counts, self, n if together else 1) for chain, counts in enumerate(ways)]


def sop(search: Search, chain: int, counts: list[int], config: SoP, kept: int) -> Chain:
    """Run one chain with so many candidates in each round, the best ``kept`` of them (arXiv 2501.09732, section 3.2).

    Noise: ``x' = (alpha'/alpha) x + sqrt(sigma'^2 - (alpha'/alpha)^2 sigma^2) z``; then ``walk`` steps of
    ``x' = x + (sigma' - sigma) v``, and ``x = argmax_i r(x0_i)``. Candidates take the kept samples in turns.
    """
    path, top, level, walk = search.plan.path, search.plan.sigmas[0], config.seed_level, config.walk
    chosen = counts[0] > kept  # whether there is something to choose from, and so to score
    states = yield [search.start(chain, i, score=walk == 1 and chosen) for i in range(counts[0])]
    for number in range(config.rounds + 1):
        if number > 0:
            noised = min(at_level(path, level + config.forward), top)
            level = level - (config.backward - config.forward) if number < config.rounds else 0.0
            keys = [Key(chain, number * (walk + 1), i) for i in range(counts[number])]
            chosen, parents = True, states
            states = yield [
                search.renoise(parents[i % len(parents)], noised, key, score=walk == 1) for i, key in enumerate(keys)
            ]
        *between, bottom = descend(path, states[0].sigma, level, walk)
        for i, sigma in enumerate(between, 2):
            states = yield [search.step(state, sigma, score=i == walk and chosen) for state in states]
        if chosen:
            best = search.ranked(states, kept)
            search.note(chain=chain, way=number, tried=counts[number], reward=best[0].reward)
        if number < config.rounds:
            states = yield [search.step(state, bottom, predict=False) for state in (best if chosen else states)]
    samples = yield [search.end(state) for state in states]
    return search.ranked(samples)
