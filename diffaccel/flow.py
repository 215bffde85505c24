"""Noise paths and prediction types, and conversions between them.

A noise path mixes a clean sample with noise, ``x_t = alpha(t) x0 + sigma(t) eps``, with ``t`` growing towards noise.
Its velocity is ``v = dx_t/dt = alpha'(t) x0 + sigma'(t) eps`` and its score ``-eps / sigma(t)``. Given ``x_t`` and any
one of eps, x0, v, the variance-preserving v-prediction or the score, all others follow; two paths at equal
signal-to-noise ratio differ by a scale only (Karras et al., arXiv 2206.00364; Lipman et al., arXiv 2210.02747).

All functions take floats or tensors that broadcast against ``x``, and keep their dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Scalar = float | Tensor
Prediction = Literal["epsilon", "sample", "v_prediction", "velocity", "score"]


def _tensor(t: Scalar) -> Tensor:
    return t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")


class Path:
    """``x_t = alpha(t) x0 + sigma(t) eps``; subclasses give the two coefficients and their derivatives."""

    def alpha(self, t: Scalar) -> Scalar:
        """Return the weight of the clean sample at ``t``."""
        raise NotImplementedError

    def sigma(self, t: Scalar) -> Scalar:
        """Return the standard deviation of the noise at ``t``."""
        raise NotImplementedError

    def d_alpha(self, t: Scalar) -> Scalar:
        """Return ``d alpha / dt``."""
        raise NotImplementedError

    def d_sigma(self, t: Scalar) -> Scalar:
        """Return ``d sigma / dt``."""
        raise NotImplementedError

    def at(self, rho: Scalar) -> Scalar:
        """Return the time ``t`` at which ``log(alpha/sigma) = rho``: the inverse of :meth:`rho`."""
        raise NotImplementedError

    def rho(self, t: Scalar) -> Tensor:
        """Return ``log(alpha(t)/sigma(t))``, half the log signal-to-noise ratio."""
        return torch.log(_tensor(self.alpha(t))) - torch.log(_tensor(self.sigma(t)))

    def mix(self, x0: Tensor, eps: Tensor, t: Scalar) -> Tensor:
        """Return ``alpha(t) x0 + sigma(t) eps``."""
        return self.alpha(t) * x0 + self.sigma(t) * eps

    def velocity(self, x0: Tensor, eps: Tensor, t: Scalar) -> Tensor:
        """Return ``alpha'(t) x0 + sigma'(t) eps``."""
        return self.d_alpha(t) * x0 + self.d_sigma(t) * eps

    def x0(self, x: Tensor, v: Tensor, t: Scalar) -> Tensor:
        """Return the clean sample for a velocity: ``(sigma v - sigma' x) / (alpha' sigma - alpha sigma')``."""
        a, s, da, ds = self.alpha(t), self.sigma(t), self.d_alpha(t), self.d_sigma(t)
        return (s * v - ds * x) / (da * s - a * ds)

    def eps(self, x: Tensor, v: Tensor, t: Scalar) -> Tensor:
        """Return the noise for a velocity: ``(alpha v - alpha' x) / (alpha sigma' - alpha' sigma)``."""
        a, s, da, ds = self.alpha(t), self.sigma(t), self.d_alpha(t), self.d_sigma(t)
        return (a * v - da * x) / (a * ds - da * s)


@dataclass(frozen=True)
class Linear(Path):
    """Rectified flow: ``alpha = 1 - t``, ``sigma = t``, so ``v = eps - x0`` (arXiv 2209.03003)."""

    def alpha(self, t: Scalar) -> Scalar:
        return 1 - t

    def sigma(self, t: Scalar) -> Scalar:
        return t

    def d_alpha(self, t: Scalar) -> Scalar:
        return -1.0

    def d_sigma(self, t: Scalar) -> Scalar:
        return 1.0

    def at(self, rho: Scalar) -> Tensor:
        return torch.sigmoid(-_tensor(rho))

    def x0(self, x: Tensor, v: Tensor, t: Scalar) -> Tensor:
        return x - t * v

    def eps(self, x: Tensor, v: Tensor, t: Scalar) -> Tensor:
        return x + (1 - t) * v


@dataclass(frozen=True)
class VE(Path):
    """Variance exploding, the coordinates of EDM and of Euler-type schedulers (arXiv 2206.00364).

    ``alpha = 1``, ``sigma = t``, ``v = eps``.
    """

    def __reduce__(self) -> Any:
        return "VE_PATH" if self is VE_PATH else (VE, ())

    def alpha(self, t: Scalar) -> Scalar:
        return 1.0 if isinstance(t, float) else torch.ones_like(_tensor(t))

    def sigma(self, t: Scalar) -> Scalar:
        return t

    def d_alpha(self, t: Scalar) -> Scalar:
        return 0.0

    def d_sigma(self, t: Scalar) -> Scalar:
        return 1.0

    def at(self, rho: Scalar) -> Tensor:
        return torch.exp(-_tensor(rho))

    def velocity(self, x0: Tensor, eps: Tensor, t: Scalar) -> Tensor:
        return eps

    def x0(self, x: Tensor, v: Tensor, t: Scalar) -> Tensor:
        return x - t * v

    def eps(self, x: Tensor, v: Tensor, t: Scalar) -> Tensor:
        return v


@dataclass(frozen=True)
class VP(Path):
    """Variance preserving with a linear rate ``beta(t)`` on ``t in [0, 1]`` (arXiv 2011.13456).

    ``T(t) = beta_min t + (beta_max - beta_min) t^2 / 2``, ``alpha = exp(-T/2)``, ``sigma = sqrt(1 - exp(-T))``.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _integral(self, t: Scalar) -> Tensor:
        t = _tensor(t)
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t * t

    def _rate(self, t: Scalar) -> Scalar:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def alpha(self, t: Scalar) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Scalar) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def d_alpha(self, t: Scalar) -> Tensor:
        return -0.5 * self._rate(t) * self.alpha(t)

    def d_sigma(self, t: Scalar) -> Tensor:
        return 0.5 * self._rate(t) * self.alpha(t) ** 2 / self.sigma(t)

    def at(self, rho: Scalar) -> Tensor:
        # sigma^2/alpha^2 = exp(T) - 1, so T = log1p(exp(-2 rho)): solve the quadratic for t
        integral = torch.nn.functional.softplus(-2 * _tensor(rho))
        slope = self.beta_max - self.beta_min
        if slope == 0:
            return integral / self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))


class Tabulated(Path):
    """The path of a scheduler with a table of cumulative alphas: ``alpha^2 = alphas_cumprod[t]``, ``t`` in train steps.

    Between two integer times ``log(alpha/sigma)`` is linear in ``t``. A zero terminal ratio (arXiv 2305.08891) gives
    ``rho = -inf`` at the last entry, which is exact there; before it the path stays at the last finite ratio.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod.detach().to("cpu", torch.float64)
        self._rho = 0.5 * (torch.log(self.alphas_cumprod) - torch.log1p(-self.alphas_cumprod))
        rise = torch.diff(self._rho, append=self._rho[-1:])
        self._rise = torch.where(torch.isfinite(rise), rise, 0.0)

    def rho(self, t: Scalar) -> Tensor:
        t = _tensor(t).to("cpu", torch.float64)
        last = len(self._rho) - 1
        low = t.floor().clamp(0, last).long()
        return self._rho[low] + (t - low) * self._rise[low]

    def alpha(self, t: Scalar) -> Tensor:
        return torch.sqrt(torch.sigmoid(2 * self.rho(t)))

    def sigma(self, t: Scalar) -> Tensor:
        return torch.sqrt(torch.sigmoid(-2 * self.rho(t)))

    def _slope(self, t: Scalar) -> Tensor:
        return self._rise[_tensor(t).to("cpu", torch.float64).floor().clamp(0, max(len(self._rho) - 2, 0)).long()]

    def d_alpha(self, t: Scalar) -> Tensor:
        return self._slope(t) * self.alpha(t) * self.sigma(t) ** 2

    def d_sigma(self, t: Scalar) -> Tensor:
        return -self._slope(t) * self.sigma(t) * self.alpha(t) ** 2

    def at(self, rho: Scalar) -> Tensor:
        rho = _tensor(rho).to("cpu", torch.float64)
        # rho falls with t; searchsorted needs it rising
        rising = self._rho.flip(0).contiguous()
        last = len(rising) - 1
        high = torch.searchsorted(rising, rho.contiguous()).clamp(1, last)
        lo, hi = rising[high - 1], rising[high]
        part = ((rho - lo) / (hi - lo)).nan_to_num(nan=0.0, posinf=1.0).clamp(0, 1)
        part = torch.where(torch.isinf(lo) & (rho > lo), torch.ones_like(part), part)
        return last - (high - 1 + part)


LINEAR = Linear()
VE_PATH = VE()  # compared by identity, also after a copy


def x0_eps(kind: Prediction, out: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar) -> tuple[Tensor, Tensor]:
    """Return ``(x0, eps)`` for a network output of type ``kind`` at ``x = alpha x0 + sigma eps``.

    epsilon: ``eps = out``; sample: ``x0 = out``; score: ``eps = -sigma out``; velocity of the linear path:
    ``out = eps - x0``; v_prediction: ``out = alpha eps - sigma x0`` (arXiv 2202.00512, where alpha^2 + sigma^2 = 1).
    """
    if kind == "epsilon":
        return (x - sigma * out) / alpha, out
    if kind == "sample":
        return out, (x - alpha * out) / sigma
    if kind == "score":
        eps = -sigma * out
        return (x - sigma * eps) / alpha, eps
    if kind == "velocity":
        total = alpha + sigma
        return (x - sigma * out) / total, (x + alpha * out) / total
    if kind == "v_prediction":
        power = alpha * alpha + sigma * sigma
        return (alpha * x - sigma * out) / power, (sigma * x + alpha * out) / power
    raise _unknown(kind)


def output(kind: Prediction, x0: Tensor, eps: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
    """Return the output of a network of type ``kind`` for ``(x0, eps)``: the inverse of :func:`x0_eps`."""
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    if kind == "score":
        return -eps / sigma
    if kind == "velocity":
        return eps - x0
    if kind == "v_prediction":
        return alpha * eps - sigma * x0
    raise _unknown(kind)


def convert(out: Tensor, x: Tensor, alpha: Scalar, sigma: Scalar, *, source: Prediction, target: Prediction) -> Tensor:
    """Convert a network output of type ``source`` to type ``target``, at ``x = alpha x0 + sigma eps``."""
    return output(target, *x0_eps(source, out, x, alpha, sigma), alpha, sigma)


def transport(x: Tensor, t: Scalar, source: Path, target: Path) -> tuple[Tensor, Scalar]:
    """Return ``(x', t')`` on ``target`` with the clean sample, noise and log SNR of ``(x, t)`` on ``source``.

    ``rho'(t') = rho(t)`` and ``x' = c x`` with ``c = sigma'(t') / sigma(t) = alpha'(t') / alpha(t)``, taken as the
    ratio of their norms, which is finite at pure noise and at zero noise too (arXiv 2503.19385).
    """
    t_new = target.at(source.rho(t))
    scale = _norm(target, t_new) / _norm(source, t)
    return (x * scale.to(x.dtype) if scale.ndim == 0 else x * scale.to(x)), t_new


def _norm(path: Path, t: Scalar) -> Tensor:
    return torch.hypot(_tensor(path.alpha(t)), _tensor(path.sigma(t)))


def karras_preconditioning(sigma: Scalar, sigma_data: float) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    """Return ``(c_skip, c_out, c_in, c_noise)`` of EDM: ``x0 = c_skip x + c_out F(c_in x; c_noise)`` on the VE path.

    ``sigma_data`` is the standard deviation of the data (arXiv 2206.00364, table 1).
    """
    total = sigma * sigma + sigma_data * sigma_data
    root = total**0.5
    c_noise = torch.log(sigma) / 4 if isinstance(sigma, Tensor) else math.log(sigma) / 4
    return sigma_data**2 / total, sigma * sigma_data / root, 1 / root, c_noise


def _unknown(kind: str) -> ValueError:
    allowed = "epsilon, sample, v_prediction, velocity, score"
    return ValueError(f"Unknown prediction type '{kind}'. Known: {allowed}.")
