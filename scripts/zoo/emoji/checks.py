"""Checks of colour words, counts and order on the pixels, without a network.

Pictures are (B, 3, s, s) in [-1, 1] on white: those of scenes, or 2 x - 1 of a pipeline's ``output_type="pt"``. The
checks serve as rewards and for evaluation, where no learned score can be exploited.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji.draw import pure_colours, saturation_value

_CELLS = 32  # the grid on which connected parts are counted
_INK = 0.1  # mean darkness of a cell that is not background
_SMALLEST = 8  # cells of a part that counts


def _unit(images: torch.Tensor) -> torch.Tensor:
    if images.dim() != 4 or images.shape[1] != 3:
        raise DiffAccelError(f"Pictures must be (B, 3, height, width) in [-1, 1], got {tuple(images.shape)}.")
    return (images.float() / 2 + 0.5).clamp(0, 1)


def hue(images: torch.Tensor) -> torch.Tensor:
    """Return the dominant hue in degrees (B,): circular mean over pixels, weighted by saturation times value."""
    rgb = _unit(images)
    s, v = saturation_value(rgb)
    r, g, b = rgb.unbind(1)
    # The angle in the plane across the grey axis: smooth, and equal to HSV's hue for the six pure colours.
    angle = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
    weight = (s * v).squeeze(1)
    y, x = (angle.sin() * weight).sum((1, 2)), (angle.cos() * weight).sum((1, 2))
    return torch.rad2deg(torch.atan2(y, x)) % 360


def _reference_hues(device: torch.device) -> torch.Tensor:
    """Return :func:`hue` of the seven pure colours, which differs by up to a degree from HSV's."""
    return hue(pure_colours(device)[:, :, None, None] * 2 - 1)


def colour(images: torch.Tensor) -> torch.Tensor:
    """Return the index of the nearest of the seven colour words (B,)."""
    distance = (hue(images)[:, None] - _reference_hues(images.device) + 180) % 360 - 180
    return distance.abs().argmin(1)


def ink(images: torch.Tensor) -> torch.Tensor:
    """Return which cells of a 32 x 32 grid are not background, (B, 32, 32) bool."""
    darkness = 1 - _unit(images).amin(1, keepdim=True)
    return F.adaptive_avg_pool2d(darkness, _CELLS).squeeze(1) > _INK


def count(images: torch.Tensor) -> torch.Tensor:
    """Count separate things (B,): 4-connected parts of at least 8 cells."""
    return parts(ink(images), _SMALLEST)


def parts(mask: torch.Tensor, smallest: int) -> torch.Tensor:
    """Count 4-connected parts of at least ``smallest`` cells in (B, h, w) bool masks: (B,) int64."""
    cells = mask[0].numel()
    label = torch.arange(1, cells + 1, device=mask.device, dtype=torch.float32).view(1, *mask.shape[1:]) * mask
    while True:  # the largest label floods its part, in at most as many rounds as the part has cells
        grown = torch.maximum(
            F.max_pool2d(label[:, None], (3, 1), 1, (1, 0)), F.max_pool2d(label[:, None], (1, 3), 1, (0, 1))
        )
        grown = grown[:, 0] * mask
        if torch.equal(grown, label):
            break
        label = grown
    sizes = torch.zeros(len(mask), cells + 1, device=mask.device)
    sizes.scatter_add_(1, label.flatten(1).long(), torch.ones_like(label).flatten(1))
    return (sizes[:, 1:] >= smallest).sum(1)


def halves(images: torch.Tensor, *, stacked: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Split each picture into its left and right (or upper and lower) half."""
    first, second = images.chunk(2, dim=2 if stacked else 3)
    return first, second


def colours_in_order(images: torch.Tensor, *, stacked: bool = False) -> torch.Tensor:
    """Return the colour word of each half (B, 2), left (or upper) half first."""
    return torch.stack([colour(half) for half in halves(images, stacked=stacked)], 1)
