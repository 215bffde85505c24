"""Families of pictures filled with one pattern: textures, tilings and gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scripts.features.canvas import Draw, flat, noise, over, palette, ramp, soft, turn


def spectrum(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw Gaussian fields of power spectrum f^-a, stretched along one direction, in a gradient of colours."""
    slope, stretch, angle = d.uniform(0.3, 4.5), d.uniform(0.0, 2.0), d.uniform(0, math.pi)
    contrast = d.uniform(0.1, 0.45)
    t = 0.5 + contrast[:, None, None] * noise(d, slope, stretch, angle)
    return ramp(t, palette(d, 3)), [slope / 4.5, stretch / 2, *turn(angle), contrast * 2]


def gratings(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw the sum of one to three sinusoids."""
    total, norm = torch.zeros(d.n, d.size, d.size, device=d.device), torch.zeros(d.n, device=d.device)
    factors: list[Tensor] = []
    for i in range(3):
        frequency, angle = d.log_uniform(1.5, 28), d.uniform(0, math.pi)
        weight = torch.ones(d.n, device=d.device) if i == 0 else d.chance(0.5) * d.uniform(0.3, 1)
        x, _ = d.turned(angle)
        total += weight[:, None, None] * torch.sin(
            math.pi * frequency[:, None, None] * x + d.uniform(0, 6.3)[:, None, None]
        )
        norm += weight
        if i == 0:
            factors = [(frequency / 1.5).log() / math.log(28 / 1.5), *turn(angle)]
    return ramp(0.5 + 0.5 * total / norm[:, None, None], palette(d, 3)), [*factors, (norm - 1) / 2]


def checker(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw rotated checkerboards, some bent."""
    cells, angle, bend = d.log_uniform(2, 16), d.uniform(0, math.pi), d.chance(0.4) * d.uniform(0, 0.25)
    x, y = d.turned(angle)
    x = x + bend[:, None, None] * noise(d, d.uniform(3, 4.5))
    width = 5 * cells[:, None, None] / d.size
    k = cells[:, None, None] * math.pi / 2
    t = soft(torch.sin(k * x) / width) - soft(torch.sin(k * y) / width)
    return ramp(t * t, palette(d, 2)), [(cells / 2).log() / math.log(8), *turn(2 * angle), bend * 4]


def bricks(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw rows of bricks with joints; bricks differ slightly in colour."""
    rows, aspect, joint = d.log_uniform(3, 16), d.uniform(1, 3), d.uniform(0.05, 0.25)
    x, y = d.turned(d.chance(0.5) * math.pi / 2)
    v = (y + 2) * rows[:, None, None] / 2
    u = (x + 2) * (rows / aspect)[:, None, None] / 2 + 0.5 * (v.floor() % 2)
    fu, fv = (u % 1 - 0.5).abs() * aspect[:, None, None], (v % 1 - 0.5).abs()
    edge = torch.minimum(aspect[:, None, None] / 2 - fu, 0.5 - fv)
    inside = soft((edge - joint[:, None, None] / 2) * d.size / rows[:, None, None] * 2)
    shade = torch.frac(torch.sin(u.floor() * 12.9 + v.floor() * 78.2) * 43.7).abs()
    colours = palette(d, 3)
    brick = ramp(shade, colours[:, :2])
    return over(flat(colours[:, 2], d), brick, inside), [(rows / 3).log() / 1.7, aspect / 3, joint * 4]


def gradient(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw linear, radial or conic gradients of colours."""
    kind, angle, bends = d.integer(3), d.uniform(0, math.pi), d.uniform(0.4, 1.6)
    x, y = d.turned(angle, shift=0.5)
    linear, radial, conic = 0.5 + x / 2.8, (x * x + y * y).sqrt() / 1.8, torch.atan2(y, x).abs() / math.pi
    t = torch.stack([linear, radial, conic], 1).gather(1, kind[:, None, None, None].expand(-1, 1, d.size, d.size))[:, 0]
    t = t.clamp(0, 1) ** bends[:, None, None]
    return ramp(t, palette(d, 4)), [(kind == k).float() for k in range(3)] + [*turn(angle), bends / 1.6]


def cells(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw Voronoi cells of 4 to 40 points, with or without borders."""
    most = 40
    points = d.uniform(-1, 1, most, 2)
    count = d.uniform(4, most)
    used = torch.arange(most, device=d.device) < count[:, None]
    u, v = d.grid
    distance = (u[:, None] - points[:, :, 0, None, None]) ** 2 + (v[:, None] - points[:, :, 1, None, None]) ** 2
    near = torch.where(used[:, :, None, None], distance, 99.0).topk(2, dim=1, largest=False)
    first, second = near.values.sqrt().unbind(1)
    border = d.chance(0.5) * d.uniform(0.01, 0.05)
    colours = palette(d, 5)
    choice = near.indices[:, 0] % 4
    picture = ramp(choice / 3, colours[:, :4])
    inside = soft((second - first - border[:, None, None]) * d.size / 3)
    return over(flat(colours[:, 4], d), picture, inside), [count / most, border * 20]


def waves(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw stripes bent by a smooth field, from soft to hard edges."""
    frequency, bend, hard = d.log_uniform(2, 20), d.uniform(0.02, 0.4), d.log_uniform(0.5, 12)
    angle = d.uniform(0, math.pi)
    x, _ = d.turned(angle)
    x = x + bend[:, None, None] * noise(d, d.uniform(3, 5))
    t = soft(hard[:, None, None] * torch.sin(math.pi * frequency[:, None, None] * x))
    return ramp(t, palette(d, 3)), [(frequency / 2).log() / math.log(10), bend * 2.5, hard / 12, *turn(angle)]


def dots(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw a lattice of dots whose size follows a smooth field."""
    cells, angle, size, spread = (
        d.log_uniform(3, 20),
        d.uniform(0, math.pi / 2),
        d.uniform(0.15, 0.45),
        d.uniform(0, 0.5),
    )
    x, y = d.turned(angle)
    fx, fy = ((p * cells[:, None, None] / 2 + 10) % 1 - 0.5 for p in (x, y))
    radius = size[:, None, None] * (1 + spread[:, None, None] * noise(d, d.uniform(3.5, 5)))
    mask = soft((radius - (fx * fx + fy * fy).sqrt()) * 2 * d.size / cells[:, None, None] / 2)
    colours = palette(d, 3)
    return over(flat(colours[:, 0], d), ramp(0.5 + y / 2, colours[:, 1:]), mask), [
        (cells / 3).log() / math.log(7), *turn(2 * angle), size * 2, spread * 2,
    ]  # fmt: skip
