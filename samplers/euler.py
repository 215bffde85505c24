"""Euler's method on the flow ordinary differential equation: the baseline of every flow model."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from diffaccel.config import SamplerConfig
from diffaccel.session import Eval, Sampling, Session, Step


@dataclass(frozen=True, kw_only=True)
class Euler(SamplerConfig):
    """``x' = x + (sigma' - sigma) v``, first order, one prediction per step.

    On the linear path this is the stock step of flow models, on the VE path that of ``EulerDiscreteScheduler``
    (Karras et al., arXiv 2206.00364, algorithm 1 without correction), and on a VP model it equals DDIM
    (arXiv 2010.02502). Latents are ``(B, C, H, W)``; ``sigma`` is the noise level in [0, 1] (linear) or [0, inf) (VE).
    """

    name: ClassVar[str] = "euler"
    citation: ClassVar[str] = "Elucidating the Design Space of Diffusion-Based Generative Models, arXiv 2206.00364"

    def sample(self, session: Session) -> Sampling:
        return euler(session)


def euler(session: Session) -> Sampling:
    """Sample by ``x' = x + (sigma' - sigma) v(x, sigma)`` (arXiv 2206.00364, algorithm 1 without correction)."""
    x = session.x
    for sigma, sigma_next in pairwise(session.sigmas):
        pred = yield Eval(x, sigma)
        x = yield Step(pred.x + (sigma_next - sigma) * pred.v, sigma_next)
    return x
