"""Learned rounding of weights: soft rounding that an optimizer hardens (AdaRound, arXiv 2004.10568).

``w_q(V) = s clamp(floor(w / s) + h(V), -n, n)`` with ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)`` and given scales s, or
one a row, searched for the least error to the power 2.4 among 80 fractions of the row's largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 80
POWER = 2.4
SMALLEST = 1e-12


def largest_code(bits: int) -> int:
    """Return the largest symmetric code of ``bits`` bits."""
    return int(2 ** (bits - 1) - 1)


def scales_of(weight: Tensor, bits: int) -> Tensor:
    """Return the scale of each row of ``weight (N, K)``, fp32 ``(N, 1)``, for the least error to the power 2.4."""
    weight, n = weight.detach().float(), largest_code(bits)
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST) / n
    best, least = largest, torch.full_like(largest, float("inf"))
    for i in range(CANDIDATES):
        scale = largest * (1 - i / 100)
        codes = (weight / scale).round().clamp(-n, n)
        error = (codes * scale - weight).abs().pow(POWER).sum(dim=1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def nearest(weight: Tensor, bits: int) -> Tensor:
    """Return a weight rounded to the nearest codes, in its dtype."""
    scale, n = scales_of(weight, bits), largest_code(bits)
    return ((weight.float() / scale).round().clamp(-n, n) * scale).to(weight.dtype)


class SoftRounding:
    """The rounding of one weight, learned.

    Args:
        weight: ``(N, K)``.
        bits: of its symmetric codes.
        scale: fp32 ``(N, 1)`` or ``(N, K)``; searched for each row by default.

    Attributes:
        variable: V, fp32 ``(N, K)``; at the start ``h(V)`` is the fraction that rounding drops.
    """

    def __init__(self, weight: Tensor, bits: int, scale: Tensor | None = None) -> None:
        self.weight, self.n = weight.detach(), largest_code(bits)
        self.scale = scales_of(weight, bits) if scale is None else scale.detach().float()
        ratio = self.weight.float() / self.scale
        self.floor = ratio.floor()
        fraction = (ratio - self.floor).clamp(1e-4, 1 - 1e-4)
        self.variable = (-torch.log(1.2 / (fraction + 0.1) - 1)).requires_grad_(True)

    def share(self) -> Tensor:
        """Return ``h(V)``: the share that each code is rounded up by."""
        return (1.2 * torch.sigmoid(self.variable) - 0.1).clamp(0, 1)

    def soft(self) -> Tensor:
        """Return the weight under soft rounding, in its dtype."""
        return self._at(self.share())

    def hard(self) -> Tensor:
        """Return the weight with every share rounded to 0 or 1."""
        return self._at((self.share().detach() >= 0.5).float())

    def codes(self) -> Tensor:
        """Return the codes of :meth:`hard`, int8."""
        return (self.floor + (self.share().detach() >= 0.5).float()).clamp(-self.n, self.n).to(torch.int8)

    def _at(self, share: Tensor) -> Tensor:
        return ((self.floor + share).clamp(-self.n, self.n) * self.scale).to(self.weight.dtype)

    def penalty(self, beta: float) -> Tensor:
        """Return ``sum(1 - |2 h(V) - 1|^beta)``, which is 0 where all shares are 0 or 1."""
        return (1 - (2 * self.share() - 1).abs().pow(beta)).sum()

    @torch.no_grad()
    def descend(self, inputs: Tensor, residual: Tensor, most: int = 256) -> float:
        """Flip the rounding of codes, one of each row at a time, while that lowers the squared error of the outputs.

        Args:
            inputs: of the layer, ``(M, K)``.
            residual: its outputs without those of full precision, ``(M, N)``, under the rounding as it is.
            most: maximum number of flips of a row.

        Returns:
            The squared error that is left.
        """
        x, up = inputs.float(), (self.share() >= 0.5).float()
        gram, slope = x.T @ x, residual.float().T @ x  # (K, K), (N, K)
        error = residual.float().square().sum(dim=0)  # (N,)
        diagonal, rows = gram.diagonal(), torch.arange(len(up), device=up.device)
        for _ in range(most):
            step = self.scale * (1 - 2 * up)
            other = self.floor + 1 - up
            change = 2 * step * slope + step.square() * diagonal
            change = change.masked_fill((other.abs() > self.n) | ((self.floor + up).abs() > self.n), 0.0)
            least, place = change.min(dim=1)
            falls = (least < -1e-9 * error).float()
            if not bool(falls.any()):
                break
            taken = step[rows, place] * falls
            slope += taken.unsqueeze(1) * gram[place]
            error += least * falls
            up[rows, place] = torch.where(falls > 0, 1 - up[rows, place], up[rows, place])
        self.variable = torch.where(up > 0, 10.0, -10.0).to(self.variable)
        return float(error.clamp_min(0).sum())
