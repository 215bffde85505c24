"""Sequential Monte Carlo: particles are weighted by their rewards, and resampled when few of them carry the weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import PathSearchConfig
from diffaccel.samplers.search.particles import Particle
from diffaccel.samplers.search.published import PublishedForm
from diffaccel.samplers.search.resampling import effective_size, softmax, systematic, uniform

# Accumulated log weight of a particle with the rewards r_0 ... r_k, times the temperature. At the end it is r(x0) for
# every potential, so that the particles follow p(x0) exp(r(x0) / temperature).
POTENTIALS: dict[str, Callable[[list[float]], float]] = {
    "difference": lambda rewards: rewards[-1],
    "max": lambda rewards: sum(max(rewards[: k + 1]) for k in range(len(rewards))),
    "sum": lambda rewards: sum(sum(rewards[: k + 1]) for k in range(len(rewards))),
    "last": lambda rewards: 0.0,
}

INTERVAL = 0.2  # share of the levels between two resamplings, as published


@dataclass(frozen=True, kw_only=True)
class SMC(PublishedForm, PathSearchConfig):
    """Feynman-Kac steering (Singhal et al., arXiv 2501.06848; Wu et al., arXiv 2306.17775).

    ``N = floor(budget / (stages + tail))`` particles follow the path's kernel. At every level the potential is added to
    their log weights. When the effective sample size ``1 / sum w^2`` falls below ``resample N``, all particles are
    resampled systematically and their weights become equal. The target is ``p(x0) exp(r(x0) / temperature)``; the
    result is the particle with the highest reward. Latents ``(B, C, H, W)``.

    ``guide`` twists the proposals (arXiv 2306.17775): the mean of a kernel with noise ``c`` moves by
    ``guide c^2 alpha' / (alpha'^2 + sigma'^2) grad r(x0) / temperature``, which is about the best for 1, and
    the weights are multiplied by ``p(x' | x) / q(x' | x)``, a ratio of Gaussians of one covariance, so that the target
    stays the same. Steps without noise, as those of the tail, are not guided.

    ``score_from``, ``score_to`` and ``score_every`` are the published range and interval: elsewhere nothing is weighed
    or resampled. As published (``paper()``) they are 0.2, 0.8 and a fifth of the levels, with the potential "max",
    a resampling at every one of these, and the temperature 0.1, which is for rewards with a standard deviation of about
    1.

    Args:
        temperature: of the target, in units of the reward. A good start is the size of a difference that matters,
            about the standard deviation of the rewards.
        potential: log weight that a level adds. "difference": ``(r_k - r_{k-1}) / temperature``; "max" and "sum": of
            all rewards so far; "last": zero at every level but the end.
        resample: resample when the effective sample size falls below this share of the particles; 1: at every level,
            0: never.
    """

    name: ClassVar[str] = "smc"
    citation: ClassVar[str] = (
        "A General Framework for Inference-time Scaling and Steering of Diffusion Models, arXiv 2501.06848"
    )

    younger: ClassVar[tuple[str, ...]] = (*PathSearchConfig.younger, "preset")
    published: ClassVar[dict[str, Any]] = {  # arXiv 2501.06848, section 4: steps 20, 40, 60 and 80 of 100
        "temperature": 0.1, "potential": "max", "resample": 1.0, "score_from": 0.2, "score_to": 0.8,
    }  # fmt: skip

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

    @property
    def target_temperature(self) -> float:
        return self.temperature

    def chains(self, search: Search) -> list[Chain]:
        nfe = search.plan.stages + search.plan.tail_nfe  # of one particle
        self.check_budget(
            search, 2 * nfe, f"2 particles of {search.plan.stages} levels and {search.plan.tail_nfe} steps"
        )
        if self.preset == "paper" and self.score_every == 1:
            search.every = max(1, round(INTERVAL * search.plan.stages))
        search.used = {"particles": search.budget // nfe}
        return [smc(search, search.budget // nfe, self)]


def smc(search: Search, count: int, config: SMC) -> Chain:
    """Run ``count`` particles with weights ``w_k ~ exp((G(r_0 ... r_k) - G(r_0 ... r_m)) / temperature) p / q``.

    ``G`` is the accumulated potential, ``m`` the level of the last resampling, and ``p / q`` the product of the ratios
    of the plain and the guided kernel since then, 1 without guidance. Where ``1 / sum w^2 < resample
    count`` the particles are resampled by ``w``; then each moves by the plan's kernel, such as ``x' = alpha' x0 +
    sqrt(sigma'^2 - gamma^2) eps + gamma z`` (arXiv 2501.06848, algorithm 1).
    """
    potential = POTENTIALS[config.potential]
    states = yield [search.start(i, score=search.scores(0)) for i in range(count)]
    histories: list[list[float]] = [[] for _ in states]
    resampled = [0.0] * count  # each particle's potential at the last resampling
    log_ratios = [0.0] * count  # since then
    for stage in range(search.plan.stages):
        log_ratios = [before + p.log_ratio for before, p in zip(log_ratios, states, strict=True)]
        if not search.scores(stage):
            states = yield [search.propose(p, 0, chain=i, score=search.scores(stage + 1)) for i, p in enumerate(states)]
            continue
        histories = [[*rewards, p.reward] for rewards, p in zip(histories, states, strict=True)]
        potentials = [potential(rewards) for rewards in histories]
        weights = _weights(potentials, resampled, config.temperature, log_ratios)
        size = effective_size(weights)
        search.note(stage=stage, effective=size, reward=max(p.reward for p in states))
        if size < config.resample * count or config.resample == 1:
            ancestors = systematic(weights, uniform(search.seed, 0, stage))
            states, histories = [states[i] for i in ancestors], [histories[i] for i in ancestors]
            resampled, log_ratios = [potentials[i] for i in ancestors], [0.0] * count
        if stage < search.plan.stages - 1:
            states = yield [search.propose(p, 0, chain=i, score=search.scores(stage + 1)) for i, p in enumerate(states)]
    samples = yield from _finish_once(search, states)
    rewards = [p.reward for p in samples]
    weights = _weights(rewards, resampled, config.temperature, log_ratios)
    search.note(samples=rewards, weights=weights)
    search.log_weights = beside_rewards(samples, weights, config.temperature)
    return search.ranked(samples)


def _weights(
    potentials: list[float], resampled: list[float], temperature: float, log_ratios: list[float]
) -> list[float]:
    """Return ``exp((potential - resampled) / temperature + log_ratio)``, normalised.

    A ``resampled`` that is not finite is 0.
    """
    differences = [p - (r if math.isfinite(r) else 0.0) for p, r in zip(potentials, resampled, strict=True)]
    return softmax([d / temperature + log_ratio for d, log_ratio in zip(differences, log_ratios, strict=True)])


def beside_rewards(samples: list[Particle], weights: list[float], temperature: float) -> dict[int, float]:
    """Return ``log w - r / temperature`` of every sample, ``w`` the sum over its repeats.

    With it a draw by ``exp(r / t)`` follows ``p(x0) exp(r(x0) / t)`` for any ``t``.
    """
    total: dict[int, float] = {}
    reward_of = {p.number: p.reward for p in samples}
    for particle, weight in zip(samples, weights, strict=True):
        total[particle.number] = total.get(particle.number, 0.0) + weight
    return {
        number: (math.log(weight) if weight > 0 else -math.inf) - max(reward_of[number], -1e300) / temperature
        for number, weight in total.items()
    }


def _finish_once(search: Search, states: list[Particle]) -> Chain:
    """Walk the tail of every distinct state once, and return the sample of each of ``states``, repeats included."""
    distinct = list(dict.fromkeys(states))
    samples = yield from search.finish(distinct)
    sample_of = dict(zip(distinct, samples, strict=True))
    return [sample_of[state] for state in states]
