"""From one noise level to another: every move is ``x' = a x + b v + c z`` with ``z ~ N(0, I)``.

``v`` is the velocity that was predicted at ``x``. On the linear path ``x0 = x - sigma v`` and
``eps = x + (1 - sigma) v``, on the VE path ``x0 = x - sigma v`` and ``eps = v``; so whatever is affine in ``x0`` and
``eps`` is affine in ``x`` and ``v``. All numbers are Python floats, float64, and the tensors stay out of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from diffaccel.errors import DiffAccelError
from diffaccel.flow import VE_PATH, Path

ROUNDING = 1e-6  # relative, of a gamma that was computed in float32


class Coefficients(NamedTuple):
    """Of ``x``, of the velocity, and of fresh noise."""

    a: float
    b: float
    c: float


def affine(path: Path, sigma: float, of_x0: float, of_eps: float, c: float = 0.0) -> Coefficients:
    """``of_x0 x0 + of_eps eps + c z`` in terms of ``x`` and ``v`` at ``sigma``."""
    a, b = (0.0, 1.0) if path is VE_PATH else (1.0, 1.0 - sigma)
    return Coefficients(of_x0 + of_eps * a, of_eps * b - of_x0 * sigma, c)


def cps(path: Path, sigma: float, sigma_next: float, gamma: float = 0.0) -> Coefficients:
    """The coefficient-preserving kernel ``x' = alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z`` (arXiv 2509.05952).

    With ``gamma = 0`` it is ``x + (sigma' - sigma) v`` to the bit: Euler's step, which is DDIM's (arXiv 2010.02502).

    Raises:
        DiffAccelError: for a gamma outside ``[0, sigma_next]``.
    """
    if not 0 <= gamma <= sigma_next * (1 + ROUNDING):
        raise DiffAccelError(
            f"The fresh noise gamma = {gamma:g} must lie between 0 and the next noise level {sigma_next:g}."
        )
    less = sigma_next - math.sqrt(max(sigma_next**2 - gamma**2, 0.0))
    a, b = (0.0, 1.0) if path is VE_PATH else (1.0, 1.0 - sigma)
    return Coefficients(1.0 - less * a, (sigma_next - sigma) - less * b, gamma)


def forward(path: Path, sigma: float, sigma_next: float) -> Coefficients:
    """Noise added: ``x' = (alpha'/alpha) x + sqrt(sigma'^2 - (alpha'/alpha)^2 sigma^2) z``, for ``sigma' >= sigma``.

    The exact forward kernel of the path, which search over paths goes back by (arXiv 2501.09732).
    """
    if sigma_next < sigma:
        raise DiffAccelError(f"Noise is added from {sigma:g} to {sigma_next:g}, which is less. Go to a higher level.")
    alpha, alpha_next = float(path.alpha(sigma)), float(path.alpha(sigma_next))
    kept = alpha_next / alpha
    return Coefficients(kept, 0.0, math.sqrt(max(sigma_next**2 - (kept * sigma) ** 2, 0.0)))
