"""Best of N: independent samples, and the one with the highest reward."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.chains import Chain, Search
from diffaccel.samplers.search.config import SearchConfig
from diffaccel.samplers.search.particles import Particle

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BoN(SearchConfig):
    """Best of N: ``argmax_i r(x_i)`` over ``N = floor(budget / steps)`` samples of the call's own deterministic steps.

    The baseline of every search (random search in arXiv 2501.09732). The first sample is the one that the call gives
    without a search, so without ``guide`` the result is never worse by the reward. Latents ``(B, C, H, W)``.

    Args:
        wave: samples of one picture that are drawn in parallel; it bounds memory and changes nothing else.
    """

    name: ClassVar[str] = "bon"
    citation: ClassVar[str] = (
        "Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps, arXiv 2501.09732"
    )

    keeps_rows: ClassVar[bool] = True  # every sample is followed by itself, from noise to its end

    wave: int = 16

    def validate(self) -> None:
        super().validate()
        self.require_at_least(wave=1)

    def chains(self, search: Search) -> list[Chain]:
        steps = search.plan.stages
        if search.budget < steps:
            raise DiffAccelError(
                f"BoN: a budget of {search.budget} NFE is less than one sample of {steps} steps. Raise budget."
            )
        count = search.budget // steps
        search.used = {"samples": count}
        if count == 1 and search.row == 0:
            logger.warning(
                "BoN: a budget of %d NFE is one sample of %d steps, so there is nothing to choose from. Give at least "
                "%d.", search.budget, steps, 2 * steps,
            )  # fmt: skip
        return [bon(search, count, self.wave)]


def bon(search: Search, count: int, wave: int) -> Chain:
    """Draw ``x_1 ... x_count``, ``wave`` at a time, and return ``argmax_i r(x_i)`` first (arXiv 2501.09732).

    Every sample follows ``x' = x + (sigma' - sigma) v`` from its own noise.
    """
    best: list[Particle] = []
    for begin in range(0, count, wave):
        states = yield [search.start(i, score=False) for i in range(begin, min(begin + wave, count))]
        for _ in range(search.plan.stages - 1):
            states = yield [search.walk(state) for state in states]
        best += yield from search.finish(states)
        search.note(samples=begin + len(states))
        best = search.ranked(best)
    return best
