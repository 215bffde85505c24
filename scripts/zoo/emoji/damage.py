"""Damaged pictures, of which their captions are no longer true: shuffled, exchanged, blurred, sharpened, noisy.

A judge that has never seen them as negatives gives a blurred emoji the points of a sharp one. Pictures are
(B, 3, s, s) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.features.degradations import gaussian_blur, jpeg

Kind = Callable[[Tensor, Tensor, torch.Generator], Tensor]
_GRIDS = ((4, 1), (1, 4), (2, 2), (4, 4))


def shuffle_patches(images: Tensor, generator: torch.Generator, grid: tuple[int, int] | None = None) -> Tensor:
    """Shuffle the blocks of a ``grid`` of (rows, columns); by default one of bands, 2 x 2 or 4 x 4 blocks at random."""
    if grid is None:
        grid = _GRIDS[torch.randint(len(_GRIDS), (1,), generator=generator, device=generator.device).item()]
    rows, columns = grid
    b, c, height, width = images.shape
    blocks = images.reshape(b, c, rows, height // rows, columns, width // columns).permute(0, 2, 4, 1, 3, 5)
    blocks = blocks.reshape(b, rows * columns, c, height // rows, width // columns)
    order = torch.rand(b, rows * columns, generator=generator, device=generator.device).argsort(1)
    # The identity, one order of 24 or of many more, changes nothing: it is rotated by one place.
    identity = (order == torch.arange(rows * columns, device=order.device)).all(1, keepdim=True)
    order = torch.where(identity, order.roll(1, 1), order).to(images.device)
    blocks = blocks.gather(1, order[:, :, None, None, None].expand_as(blocks))
    blocks = blocks.reshape(b, rows, columns, c, height // rows, width // columns).permute(0, 3, 1, 4, 2, 5)
    return blocks.reshape(b, c, height, width)


def exchange_halves(images: Tensor, stacked: Tensor) -> Tensor:
    """Exchange the two things of pairs exactly; ``stacked`` (B,) bool."""
    half = images.shape[-1] // 2
    return torch.where(stacked[:, None, None, None], images.roll(half, 2), images.roll(half, 3))


def box_blur(images: Tensor, width: int) -> Tensor:
    """Average over squares of ``width`` pixels (odd); the border is repeated."""
    half = width // 2
    return F.avg_pool2d(F.pad(images, (half,) * 4, mode="replicate"), width, stride=1)


def _box(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    widths = (5, 7, 9, 13, 17)
    return torch.cat([box_blur(part, w) for part, w in zip(x.chunk(len(widths)), widths, strict=False)])


def _gaussian(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return gaussian_blur(x, x.shape[-1] / 128 * (1.2 + 5 * strength))


def _sharpen(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    edges = x - gaussian_blur(x, torch.full_like(strength, x.shape[-1] / 64))
    return (x + (1.5 + 4 * strength)[:, None, None, None] * edges).clamp(-1, 1)


def _coarse(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    small = F.interpolate(x, scale_factor=0.25, mode="area")
    return F.interpolate(small, size=x.shape[2:], mode="bilinear")


def _noise(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x.device)
    return (x + (0.1 + 0.5 * strength)[:, None, None, None] * noise).clamp(-1, 1)


def _jpeg(x: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    return (jpeg(x / 2 + 0.5, 25 * 0.1**strength) * 2 - 1).clamp(-1, 1)


# Shares of a batch, in order: most of it is blur, which few-step samplers, caches and low resolutions bring.
_KINDS: tuple[tuple[Kind, float], ...] = (
    (_box, 0.35),
    (_gaussian, 0.3),
    (_coarse, 0.1),
    (_sharpen, 0.15),
    (_noise, 0.05),
    (_jpeg, 0.05),
)


def degrade(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, coarsen, sharpen, or add noise or JPEG blocks to pictures, each kind to its share of the batch."""
    strength = torch.rand(len(images), generator=generator, device=generator.device).to(images.device)
    bounds = [0]
    for _, share in _KINDS:
        bounds.append(bounds[-1] + share)
    cuts = [round(bound * len(images)) for bound in bounds]
    parts = [
        kind(images[start:stop], strength[start:stop], generator)
        for (kind, _), start, stop in zip(_KINDS, cuts, cuts[1:], strict=False)
        if stop > start
    ]
    return torch.cat([images[:0], *parts])


def severity(images: Tensor, damaged: Tensor) -> Tensor:
    """Return the error relative to the picture's contrast, root mean square over root mean square, (B,)."""
    error = (damaged - images).square().mean((1, 2, 3))
    contrast = (images - images.mean((1, 2, 3), keepdim=True)).square().mean((1, 2, 3))
    return (error / contrast.clamp_min(1e-6)).sqrt()
