"""Scenes as pictures: recolour icons, place them on a white canvas. Vectorised, on any device."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scripts.zoo.emoji.world import HUES

CANVAS = 128  # pixels; every other size is an average-pooled canvas
SLOTS = 4  # icons in a scene, at most
_GREY = 0.25  # mean saturation below which an icon has too little colour to turn
_SATURATION, _VALUE = 0.7, 0.75  # mean saturation and value that a recoloured icon has at least


@dataclass(frozen=True)
class Placed:
    """Up to four icons a scene, in pixels of the canvas; ``icon`` is -1 in empty slots, ``colour`` -1 for its own."""

    icon: torch.Tensor  # (B, 4) int64
    colour: torch.Tensor  # (B, 4) int64
    x: torch.Tensor  # (B, 4) float, centre
    y: torch.Tensor  # (B, 4)
    size: torch.Tensor  # (B, 4) side

    def __getitem__(self, index: torch.Tensor) -> Placed:
        return Placed(self.icon[index], self.colour[index], self.x[index], self.y[index], self.size[index])

    def to(self, device: torch.device | str) -> Placed:
        return Placed(*(getattr(self, name).to(device) for name in ("icon", "colour", "x", "y", "size")))


def pure_colours(device: torch.device | str = "cpu") -> torch.Tensor:
    """The seven colour words as fully saturated RGB: (7, 3)."""
    return torch.tensor([colorsys.hsv_to_rgb(hue / 360, 1.0, 1.0) for hue in HUES], device=device)


def saturation_value(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """HSV's S and V of (B, 3, H, W) in [0, 1]; each (B, 1, H, W)."""
    value = rgb.amax(1, keepdim=True)
    return (value - rgb.amin(1, keepdim=True)) / value.clamp_min(1e-6), value


def recolour(rgba: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Give icons (B, 4, H, W), straight alpha in [0, 1], the hue of ``colour`` (B,) int64; -1 leaves one alone.

    In HSV the hue is replaced. S and V pass through a power that lifts their mean to about .7 and .75 where it is
    lower, so that the word is true of pale and of dark icons, with black and white kept; icons that are nearly grey
    get S >= .6. HSV to RGB at one hue with pure colour p is V (1 - S (1 - p)).
    """
    rows = (colour >= 0).nonzero().flatten()
    if not len(rows):
        return rgba
    rgb, alpha = rgba[rows, :3], rgba[rows, 3:]
    s, v = saturation_value(rgb)
    weight = alpha.sum((1, 2, 3), keepdim=True).clamp_min(1e-6)
    mean_s = (s * alpha).sum((1, 2, 3), keepdim=True) / weight
    mean_v = (v * alpha).sum((1, 2, 3), keepdim=True) / weight
    s = s ** (math.log(_SATURATION) / mean_s.clamp(0.01, _SATURATION).log())
    v = v ** (math.log(_VALUE) / mean_v.clamp(0.01, _VALUE).log())
    s = torch.where(mean_s < _GREY, s.clamp_min(0.6), s)
    pure = pure_colours(rgba.device)[colour[rows]][:, :, None, None]
    turned = rgba.clone()
    turned[rows, :3] = v * (1 - s * (1 - pure))
    return turned


def _place(icons: torch.Tensor, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Premultiplied icons (B, 4, h, h) resampled to their place on the canvas: (B, 4, 128, 128)."""
    scale = CANVAS / size
    zero = torch.zeros_like(scale)
    shift_x, shift_y = (scale * (1 - 2 * centre / CANVAS) for centre in (x, y))
    theta = torch.stack(
        [torch.stack([scale, zero, shift_x], 1), torch.stack([zero, scale, shift_y], 1)], 1
    )  # (B, 2, 3): where in the icon a pixel of the canvas looks
    grid = F.affine_grid(theta, [len(icons), 4, CANVAS, CANVAS], align_corners=False)
    return F.grid_sample(icons, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def compose(icons: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Pictures of scenes: (B, 3, 128, 128) in [0, 1] on white. ``icons`` is the world's (N, 128, 128, 4) uint8."""
    canvas = torch.ones(len(placed.icon), 3, CANVAS, CANVAS, device=icons.device)
    for slot in range(SLOTS):
        # Below 90 pixels bilinear sampling would skip pixels of the icon, so it is halved by averaging first.
        for small in (False, True):
            rows = ((placed.icon[:, slot] >= 0) & ((placed.size[:, slot] < 90) == small)).nonzero().flatten()
            if not len(rows):
                continue
            rgba = icons[placed.icon[rows, slot]].permute(0, 3, 1, 2).float() / 255
            rgba = recolour(rgba, placed.colour[rows, slot])
            rgba = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
            if small:
                rgba = F.avg_pool2d(rgba, 2)
            layer = _place(rgba, placed.x[rows, slot], placed.y[rows, slot], placed.size[rows, slot])
            canvas[rows] = layer[:, :3] + canvas[rows] * (1 - layer[:, 3:])
    return canvas.clamp(0, 1)
