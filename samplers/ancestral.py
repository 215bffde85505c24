"""Ancestral sampling in its coefficient-preserving form: every step replaces part of the noise by fresh noise."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.flow import Path
from diffaccel.session import Eval, Pred, Sampling, Session, Step


@dataclass(frozen=True, kw_only=True)
class Ancestral(SamplerConfig):
    """``x' = alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z``, with ``z ~ N(0, I)`` from the caller's generator.

    ``gamma = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)``: ``eta = 0`` is DDIM (Euler on the linear path),
    ``eta = 1`` the ancestral sampler of DDPM (Song et al., arXiv 2010.02502, eq. 16; the coefficient-preserving form of
    stochastic flow sampling: Flow-CPS, arXiv 2509.05952). Row i depends on its own generator alone. Latents
    ``(B, C, H, W)``.

    Args:
        eta: share of the ancestral noise, in [0, 1].
    """

    name: ClassVar[str] = "ancestral"
    citation: ClassVar[str] = "Denoising Diffusion Implicit Models, arXiv 2010.02502; Flow-CPS, arXiv 2509.05952"

    eta: float = 1.0

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.eta <= 1:
            raise DiffAccelError(f"Ancestral.eta is {self.eta}; it must lie in [0, 1]: 0 draws no noise, 1 is DDPM.")

    def sample(self, session: Session) -> Sampling:
        return ancestral(session, self.eta)


def ancestral(session: Session, eta: float) -> Sampling:
    """Sample by ``x' = alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z``, with ``z ~ N(0, I)``.

    ``gamma = eta sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)`` (arXiv 2010.02502, eq. 12 and 16). The step to
    ``sigma' = 0`` draws no noise.
    """
    x, path = session.x, session.path
    for sigma, sigma_next in pairwise(session.sigmas):
        pred = yield Eval(x, sigma)
        gamma = eta * ancestral_std(path, sigma, sigma_next)
        noise = session.randn_like(x) if eta > 0 and sigma_next > 0 else torch.zeros_like(x)
        x = yield Step(cps(path, pred, sigma_next, gamma, noise), sigma_next)
    return x


def ancestral_std(path: Path, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Return the fresh noise of DDPM's posterior, ``sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)``.

    It is the standard deviation of arXiv 2010.02502, eq. 16, at ``eta = 1``.
    """
    ratio = (path.alpha(sigma) * sigma_next) / (path.alpha(sigma_next) * sigma)
    return sigma_next * torch.sqrt((1 - ratio**2).clamp(min=0))


def cps(path: Path, pred: Pred, sigma_next: Tensor, gamma: Tensor, noise: Tensor) -> Tensor:
    """Return ``alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z``, the coefficient-preserving kernel.

    See Flow-CPS, arXiv 2509.05952.

    Args:
        gamma: standard deviation of the fresh noise, ``0 <= gamma <= sigma_next``.
        noise: ``z``, of the shape of the latents.

    Raises:
        DiffAccelError: for a gamma above ``sigma_next``: the variance left for ``eps`` would be negative.
    """
    if bool((gamma > sigma_next * (1 + 1e-6)).any()):
        raise DiffAccelError(
            f"The fresh noise gamma = {gamma} exceeds the next noise level {sigma_next}. Use 0 <= gamma <= sigma'."
        )
    eps_scale = torch.sqrt((sigma_next**2 - gamma**2).clamp(min=0))
    return path.alpha(sigma_next) * pred.x0 + eps_scale * pred.eps + gamma * noise
