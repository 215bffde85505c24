"""Degradations of pictures, each with a strength per picture, that the features have to detect.

All take pictures (N, 3, H, W) float in [0, 1] and strengths ``s`` (N,) in [0, 1], and run on any device. ``KINDS`` are
those of training; the measurement has its own levels, and uses real JPEG files.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Degradation = Callable[[Tensor, Tensor, torch.Generator], Tensor]
LUMA = (0.299, 0.587, 0.114)
# Quantisation tables of the JPEG standard (ITU-T T.81, annex K), luminance and chrominance.
_LUMINANCE = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMINANCE = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99,
    47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32,
)  # fmt: skip


def luma(x: Tensor) -> Tensor:
    """Compute the luma (N, 1, H, W) of ITU-R BT.601."""
    return (x * x.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Blur with a Gaussian of ``sigma`` (N,) pixels, normalised at the borders: one exact matrix product per axis."""

    def matrix(length: int) -> Tensor:
        place = torch.arange(length, device=x.device)
        squared = (place[:, None] - place).square()
        weight = torch.exp(-squared / (2 * sigma.clamp_min(1e-3).square())[:, None, None])
        return (weight / weight.sum(2, keepdim=True))[:, None]

    return matrix(x.shape[2]) @ x @ matrix(x.shape[3]).mT


def desaturate(x: Tensor, s: Tensor) -> Tensor:
    """Move colours towards their luma by ``s``."""
    return torch.lerp(x, luma(x).expand_as(x), s[:, None, None, None])


def shuffle_patches(x: Tensor, share: Tensor, cells: int, generator: torch.Generator) -> Tensor:
    """Permute a random ``share`` (N,) of the ``cells`` x ``cells`` patches in one cycle."""
    n, c, h, w = x.shape
    patches = x.view(n, c, cells, h // cells, cells, w // cells).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(n, cells * cells, generator=generator, device=x.device).argsort(1)
    rank = torch.arange(cells * cells, device=x.device)
    moved = (share * cells * cells).round().clamp_min(1).long()[:, None]
    target = torch.where(rank < moved, (rank + 1) % moved, rank)
    source = order.gather(1, target).gather(1, order.argsort(1))
    patches = patches.gather(1, source[:, :, None, None, None].expand_as(patches))
    grid = patches.view(n, cells, cells, c, h // cells, w // cells)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n, c, h, w)


def jpeg(x: Tensor, quality: Tensor) -> Tensor:
    """Apply the losses of JPEG at ``quality`` (N,) in [1, 100] with halved chroma; entropy coding loses nothing."""
    q = quality[:, None]
    scale = torch.where(q < 50, 5000 / q, 200 - 2 * q)
    tables = x.new_tensor([_LUMINANCE, _CHROMINANCE, _CHROMINANCE])
    steps = ((tables * scale[..., None] + 50) / 100).floor().clamp(1, 255).view(-1, 3, 1, 1, 8, 8)
    y = luma(x)[:, 0]
    blue, red = (x[:, 2] - y) / 1.772, (x[:, 0] - y) / 1.402
    chroma = F.avg_pool2d(torch.stack([blue, red], 1), 2)
    y = _requantise(y[:, None] - 0.5, steps[:, :1])[:, 0] + 0.5
    chroma = F.interpolate(_requantise(chroma, steps[:, 1:]), size=x.shape[2:], mode="bilinear")
    blue, red = chroma.unbind(1)
    return torch.stack([y + 1.402 * red, y - (0.299 * 1.402 * red + 0.114 * 1.772 * blue) / 0.587, y + 1.772 * blue], 1)


def _requantise(plane: Tensor, steps: Tensor) -> Tensor:
    """Quantise the DCT coefficients of 8 x 8 blocks by ``steps``, and transform back."""
    k = torch.arange(8, device=plane.device, dtype=plane.dtype)
    dct = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) * torch.where(k == 0, 0.125**0.5, 0.5)[:, None]
    n, c, h, w = plane.shape
    blocks = plane.reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4) * 255
    blocks = dct.T @ ((dct @ blocks @ dct.T / steps).round() * steps) @ dct
    return blocks.transpose(3, 4).reshape(n, c, h, w) / 255


def _field(x: Tensor, generator: torch.Generator) -> Tensor:
    """Draw smooth colour noise with a standard deviation of about 1."""
    small = torch.randn(len(x), 3, 6, 6, generator=generator, device=x.device)
    return F.interpolate(small, size=x.shape[2:], mode="bicubic") * 1.3


def _blur(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    return gaussian_blur(x, 0.3 + x.shape[-1] / 20 * s**1.7)


def _noise(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    deviation = (0.008 + 0.5 * s**1.7)[:, None, None, None]
    return x + deviation * torch.randn(x.shape, generator=generator, device=x.device)


def _jpeg(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    return jpeg(x, 96 * 0.03**s)


def _desaturate(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    return desaturate(x, s)


def _shuffle(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    parts = zip(x.chunk(3), s.chunk(3), (4, 8, 16), strict=False)
    return torch.cat([shuffle_patches(a, b, cells, generator) for a, b, cells in parts])


def _saturate(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    return desaturate(x, -0.1 - 2 * s)


def _contrast(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    return torch.lerp(x, x.mean((1, 2, 3), keepdim=True).expand_as(x), (0.05 + 0.85 * s)[:, None, None, None])


def _hue(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    y = luma(x)
    colour = x - y
    turn = (math.pi * (0.05 + 0.95 * s))[:, None, None, None]
    # Rotation about the grey axis (Rodrigues): c cos + (k x c) sin, since c is nearly normal to k
    cross = (colour.roll(1, 1) - colour.roll(-1, 1)) / math.sqrt(3)
    return y + colour * turn.cos() + cross * turn.sin()


def _posterise(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    levels = (32 * (3 / 32) ** s).round()[:, None, None, None]
    return (x * levels).round() / levels


def _ghost(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    return torch.lerp(x, x.roll((3, 7), (2, 3)), (0.05 + 0.45 * s)[:, None, None, None])


def _blotches(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    return x + (0.02 + 0.25 * s)[:, None, None, None] * _field(x, generator)


def _clean(x: Tensor, s: Tensor, generator: torch.Generator) -> Tensor:
    return x


KINDS: dict[str, Degradation] = {
    "clean": _clean,
    "blur": _blur,
    "noise": _noise,
    "jpeg": _jpeg,
    "desaturate": _desaturate,
    "shuffle": _shuffle,
    "saturate": _saturate,
    "contrast": _contrast,
    "hue": _hue,
    "posterise": _posterise,
    "ghost": _ghost,
    "blotches": _blotches,
}
