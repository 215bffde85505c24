"""Transitions from one noise level to another, all of the form ``x' = a x + b v + c z`` with ``z ~ N(0, I)``.

``v`` is the velocity predicted at ``x``. On the linear path ``x0 = x - sigma v`` and
``eps = x + (1 - sigma) v``, on the VE path ``x0 = x - sigma v`` and ``eps = v``; so whatever is affine in ``x0`` and
``eps`` is affine in ``x`` and ``v``. Coefficients are Python floats (float64); no tensor is involved.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from diffaccel.errors import DiffAccelError
from diffaccel.flow import VE_PATH, Path

ROUNDING = 1e-6  # relative tolerance, for a gamma computed in float32


class Coefficients(NamedTuple):
    """Factors of ``x``, of the velocity and of the fresh noise."""

    a: float
    b: float
    c: float


def affine(path: Path, sigma: float, of_x0: float, of_eps: float, c: float = 0.0) -> Coefficients:
    """Express ``of_x0 x0 + of_eps eps + c z`` by ``x`` and ``v`` at ``sigma``."""
    a, b = (0.0, 1.0) if path is VE_PATH else (1.0, 1.0 - sigma)
    return Coefficients(of_x0 + of_eps * a, of_eps * b - of_x0 * sigma, c)


def cps(path: Path, sigma: float, sigma_next: float, gamma: float = 0.0) -> Coefficients:
    """Return the coefficient-preserving kernel ``x' = alpha' x0 + sqrt(sigma'^2 - gamma^2) eps + gamma z``.

    See arXiv 2509.05952. With ``gamma = 0`` it is ``x + (sigma' - sigma) v`` to the bit: Euler's step, which is DDIM's
    (arXiv 2010.02502).

    Raises:
        DiffAccelError: for a gamma outside ``[0, sigma_next]``.
    """
    if not 0 <= gamma <= sigma_next * (1 + ROUNDING):
        raise DiffAccelError(
            f"The fresh noise gamma = {gamma:g} must lie between 0 and the next noise level {sigma_next:g}."
        )
    removed = sigma_next - math.sqrt(max(sigma_next**2 - gamma**2, 0.0))  # from the factor of eps
    a, b = (0.0, 1.0) if path is VE_PATH else (1.0, 1.0 - sigma)
    return Coefficients(1.0 - removed * a, (sigma_next - sigma) - removed * b, gamma)


def forward(path: Path, sigma: float, sigma_next: float) -> Coefficients:
    """Add noise: ``x' = (alpha'/alpha) x + sqrt(sigma'^2 - (alpha'/alpha)^2 sigma^2) z``, for ``sigma' >= sigma``.

    It is the exact forward kernel of the path, by which search over paths returns to noise (arXiv 2501.09732).

    Raises:
        DiffAccelError: for a lower ``sigma_next``.
    """
    if sigma_next < sigma:
        raise DiffAccelError(f"Noise is added from {sigma:g} to {sigma_next:g}, which is less. Go to a higher level.")
    alpha, alpha_next = float(path.alpha(sigma)), float(path.alpha(sigma_next))
    scale = alpha_next / alpha
    return Coefficients(scale, 0.0, math.sqrt(max(sigma_next**2 - (scale * sigma) ** 2, 0.0)))
