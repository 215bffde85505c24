"""Families of pictures for measurement, unseen in training: they share only the colours with the training families."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.features.canvas import Draw, Family, flat, noise, over, palette, ramp, soft


def rosette(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw spirals and petals around a point."""
    arms, twist, rings = d.integer(9).float() + 2, d.uniform(-6, 6), d.uniform(0, 8)
    x, y = d.turned(d.uniform(0, 6.3), shift=0.4)
    r = (x * x + y * y).sqrt()
    phase = arms[:, None, None] * torch.atan2(y, x) + twist[:, None, None] * r + torch.sin(rings[:, None, None] * r)
    return ramp(0.5 + 0.5 * torch.sin(phase), palette(d, 4)), []


def arcs(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw quarter circles in tiles of random orientation (Truchet)."""
    cells, width = 2 ** (d.integer(3) + 1), d.uniform(0.06, 0.2)
    u, v = ((p + 1) / 2 * cells[:, None, None] for p in d.grid)
    index = (v.floor().clamp(0, 7) * 8 + u.floor().clamp(0, 7)).long()
    flip = (d.uniform(0, 1, 64) < 0.5).float().gather(1, index.flatten(1)).view_as(u)
    a, b = u % 1, v % 1
    a = torch.where(flip > 0, 1 - a, a)
    near, far = (a * a + b * b).sqrt(), ((1 - a) ** 2 + (1 - b) ** 2).sqrt()
    distance = torch.minimum((near - 0.5).abs(), (far - 0.5).abs())
    mask = soft((width[:, None, None] - distance) * d.size / cells[:, None, None])
    colours = palette(d, 3)
    return over(flat(colours[:, 0], d), ramp(v / cells[:, None, None], colours[:, 1:]), mask), []


def tartan(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw woven bands: two crossed step sequences with a fine twill."""
    bands = 12
    colours, k = palette(d, 4), (d.integer(3) + 1)[:, None, None]
    sett = d.integer(4, bands).float()
    x, y = d.turned(d.chance(0.4) * d.uniform(0, math.pi))
    layers = []
    for axis in (x, y):
        place = ((axis + 3) * bands * k / 4).long() % bands
        layers.append(ramp(sett.gather(1, place.flatten(1)).view_as(axis) / 3, colours))
    twill = (((x - y) * d.size / 6).floor() % 2)[:, None]
    return layers[0] * (0.35 + 0.3 * twill) + layers[1] * (0.65 - 0.3 * twill), []


def ridges(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw ridged fields: folded noise with creases, lit from one side."""
    field = noise(d, d.uniform(2, 3.5))
    fine = noise(d, d.uniform(1.5, 2.5))
    height = 1 - field.abs() + 0.2 * fine.abs()
    light = F.pad(height[:, :, 1:] - height[:, :, :-1], (0, 1)) * d.uniform(-4, 4)[:, None, None]
    return ramp((height + light).clamp(0, 1.4) / 1.4, palette(d, 4)), []


def creatures(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw mirrored random bit patterns of 8 by 8 cells on a plain ground, like sprites of old games."""
    bits = (d.uniform(0, 1, 8, 4) < 0.5).long() * (1 + d.integer(3, 8, 4))
    bits = torch.cat([bits, bits.flip(2)], 2)
    bits = F.pad(bits, (1, 1, 1, 1))
    colours = palette(d, 4)
    colours = torch.cat([torch.where(d.chance(0.5)[:, None, None] > 0, 1.0, colours[:, :1]), colours[:, 1:]], 1)
    small = colours.gather(1, bits.flatten(1)[:, :, None].expand(-1, -1, 3)).view(d.n, 10, 10, 3).permute(0, 3, 1, 2)
    return F.interpolate(small, size=(d.size, d.size), mode="nearest"), []


HELD_OUT: dict[str, Family] = {
    "rosette": rosette,
    "arcs": arcs,
    "tartan": tartan,
    "ridges": ridges,
    "creatures": creatures,
}
