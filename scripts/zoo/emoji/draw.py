"""Draw scenes: recolour icons and place them on a white canvas, vectorised, on any device."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from scripts.zoo.emoji.world import HUES

CANVAS = 128  # pixels; smaller pictures are average-pooled canvases
SLOTS = 4  # maximum number of icons in a scene
_GREY = 0.25  # mean saturation below which an icon counts as grey
_SATURATION, _VALUE = 0.7, 0.75  # minimum mean saturation and value of a recoloured icon


@dataclass(frozen=True)
class Placed:
    """Up to four placed icons per scene, in pixels of the canvas."""

    icon: torch.Tensor  # (B, 4) int64, -1 in empty slots
    colour: torch.Tensor  # (B, 4) int64, -1 for the icon's own
    x: torch.Tensor  # (B, 4) float, of the centre
    y: torch.Tensor  # (B, 4)
    size: torch.Tensor  # (B, 4) side

    def __getitem__(self, index: torch.Tensor) -> Placed:
        return Placed(self.icon[index], self.colour[index], self.x[index], self.y[index], self.size[index])

    def to(self, device: torch.device | str) -> Placed:
        """Move to a device."""
        return Placed(*(getattr(self, name).to(device) for name in ("icon", "colour", "x", "y", "size")))


def pure_colours(device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the seven colour words as fully saturated RGB, (7, 3)."""
    return torch.tensor([colorsys.hsv_to_rgb(hue / 360, 1.0, 1.0) for hue in HUES], device=device)


def saturation_value(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return HSV's S and V of (B, 3, H, W) in [0, 1]; each (B, 1, H, W)."""
    value = rgb.amax(1, keepdim=True)
    return (value - rgb.amin(1, keepdim=True)) / value.clamp_min(1e-6), value


def recolour(rgba: torch.Tensor, colour: torch.Tensor) -> torch.Tensor:
    """Give icons (B, 4, H, W), straight alpha in [0, 1], the hue of ``colour`` (B,) int64; -1 leaves one unchanged.

    In HSV the hue is replaced. A power raises the means of S and V to about .7 and .75 where they are lower, so that
    the word is true of pale and of dark icons; it keeps black and white. Icons that are nearly grey get S >= .6. HSV
    to RGB at one hue with pure colour p is V (1 - S (1 - p)).
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
    recoloured = rgba.clone()
    recoloured[rows, :3] = v * (1 - s * (1 - pure))
    return recoloured


def _place(icons: torch.Tensor, x: torch.Tensor, y: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Resample premultiplied icons (B, 4, h, h) to their place on the canvas: (B, 4, 128, 128)."""
    scale = CANVAS / size
    zero = torch.zeros_like(scale)
    shift_x, shift_y = (scale * (1 - 2 * centre / CANVAS) for centre in (x, y))
    theta = torch.stack(
        [torch.stack([scale, zero, shift_x], 1), torch.stack([zero, scale, shift_y], 1)], 1
    )  # (B, 2, 3): from a pixel of the canvas to its place in the icon
    grid = F.affine_grid(theta, [len(icons), 4, CANVAS, CANVAS], align_corners=False)
    return F.grid_sample(icons, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def compose(icons: torch.Tensor, placed: Placed) -> torch.Tensor:
    """Draw scenes, (B, 3, 128, 128) in [0, 1] on white; ``icons`` is the world's (N, 128, 128, 4) uint8."""
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
