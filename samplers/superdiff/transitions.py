"""The Gaussian kernel of one reverse step, and the density estimator on it.

For ``x = a x0 + s eps`` at one level and ``y = b x0 + r eps`` at the next, the noising kernel is
``k(x|y) = N(x; (a/b) y, S2 I)`` with ``S2 = s^2 - r^2 a^2/b^2``, whatever the data. Detailed balance gives the change
of a model's log-density along a step as ``log N(y; mu_i, V) - log k(x|y)``: no divergence of the network is needed
(arXiv 2412.17762, theorem 1 and 2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from diffaccel.flow import Path

KernelKind = Literal["matched", "posterior", "euler"]


@dataclass(frozen=True)
class ReverseKernel:
    """``y ~ N(mu_i, V I)`` with ``mu_i = of_x x + of_v v_i`` for a model of velocity ``v_i``.

    Attributes:
        variance: V.
        ratio: ``a/b`` of the noising kernel.
        noising: ``S2`` of the noising kernel.
        eps_x, eps_v: ``eps_i = eps_x x + eps_v v_i``.
        drift: factor of ``x`` in a step without score, ``1 - dt dlog(a)/dt``.
        sigma: noise level ``s``.
        dt: length of the step in the path's time, positive.
        is_last: whether the step ends at the clean sample, which has no noise and no density.
        is_euler: whether it is an Euler-Maruyama step.
    """

    of_x: float
    of_v: float
    variance: float
    ratio: float
    noising: float
    eps_x: float
    eps_v: float
    drift: float
    sigma: float
    dt: float
    is_last: bool
    is_euler: bool = False


def reverse_kernels(
    path: Path, times: Sequence[float], kind: KernelKind = "matched", data_std: float = 1.0
) -> list[ReverseKernel]:
    """Return the kernel of every step between falling times of a path.

    The mean is Tweedie's ``b x0_i + (a r^2 / (b s)) eps_i``, exact and finite also at ``a = 0``.

    Args:
        kind: "matched": ``V = S2 (b^2 c^2 + r^2) / (a^2 c^2 + s^2)``, exact for Gaussian data of standard deviation c;
            "posterior": ``V = r^2 S2 / s^2``, DDPM's; "euler": an Euler-Maruyama step of the reverse equation with
            ``V = g^2 dt`` (arXiv 2412.17762, theorem 1), but for the last, which ends at the clean sample.
        data_std: c, the standard deviation of clean latents per coordinate.
    """
    return [_kernel(path, t, t_next, kind, data_std) for t, t_next in pairwise(times)]


def _kernel(path: Path, t: float, t_next: float, kind: KernelKind, c: float) -> ReverseKernel:
    a, s, b, r = (float(f(u)) for u in (t, t_next) for f in (path.alpha, path.sigma))
    da, ds = float(path.d_alpha(t)), float(path.d_sigma(t))
    dt, wronskian = t - t_next, a * ds - da * s
    x0_x, x0_v = ds / wronskian, -s / wronskian
    eps_x, eps_v = -da / wronskian, a / wronskian
    of_eps = a * r * r / (b * s)
    of_x, of_v = b * x0_x + of_eps * eps_x, b * x0_v + of_eps * eps_v
    noising = s * s - (r * a / b) ** 2
    drift = 1 - dt * da / a if a else math.nan
    variance = noising * (b * b * c * c + r * r) / (a * a * c * c + s * s)
    if kind == "posterior" and r > 0:
        variance = r * r * noising / (s * s)
    elif kind == "euler" and r > 0:
        variance = 2 * s * s * (ds / s - da / a) * dt  # g^2 dt
        of_x, of_v = drift - variance * eps_x / s, -variance * eps_v / s
    return ReverseKernel(
        of_x, of_v, variance, a / b, noising, eps_x, eps_v, drift, s, dt, r == 0, kind == "euler" and r > 0
    )


def growth(path: Path, times: Sequence[float], kernels: Sequence[ReverseKernel], data_std: float = 1.0) -> float:
    """Return by what factor Gaussian data come out too wide: 1 for steps that follow the path, far above for unstable.

    An Euler-Maruyama step multiplies the state by about ``1 - g^2 dt``: near pure noise on a flow path that is -200 for
    a step of .2, which later steps only take back where there are enough of them.

    Args:
        times: those that the kernels were made for.
        data_std: of the data, per coordinate.
    """
    a, s = (float(f(times[0])) for f in (path.alpha, path.sigma))
    spread = power = (a * data_std) ** 2 + s * s
    for kernel, t, t_next in zip(kernels, times, times[1:], strict=False):
        slope = (float(path.d_alpha(t)) * a * data_std**2 + float(path.d_sigma(t)) * s) / power  # E[v|x] = slope x
        spread = (kernel.of_x + kernel.of_v * slope) ** 2 * spread + (0.0 if kernel.is_last else kernel.variance)
        a, s = (float(f(t_next)) for f in (path.alpha, path.sigma))
        power = (a * data_std) ** 2 + s * s
    return math.sqrt(spread / power)


def log_density_step(kernel: ReverseKernel, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Return ``log N(y; mu, V) - log k(x|y)``, the change of one model's log-density from ``x`` to ``y``, ``(B,)``."""
    mean = kernel.of_x * x + kernel.of_v * v
    forward = (y - mean).flatten(1).square().sum(1) / kernel.variance
    backward = (x - kernel.ratio * y).flatten(1).square().sum(1) / kernel.noising
    size = x[0].numel()
    return 0.5 * (backward - forward + size * (math.log(kernel.noising) - math.log(kernel.variance)))
