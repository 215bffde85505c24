"""Heun's method: an Euler step corrected by the velocity at its end."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from diffaccel.config import SamplerConfig
from diffaccel.session import Eval, Sampling, Session, Step


@dataclass(frozen=True, kw_only=True)
class Heun(SamplerConfig):
    """``x' = x + (sigma' - sigma) (v + v(x_euler, sigma')) / 2``, second order, two predictions per step.

    The last step, to ``sigma' = 0``, is plain Euler, since no network is trained at zero noise
    (Karras et al., arXiv 2206.00364, algorithm 1). Latents ``(B, C, H, W)``.
    """

    name: ClassVar[str] = "heun"
    citation: ClassVar[str] = "Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364"
    evals_per_step: ClassVar[int] = 2

    def sample(self, session: Session) -> Sampling:
        return heun(session)


def heun(session: Session) -> Sampling:
    """Sample by ``x' = x + h (v + v(x + h v, sigma')) / 2`` with ``h = sigma' - sigma``.

    The last step, to ``sigma' = 0``, is ``x' = x + h v`` (arXiv 2206.00364, algorithm 1).
    """
    x = session.x
    for sigma, sigma_next in pairwise(session.sigmas):
        dt = sigma_next - sigma
        v = (yield Eval(x, sigma)).v
        if sigma_next > 0:
            v_next = (yield Eval(x + dt * v, sigma_next)).v
            v = (v + v_next) / 2
        x = yield Step(x + dt * v, sigma_next)
    return x
