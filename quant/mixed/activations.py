"""Codes of activations: with one calibrated scale and zero point, or by the largest magnitude at each call.

Calibrated, b bits: ``L = 2^b`` levels, ``D = (high - low) / (L - 1)`` with low <= 0 <= high, ``z = round(-low / D)``,
``q = clamp(round(x / D) + z, 0, L - 1)``, which stands for ``(q - z) D``. Measured: symmetric, ``s = max|x| / n`` with
n = 2^(b-1) - 1. Zero is exact in both. Infinities and not-a-numbers become not-a-numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffaccel.kernels.codes import SMALLEST
from diffaccel.kernels.dispatch import Mode
from diffaccel.kernels.quantize_rows import quantize_rows


def grid_of(low: Sequence[float], high: Sequence[float], bits: int) -> tuple[Tensor, Tensor]:
    """Return scale fp32 and zero point int32 of each range, on the CPU."""
    smallest = torch.tensor(low, dtype=torch.float64, device="cpu").clamp_max(0)
    largest = torch.tensor(high, dtype=torch.float64, device="cpu").clamp_min(0)
    scale = ((largest - smallest) / (2**bits - 1)).clamp_min(SMALLEST).float()
    return scale, (-smallest / scale.double()).round().to(torch.int32)


def static_levels(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return ``q - z`` of activations, fp32; it stands for ``(q - z) D``."""
    q = (x.float() / scale).round() + zero
    levels = q.clamp(0, 2**bits - 1) - zero
    return torch.where(torch.isfinite(x), levels, torch.nan)


def static_rows(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return int8 codes ``(M, K)``, the scale of each row ``(M, 1)``, and the zero point of these codes.

    A row with an infinity or not-a-number has the scale not-a-number.
    """
    half = 2 ** (bits - 1)
    levels = static_levels(x, scale, zero, bits)
    broken = levels.sum(dim=1, keepdim=True).isnan()
    codes = (levels.nan_to_num(0.0) + (zero - half)).to(torch.int8)
    return codes, torch.where(broken, torch.nan, scale.float()), zero - half


def token_rows(x: Tensor, bits: int, mode: Mode = "auto") -> tuple[Tensor, Tensor]:
    """Return int8 codes ``(M, K)`` and the scale of each row ``(M, 1)``, by its largest magnitude."""
    if bits == 8:
        return quantize_rows(x, "int8", mode)
    n = 2 ** (bits - 1) - 1
    scale = x.float().abs().amax(dim=1, keepdim=True)
    scale = torch.where(torch.isfinite(scale), scale.clamp_min(SMALLEST) / n, torch.nan)
    return (x.float() / scale).round().nan_to_num(0.0).clamp(-n, n).to(torch.int8), scale


def picture_levels(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return whole levels of pictures ``(B, C, H, W)``, fp32, and the scale of each ``(B, 1, 1, 1)``."""
    n = 2 ** (bits - 1) - 1
    scale = x.float().abs().amax(dim=(1, 2, 3), keepdim=True)
    scale = torch.where(torch.isfinite(scale), scale.clamp_min(SMALLEST) / n, torch.nan)
    return (x.float() / scale).round().clamp(-n, n), scale
