"""Sequential Monte Carlo: particles are weighted by what they promise, and resampled when few of them matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import PathSearchConfig
from diffaccel.samplers.search.particles import Particle
from diffaccel.samplers.search.resampling import effective_size, softmax, systematic, uniform

# What a particle's weights have come to when r_0 ... r_k were seen, in units of 1/temperature; at the end all of them
# come to r(x0), so that the particles follow p(x0) exp(r(x0) / temperature).
POTENTIALS: dict[str, Callable[[list[float]], float]] = {
    "difference": lambda seen: seen[-1],
    "max": lambda seen: sum(max(seen[: k + 1]) for k in range(len(seen))),
    "sum": lambda seen: sum(sum(seen[: k + 1]) for k in range(len(seen))),
    "last": lambda seen: 0.0,
}


@dataclass(frozen=True, kw_only=True)
class SMC(PathSearchConfig):
    """Feynman-Kac steering (Singhal et al., arXiv 2501.06848; Wu et al., arXiv 2306.17775).

    ``N = floor(budget / (stages + tail))`` particles follow the path's kernel. At every level their log weights grow by
    that of the potential, and when the effective number ``1 / sum w^2`` falls below ``resample N`` all are drawn anew,
    systematically, and their weights are equal again. The target is ``p(x0) exp(r(x0) / temperature)``; the result is
    its particle with the highest reward. Latents ``(B, C, H, W)``.

    Args:
        temperature: of the target, in units of the reward: the size of a difference that matters, so about the standard
            deviation of rewards is a start.
        potential: "difference": ``(r_k - r_{k-1}) / temperature``; "max" and "sum": of all rewards so far; "last":
            weights at the end alone.
        resample: share of particles below which the effective number makes them be drawn anew; 1 at every level, 0
            never.
    """

    name: ClassVar[str] = "smc"
    paper: ClassVar[str] = (
        "A General Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv 2501.06848"
    )

    temperature: float = 1.0
    potential: Literal["difference", "max", "sum", "last"] = "difference"
    resample: float = 0.5

    def validate(self) -> None:
        super().validate()
        if self.temperature <= 0:
            raise DiffAccelError(
                f"SMC.temperature is {self.temperature}; it must be positive: the size of a difference of rewards that "
                "matters."
            )
        if not 0 <= self.resample <= 1:
            raise DiffAccelError(f"SMC.resample is {self.resample}; it must lie in [0, 1].")

    def chains(self, search: Search) -> list[Chain]:
        each = search.plan.stages + search.plan.tail_nfe
        self.check(search, 2 * each, f"2 particles of {search.plan.stages} levels and {search.plan.tail_nfe} steps")
        return [smc(search, search.budget // each, self)]


def smc(search: Search, count: int, config: SMC) -> Chain:
    """All particles of a prompt (arXiv 2501.06848, algorithm 1)."""
    potential = POTENTIALS[config.potential]
    states = yield [search.start(i) for i in range(count)]
    seen: list[list[float]] = [[] for _ in states]
    since = [0.0] * count  # the potential when the particles were last drawn anew
    for stage in range(search.plan.stages):
        seen = [[*rewards, p.reward] for rewards, p in zip(seen, states, strict=True)]
        now = [potential(rewards) for rewards in seen]
        weights = _weights(now, since, config.temperature)
        size = effective_size(weights)
        search.note(stage=stage, effective=size, reward=max(p.reward for p in states))
        if size < config.resample * count or config.resample == 1:
            chosen = systematic(weights, uniform(search.seed, 0, stage))
            states, seen, since = [states[i] for i in chosen], [seen[i] for i in chosen], [now[i] for i in chosen]
        if stage < search.plan.stages - 1:
            states = yield [search.propose(state, 0, chain=i) for i, state in enumerate(states)]
    samples = yield from _to_the_end(search, states)
    rewards = [p.reward for p in samples]
    search.note(samples=rewards, weights=_weights(rewards, since, config.temperature))
    return search.ranked(samples)


def _weights(now: list[float], since: list[float], temperature: float) -> list[float]:
    """``exp((now - since) / temperature)``, normalised; where nothing was finite before, all of it is new."""
    return softmax([(n - (b if math.isfinite(b) else 0.0)) / temperature for n, b in zip(now, since, strict=True)])


def _to_the_end(search: Search, states: list[Particle]) -> Chain:
    """The tail of every particle; those drawn twice go on together and come out as often."""
    once = list(dict.fromkeys(states))
    samples = yield from search.finish(once)
    of = dict(zip(once, samples, strict=True))
    return [of[state] for state in states]
