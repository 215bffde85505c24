"""Structural similarity under a flat window, nearly the whole picture by default, as sensitivities are measured."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def mean_similarity(a: Tensor, b: Tensor, window: int = 511) -> float:
    """Return the mean SSIM of pictures uint8 ``(B, C, H, W)``; 1 for equal ones.

    Moments are means over squares of ``window`` pixels, at most the shorter side, at every place they fit.
    """
    side = min(window, *a.shape[-2:])
    x, y = a.to(torch.float64), b.to(torch.float64)

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, side, stride=1)

    mx, my = mean(x), mean(y)
    xx, yy, xy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    ratio = (2 * mx * my + _C1) * (2 * xy + _C2) / ((mx * mx + my * my + _C1) * (xx + yy + _C2))
    return float(ratio.mean())
