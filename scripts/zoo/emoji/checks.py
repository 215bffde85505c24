"""Ground truth that needs no network: colour words, counts and order, read off the pixels.

Pictures are (B, 3, s, s) in [-1, 1] on white, as the scenes and a pipeline's ``output_type="pt"`` times 2 minus 1
give them. These checks serve as rewards and as evaluation; a learned score cannot game them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji.draw import pure_colours, saturation_value

_CELLS = 32  # the grid on which connected parts are counted
_INK = 0.1  # mean darkness of a cell that is not background
_SMALLEST = 8  # cells


def _unit(images: torch.Tensor) -> torch.Tensor:
    if images.dim() != 4 or images.shape[1] != 3:
        raise DiffAccelError(f"Pictures must be (B, 3, height, width) in [-1, 1], got {tuple(images.shape)}.")
    return (images.float() / 2 + 0.5).clamp(0, 1)


def hue(images: torch.Tensor) -> torch.Tensor:
    """The dominant hue in degrees (B,): circular mean over pixels, weighted by saturation times value."""
    rgb = _unit(images)
    s, v = saturation_value(rgb)
    r, g, b = rgb.unbind(1)
    # The hue as an angle in the plane across the grey axis: smooth, and the same as HSV's for the six pure colours.
    angle = torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b)
    weight = (s * v).squeeze(1)
    y, x = (angle.sin() * weight).sum((1, 2)), (angle.cos() * weight).sum((1, 2))
    return torch.rad2deg(torch.atan2(y, x)) % 360


def _reference_hues(device: torch.device) -> torch.Tensor:
    """What ``hue`` gives for the seven pure colours: it differs by up to a degree from HSV's number."""
    return hue(pure_colours(device)[:, :, None, None] * 2 - 1)


def colour(images: torch.Tensor) -> torch.Tensor:
    """The index of the nearest of the seven colour words (B,)."""
    distance = (hue(images)[:, None] - _reference_hues(images.device) + 180) % 360 - 180
    return distance.abs().argmin(1)


def ink(images: torch.Tensor) -> torch.Tensor:
    """Which cells of a 32 x 32 grid are not background: (B, 32, 32) bool."""
    darkness = 1 - _unit(images).amin(1, keepdim=True)
    return F.adaptive_avg_pool2d(darkness, _CELLS).squeeze(1) > _INK


def count(images: torch.Tensor) -> torch.Tensor:
    """How many separate things there are (B,): 4-connected parts of at least 8 cells."""
    return parts(ink(images), _SMALLEST)


def parts(mask: torch.Tensor, smallest: int) -> torch.Tensor:
    """The number of 4-connected parts of at least ``smallest`` cells in (B, h, w) bool masks: (B,) int64."""
    cells = mask[0].numel()
    name = torch.arange(1, cells + 1, device=mask.device, dtype=torch.float32).view(1, *mask.shape[1:]) * mask
    while True:  # the largest name floods its part; that takes at most as many rounds as the part has cells
        grown = torch.maximum(
            F.max_pool2d(name[:, None], (3, 1), 1, (1, 0)), F.max_pool2d(name[:, None], (1, 3), 1, (0, 1))
        )
        grown = grown[:, 0] * mask
        if torch.equal(grown, name):
            break
        name = grown
    sizes = torch.zeros(len(mask), cells + 1, device=mask.device)
    sizes.scatter_add_(1, name.flatten(1).long(), torch.ones_like(name).flatten(1))
    return (sizes[:, 1:] >= smallest).sum(1)


def halves(images: torch.Tensor, *, stacked: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The left and right (or upper and lower) half of each picture."""
    first, second = images.chunk(2, dim=2 if stacked else 3)
    return first, second


def colours_in_order(images: torch.Tensor, *, stacked: bool = False) -> torch.Tensor:
    """The colour word of each half (B, 2): who stands left (above) in a pair of two colours."""
    return torch.stack([colour(half) for half in halves(images, stacked=stacked)], 1)
