"""At which noise levels assistant and generator are trained.

A level is the ratio ``rho = s / a`` of noise to signal in the network's input, which has a meaning on every path; it is
kept as ``sigma = rho / (1 + rho)`` in (0, 1), the noise level of the linear path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Law = Literal["uniform", "logit_normal", "log_normal", "karras"]
_KARRAS_RHO, _KARRAS_LEAST, _KARRAS_MOST = 7.0, 0.002, 80.0


@dataclass(frozen=True)
class Levels:
    """A law of noise levels.

    Args:
        law: "uniform" between ``low`` and ``high``; "logit_normal" and "log_normal" with ``mean`` and ``deviation``
            of the logit of sigma and of the logarithm of the ratio, which are the same number; "karras" the ratio
            ``(0.002^(1/7) + u (80^(1/7) - 0.002^(1/7)))^7``, u uniform below ``high`` (EDM, arXiv 2206.00364).
        shift: moves levels towards noise, ``shift sigma / (1 + (shift - 1) sigma)``, as models of large pictures need.
    """

    law: Law = "uniform"
    low: float = 0.02
    high: float = 0.98
    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 1.0

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Return ``(count,)`` levels, fp32 on the generator's device."""
        device = generator.device
        if self.law in ("logit_normal", "log_normal"):
            normal = torch.randn(count, generator=generator, device=device, dtype=torch.float32)
            sigma = torch.sigmoid(self.mean + self.deviation * normal)
        else:
            u = torch.rand(count, generator=generator, device=device, dtype=torch.float32)
            sigma = self.low + (self.high - self.low) * u if self.law == "uniform" else self._karras(u * self.high)
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return sigma.clamp(1e-3, 1 - 1e-3)

    def _karras(self, u: Tensor) -> Tensor:
        least, most = (math.pow(value, 1 / _KARRAS_RHO) for value in (_KARRAS_LEAST, _KARRAS_MOST))
        ratio = (least + u * (most - least)) ** _KARRAS_RHO
        return ratio / (1 + ratio)


def from_ratio(ratio: float) -> float:
    """Return the level of a ratio of noise to signal."""
    return ratio / (1 + ratio)
