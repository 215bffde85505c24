"""Noise levels of a stage, on the linear path ``x = (1 - t) x0 + t eps``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def shift(u: Tensor, h: float) -> Tensor:
    """Return ``S_h(u) = h u / (1 + (h - 1) u)``: equal steps of u spend more of them at high noise for h above 1."""
    return h * u / (1 + (h - 1) * u)


def unshift(t: Tensor, h: float) -> Tensor:
    """Invert :func:`shift`."""
    return t / (h - (h - 1) * t)


def fitted_shift(levels: Tensor) -> float:
    """Return the shift h of a schedule of n steps, read in its middle: ``t / (1 - t) = h u / (1 - u)``."""
    n = len(levels) - 1
    middle = max(1, n // 2)
    if n < 2:
        return 1.0
    u, t = 1 - middle / n, float(levels[middle])
    return t / (1 - t) * (1 - u) / u


def shifted(start: float, end: float, steps: int, h: float) -> Tensor:
    """Return ``steps + 1`` levels from ``start`` to ``end``, equally spaced before the shift h; both ends are exact."""
    ends = unshift(torch.tensor([start, end], dtype=torch.float64, device="cpu"), h)
    levels = shift(torch.linspace(float(ends[0]), float(ends[1]), steps + 1, dtype=torch.float64, device="cpu"), h)
    levels[0], levels[-1] = start, end
    return levels


def resampled(schedule: Tensor, start: float, end: float, steps: int) -> Tensor:
    """Return ``steps + 1`` levels from ``start`` to ``end`` that lie on the curve of another schedule.

    The curve is linear between the levels of ``schedule``; steps are equal along it.
    """
    own = schedule.to(torch.float64).flip(0).numpy()  # growing
    places = np.linspace(0.0, 1.0, len(own))
    start = min(start, float(own[-1]))
    first, last = np.interp([start, end], own, places)
    levels = torch.from_numpy(np.interp(np.linspace(first, last, steps + 1), places, own))
    levels[0], levels[-1] = start, end
    return levels


def truncated(start: float, steps: int, h: float) -> Tensor:
    """Return the last levels of the shifted grid of ``steps`` from 1 to 0, as image-to-image pipelines cut it.

    ``n = steps - int(steps - steps * start)`` steps are left; in this order, since 20 (1 - .8) rounds to 3.99...
    """
    left = steps - int(steps - steps * start)
    return shifted(1.0, 0.0, steps, h)[steps - left :]
