"""Views of training pictures (B, 3, s, s) in [-1, 1]: small changes that keep the caption, close-ups for the style."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from scripts.zoo.emoji.recipe import ClipRecipe


def augment(images: torch.Tensor, clip: ClipRecipe, generator: torch.Generator) -> torch.Tensor:
    """Rotate, scale and move each picture a little on white, make it paler or stronger, and add a little noise.

    The world has three drawings of a thing, and features must generalise to a fourth. A quarter of the pictures get the
    noise only, since the model is used on unchanged pictures.
    """
    count, size, device = len(images), images.shape[-1], images.device
    u = torch.rand(6, count, generator=generator, device=generator.device).to(device)
    amount = (u[5] < 0.75) * (2 * u[:5] - 1)  # in [-1, 1], and 0 where the picture stays
    angle, scale = amount[0] * math.radians(clip.turn), clip.zoom ** amount[1]
    shift = amount[2:4] * 2 * clip.shift / size
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[0]], 1), torch.stack([sin, cos, shift[1]], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    ink = F.grid_sample(1 - images, grid, align_corners=False)  # white is 0, also beyond the border
    noise = torch.randn(images.shape, generator=generator, device=generator.device).to(device)
    ink = (ink * (1 + clip.fade * amount[4])[:, None, None, None]).clamp(0, 2)
    return 1 - ink + 0.02 * noise


def close_up(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Cut out a square of 0.4 to 1 of each side, of a third of them the whole, and mirror half of them.

    A style is in lines, shades and palette. Whole icons are learned by heart with their styles, and an icon in a style
    in which it was never seen is then not recognised; a part of one has to be looked at.
    """
    if not len(images):
        return images
    u = torch.rand(5, len(images), generator=generator, device=generator.device).to(images.device)
    side = torch.where(u[0] < 1 / 3, 1.0, 0.4 + 0.6 * u[1])
    x, y = (2 * u[2:4] - 1) * (1 - side)
    zero, mirrored = torch.zeros_like(side), torch.where(u[4] < 0.5, -side, side)
    theta = torch.stack([torch.stack([mirrored, zero, x], 1), torch.stack([zero, side, y], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")
