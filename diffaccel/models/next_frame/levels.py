"""Noise levels of a frame's few steps, and the two rules of a step: Euler's, and a consistency model's.

With ``x_t = (1-t) x0 + t e`` and ``v = e - x0``: Euler's step is ``x_s = x_t + (s-t) v``; a consistency step takes
``x0 = x_t - t v`` and mixes in new noise, ``x_s = (1-s) x0 + s e'`` (arXiv 2303.01469).
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from diffaccel.errors import DiffAccelError

StepRule = Literal["euler", "consistency"]
MOST_STEPS = 10_000  # of a frame: more have no use, and a list of their levels may have no end


def levels(steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Return ``steps + 1`` levels from 1 to 0: ``s u / (1 + (s - 1) u)`` of an even grid ``u``, with the shift s."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise DiffAccelError(f"steps is {steps!r}; it must be a whole number, 1 or more, {MOST_STEPS:,} at most.")
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise DiffAccelError(f"shift is {shift!r}; it must be a positive number: 1 for an even grid.")
    grid = [1 - k / steps for k in range(steps + 1)]
    return tuple(shift * u / (1 + (shift - 1) * u) for u in grid)


def step(rule: StepRule, x: Tensor, v: Tensor, sigma: float, sigma_next: float, noise: Tensor | None) -> Tensor:
    """Return the state at ``sigma_next``; ``noise`` is new, for a consistency step that is not the last one."""
    if rule == "euler" or noise is None:
        return x + (sigma_next - sigma) * v
    return (1 - sigma_next) * (x - sigma * v) + sigma_next * noise
