"""DPM-Solver++(2M): a multistep solver, second order with one prediction per step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch

from diffaccel.config import SamplerConfig
from diffaccel.session import Eval, Sampling, Session, Step


@dataclass(frozen=True, kw_only=True)
class DPMpp2M(SamplerConfig):
    """``x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D`` with ``D = x0 + (x0 - x0_last) / (2 r)``,
    ``r = h_last / h``, ``h = lambda' - lambda`` and ``lambda = log(alpha/sigma)``.

    Second order; the first step and the step to zero noise use ``D = x0`` (Lu et al., arXiv 2211.01095, algorithm 2).
    The coefficient of ``D`` is ``-alpha' (exp(-h) - 1)``, written so that it stays finite at pure noise. Latents
    ``(B, C, H, W)``.
    """

    name: ClassVar[str] = "dpmpp2m"
    citation: ClassVar[str] = "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models, arXiv 2211.01095"

    def sample(self, session: Session) -> Sampling:
        return dpmpp2m(session)


def dpmpp2m(session: Session) -> Sampling:
    """Sample by ``x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) D`` (arXiv 2211.01095, algorithm 2).

    ``D = x0 + (x0 - x0_last) h / (2 h_last)``, or ``x0`` where ``h = lambda' - lambda`` is infinite or the first one.
    """
    x, path = session.x, session.path
    last_x0 = last_h = None
    for sigma, sigma_next in pairwise(session.sigmas):
        x0 = (yield Eval(x, sigma)).x0
        h = path.rho(sigma_next) - path.rho(sigma)  # infinite at either end of the path
        d = x0
        if last_x0 is not None and last_h is not None and torch.isfinite(h) and torch.isfinite(last_h):
            d = x0 + (x0 - last_x0) * (h / (2 * last_h))
        ratio = sigma_next / sigma
        x = yield Step(ratio * x + (path.alpha(sigma_next) - path.alpha(sigma) * ratio) * d, sigma_next)
        last_x0, last_h = x0, h
    return x
