"""A velocity network seen as a TrigFlow network (arXiv 2410.11081), per frame.

``z = cos(t) x0 + sin(t) sd eps`` with t in [0, pi/2] is the linear path's ``x = z / c`` at the level
``sigma = sd sin(t) / c``, where ``c = cos(t) + sd sin(t)``. A network that predicts ``v = eps - x0`` there predicts
``sd F = (sd cos(t) - sin(t)) x + (sd / c) v`` here, and its estimate of the clean frame is the same on both paths:
``f = cos(t) z - sin(t) sd F = x - sigma v``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # x (B, S, C, H, W), sigma (B, S) -> v


def per_pixel(t: Tensor) -> Tensor:
    """Return values ``(B, S)`` of frames in a shape that broadcasts against frames."""
    return t[:, :, None, None, None]


def to_linear(z: Tensor, t: Tensor, sd: float) -> tuple[Tensor, Tensor]:
    """Return ``x`` and ``sigma (B, S)`` of the linear path for ``z`` at the angles ``t (B, S)``."""
    c = t.cos() + sd * t.sin()
    return z / per_pixel(c), sd * t.sin() / c


def from_linear(x: Tensor, sigma: Tensor, sd: float) -> tuple[Tensor, Tensor]:
    """Invert :func:`to_linear`: ``tan(t) = sigma / (sd (1 - sigma))``, log-normal where the level is logit-normal."""
    t = torch.atan2(sigma, sd * (1 - sigma))
    return x * per_pixel(t.cos() + sd * t.sin()), t


def scaled_prediction(velocity: Velocity, z: Tensor, t: Tensor, sd: float) -> Tensor:
    """Return ``sd F(z / sd, t)`` of a network that predicts velocities of the linear path."""
    x, sigma = to_linear(z, t, sd)
    cos, sin = per_pixel(t.cos()), per_pixel(t.sin())
    return (sd * cos - sin) * x + sd / (cos + sd * sin) * velocity(x, sigma)


def clean_estimate(z: Tensor, t: Tensor, scaled: Tensor) -> Tensor:
    """Return ``f = cos(t) z - sin(t) sd F``."""
    return per_pixel(t.cos()) * z - per_pixel(t.sin()) * scaled
