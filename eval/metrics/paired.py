"""Fidelity of images to those of a baseline at equal prompt and seed: PSNR, SSIM, latent error.

Images are uint8 ``(B, 3, H, W)``, the baseline first; every function returns one float64 value per pair, on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.errors import DiffAccelError, size_text

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
WORST = 8


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio, ``20 log10(255 / rmse)`` dB, (B,) float64; ``inf`` for identical images.

    The squared error is summed in integers, so it is exact and the same on every device.

    Raises:
        DiffAccelError: unless both are uint8 ``(B, 3, H, W)`` of one shape.
    """
    check_pair(a, b)
    difference = a.to(torch.int32) - b.to(torch.int32)
    squares = (difference * difference).sum(dim=(1, 2, 3), dtype=torch.int64)
    mse = squares.cpu().to(torch.float64) / a[0].numel()
    return 10 * torch.log10(255**2 / mse)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Compute structural similarity, the mean over pixels and channels; exactly 1 for identical images. (B,) float64.

    ``(2 ma mb + c1)(2 sab + c2) / ((ma^2 + mb^2 + c1)(sa^2 + sb^2 + c2))`` with moments under an 11-tap
    Gaussian window of sigma 1.5, ``c1 = (0.01 L)^2``, ``c2 = (0.03 L)^2``, ``L = 255`` (Wang et al. 2004). Edges
    are reflected, as torchmetrics does.

    Raises:
        DiffAccelError: unless both are uint8 ``(B, 3, H, W)`` of one shape, at least 11 pixels a side.
    """
    check_pair(a, b)
    if min(a.shape[-2:]) < WINDOW:
        raise DiffAccelError(
            f"SSIM has a window of {WINDOW}x{WINDOW} pixels, and the images are {size_text(*a.shape[-2:])}. "
            "Use larger images, or PSNR."
        )
    planes = zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)  # (H, W), one at a time, which fits into the CPU cache
    return torch.stack([_ssim(x, y) for x, y in planes]).view(-1, 3).mean(1).cpu()


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    x, y = _double(a), _double(b)
    c1, c2 = (K1 * 255) ** 2, (K2 * 255) ** 2
    mx, my, xx, yy, xy = (_blur(moment) for moment in (x, y, x * x, y * y, x * y))
    # variances are not clamped, so that rounding cancels and identical images give exactly 1
    numerator = (2 * (mx * my) + c1) * (2 * (xy - mx * my) + c2)
    denominator = (mx * mx + my * my + c1) * ((xx - mx * mx) + (yy - my * my) + c2)
    return (numerator / denominator).mean()


def _blur(x: Tensor) -> Tensor:
    """Apply the Gaussian window along both axes of ``(H, W)``, edges reflected.

    Sums of shifted views are several times as fast as a convolution in float64 on a CPU.
    """
    half = WINDOW // 2
    taps = [math.exp(-0.5 * (i / SIGMA) ** 2) for i in range(-half, half + 1)]
    x = F.pad(x[None, None], (half, half, half, half), mode="reflect")[0, 0]
    for axis in (0, 1):
        size = x.shape[axis] - 2 * half
        total = x.narrow(axis, half, size) * (taps[half] / sum(taps))
        for i in range(half):
            total.add_(x.narrow(axis, i, size) + x.narrow(axis, 2 * half - i, size), alpha=taps[i] / sum(taps))
        x = total
    return x


def latent_error(a: Tensor, b: Tensor) -> Tensor:
    """Compute the relative distance of latents, ``||b - a|| / ||a||`` over all axes but the first. (B,) float64.

    Raises:
        DiffAccelError: unless both are floats ``(B, ...)`` of one shape, finite, and no baseline is all zeros.
    """
    if a.shape != b.shape or a.ndim < 2 or len(a) == 0:
        raise DiffAccelError(f"Latents must be (B, ...) of one shape; got {tuple(a.shape)} and {tuple(b.shape)}.")
    if not (a.is_floating_point() and b.is_floating_point()):
        raise DiffAccelError(f"Latents must be floats; got {a.dtype} and {b.dtype}.")
    x, y = (_double(latents).flatten(1) for latents in (a, b))
    for name, rows in (("first", x), ("second", y)):
        bad = (~torch.isfinite(rows)).any(1).nonzero().flatten().tolist()
        if bad:
            raise DiffAccelError(f"{len(bad)} of {len(rows)} {name} latents are not finite, the first at {bad[0]}.")
    norm = x.norm(dim=1)
    if (norm == 0).any():
        raise DiffAccelError(
            f"Latents {int((norm == 0).nonzero()[0])} of the baseline are all zero: no relative error."
        )
    return ((y - x).norm(dim=1) / norm).cpu()


def summarise(values: Tensor | Sequence[float], *, better: Literal["lower", "higher"] = "lower") -> dict[str, Any]:
    """Summarise values by mean, median, the 95th percentile towards worse, and the indices of the worst.

    Args:
        values: (n,), one per pair; ``inf``, the PSNR of identical images, is allowed and left out of the mean only.
        better: the metric's good direction. ``p95`` is the value that 5 % of pairs are worse than.

    Returns:
        ``mean, median, p95`` as floats, possibly ``inf``, and ``worst``, up to 8 indices.

    Raises:
        DiffAccelError: for an empty list, NaN, or an unknown direction.
    """
    x = torch.as_tensor(values, dtype=torch.float64, device="cpu").flatten()
    if len(x) == 0 or bool(x.isnan().any()):
        bad = int(x.isnan().sum())
        raise DiffAccelError(f"There is nothing to summarise: {bad} of {len(x)} values are NaN. Give numbers.")
    if better not in ("lower", "higher"):
        raise DiffAccelError(f"better is 'lower' or 'higher', not '{better}'.")
    finite = x[x.isfinite()]
    ordered = np.sort(x.numpy())
    worst = torch.argsort(x, descending=better == "lower", stable=True)[:WORST]
    return {
        "mean": float(finite.mean()) if len(finite) else float(x[0]),
        "median": _quantile(ordered, 0.5),
        "p95": _quantile(ordered, 0.95 if better == "lower" else 0.05),
        "worst": worst.tolist(),
    }


def check_images(images: Tensor, label: str = "images") -> None:
    """Raise for anything but uint8 ``(B, 3, H, W)`` with ``B >= 1``."""
    if images.dtype != torch.uint8:
        raise DiffAccelError(
            f"The {label} must be uint8, not {images.dtype}: what range floats have cannot be guessed. "
            "Convert them with diffaccel.eval.images.source.to_uint8."
        )
    if images.ndim != 4 or images.shape[1] != 3 or images.numel() == 0:
        raise DiffAccelError(f"The {label} must have shape (B, 3, H, W); got {tuple(images.shape)}.")


def check_pair(a: Tensor, b: Tensor) -> None:
    """Raise for anything but two uint8 batches ``(B, 3, H, W)`` of one shape."""
    check_images(a, "first images")
    check_images(b, "second images")
    if a.shape != b.shape:
        raise DiffAccelError(f"Paired images need one shape; got {tuple(a.shape)} and {tuple(b.shape)}.")


def _double(x: Tensor) -> Tensor:
    x = x.cpu() if x.device.type == "mps" else x  # which has no float64
    return x.to(torch.float64)


def _quantile(ordered: np.ndarray[Any, np.dtype[np.float64]], q: float) -> float:
    """Interpolate linearly between order statistics, of which the last may be ``inf``."""
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    low, high = float(ordered[below]), float(ordered[math.ceil(position)])
    return low if low == high or position == below else low + (position - below) * (high - low)
