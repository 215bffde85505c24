"""Closed outlines as approximate signed distances, positive inside."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scripts.features.canvas import Draw

OUTLINES = 8  # disc, box, triangle, hexagon, star, ring, cross, crescent


def outline(d: Draw, kind: Tensor, x: Tensor, y: Tensor, radius: Tensor, turn: Tensor) -> Tensor:
    """Compute distances (N, S, S), in half widths of a picture, to rotated outlines of ``kind`` (N,) at ``(x, y)``."""
    u, v = d.grid
    r = radius[:, None, None]
    u, v = (u - x[:, None, None]) / r, (v - y[:, None, None]) / r
    c, s = turn.cos()[:, None, None], turn.sin()[:, None, None]
    u, v = c * u + s * v, c * v - s * u
    rho, theta = (u * u + v * v).sqrt(), torch.atan2(v, u)
    disc = 1 - rho
    box = 0.85 - torch.maximum(u.abs(), v.abs())
    bars = torch.maximum(torch.minimum(0.95 - u.abs(), 0.33 - v.abs()), torch.minimum(0.33 - u.abs(), 0.95 - v.abs()))
    crescent = torch.minimum(disc, ((u - 0.5) ** 2 + (v - 0.2) ** 2).sqrt() - 0.75)
    star = 0.68 * (1 + 0.42 * torch.cos(5 * theta)) - rho
    stack = torch.stack([disc, box, _polygon(rho, theta, 3), _polygon(rho, theta, 6), star,
                         0.27 - (rho - 0.7).abs(), bars, crescent], 1)  # fmt: skip
    chosen = stack.gather(1, kind[:, None, None, None].expand(-1, 1, d.size, d.size))[:, 0]
    return chosen * r


def _polygon(rho: Tensor, theta: Tensor, sides: int) -> Tensor:
    step = 2 * math.pi / sides
    return math.cos(step / 2) - rho * torch.cos(torch.remainder(theta, step) - step / 2)
