"""Latents at another resolution: of clean ones by interpolation, of noisy ones by their spectrum.

Interpolation averages or repeats noise, so that it is neither white nor of unit variance afterwards; only a clean
sample may be interpolated. A DCT is orthonormal: with white noise in the new coefficients, noise stays white.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from diffaccel.modules.dct import dct_matrix

Interpolation = Literal["bilinear", "bicubic", "nearest", "area"]


def interpolate(x: Tensor, size: tuple[int, int], mode: Interpolation) -> Tensor:
    """Resize ``(B, C, H, W)`` or every frame of ``(B, C, F, H, W)`` to ``size``, antialiased on the way down."""
    if tuple(x.shape[-2:]) == size:
        return x
    frames = x.transpose(1, 2).flatten(0, 1) if x.ndim == 5 else x  # (B F, C, H, W)
    smooth = {"antialias": True, "align_corners": False} if mode in ("bilinear", "bicubic") else {}
    wide = frames.to(torch.promote_types(x.dtype, torch.float32))  # not every kernel knows half precision
    resized = functional.interpolate(wide, size=size, mode=mode, **smooth).to(x.dtype)
    return resized.unflatten(0, (len(x), -1)).transpose(1, 2) if x.ndim == 5 else resized


def time_at_scale(t: float, ratio: float) -> float:
    """Return the noise level on a grid whose side is ``ratio`` times as long, at which features look as noisy.

    ``t' = r t / (1 + (r - 1) t)``: an average over ``r x r`` pixels has ``1/r`` of their noise (arXiv 2403.03206).
    Ratios compose: r1, then r2, is r1 r2.
    """
    return ratio * t / (1 + (ratio - 1) * t)


def side_ratio(old: tuple[int, int], new: tuple[int, int]) -> float:
    """Return the ratio of the sides of two grids, the root of that of their areas."""
    return math.sqrt(new[0] * new[1] / (old[0] * old[1]))


def crop_spectrum(noise: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the low frequencies of white noise as white noise on a smaller grid: the corner of its DCT."""
    if tuple(noise.shape[-2:]) == size:
        return noise
    (h, w), (height, width) = size, noise.shape[-2:]
    tall, wide = (dct_matrix(n, noise.device, noise.dtype) for n in (height, width))
    low = tall[:h] @ noise @ wide[:w].T
    return dct_matrix(h, noise.device, noise.dtype).T @ low @ dct_matrix(w, noise.device, noise.dtype)


def expand_spectrum(x: Tensor, t: float, noise: Tensor) -> tuple[Tensor, float]:
    """Expand a noisy state to the larger grid of ``noise``: its spectrum stays, the rest is noise (arXiv 2605.18736).

    ``x = (1 - t) x0 + t eps`` on ``h x w`` becomes ``kappa (U x U' + t (noise - P noise))`` on ``H x W``: U writes the
    DCT of x into the low frequencies, P keeps these, r is the ratio of sides, and ``kappa = r / (1 + (r - 1) t)`` puts
    signal and noise on the path again, at ``kappa t``.

    Returns:
        The state ``(B, C, ..., H, W)`` and its level.
    """
    (h, w), (height, width) = x.shape[-2:], noise.shape[-2:]
    if (h, w) == (height, width):
        return x, t
    tall, wide = (dct_matrix(n, x.device, x.dtype) for n in (height, width))
    low_tall, low_wide = tall[:h], wide[:w]  # (h, H), (w, W)
    spectrum = dct_matrix(h, x.device, x.dtype) @ x @ dct_matrix(w, x.device, x.dtype).T
    low_noise = low_tall @ noise @ low_wide.T
    ratio = side_ratio((h, w), (height, width))
    kappa = ratio / (1 + (ratio - 1) * t)
    return kappa * (low_tall.T @ (spectrum - t * low_noise) @ low_wide + t * noise), kappa * t
