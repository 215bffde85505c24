"""Soft value-based decoding: at every level several children, of which one by its value goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import PathSearchConfig
from diffaccel.samplers.search.resampling import draw


@dataclass(frozen=True, kw_only=True)
class SVDD(PathSearchConfig):
    """Soft value-based decoding in diffusion models (Li et al., arXiv 2408.08252), with ``r(x0)`` as the value.

    At every level each chain tries ``K = floor((budget - tail) / (particles stages))`` children and goes on with
    ``argmax r(x0')``, or with one drawn from ``softmax(r / temperature)``. Latents ``(B, C, H, W)``.

    Args:
        particles: chains of a picture.
        temperature: of the draw; 0 takes the best.
    """

    name: ClassVar[str] = "svdd"
    paper: ClassVar[str] = (
        "Derivative-Free Guidance in Continuous and Discrete Diffusion Models with Soft Value-Based Decoding, "
        "arXiv 2408.08252"
    )

    particles: int = 4
    temperature: float = 0.0

    def validate(self) -> None:
        super().validate()
        self.at_least(particles=1, temperature=0)

    def chains(self, search: Search) -> list[Chain]:
        children = self.each(search, self.particles)
        return [svdd(search, chain, children, self.temperature) for chain in range(self.particles)]


def svdd(search: Search, chain: int, children: int, temperature: float) -> Chain:
    """One chain (arXiv 2408.08252, algorithm 1)."""
    found = yield [search.start(chain, i) for i in range(children)]
    for stage in range(search.plan.stages):
        state = found[draw([p.reward for p in found], temperature, search.seed, chain, stage)]
        search.note(chain=chain, stage=stage, tried=children, reward=state.reward)
        if stage < search.plan.stages - 1:
            found = yield [search.propose(state, i) for i in range(children)]
    return (yield from search.finish([state]))
