"""Rotary positions of a token in a video: its frame, its row and its column, each on pairs of channels of its own.

A pair ``(x1, x2)`` of channels is rotated by the angle ``position / theta^(i/d)``; products of two rotated vectors
depend on differences of positions alone (arXiv 2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_pairs(head_dim: int) -> tuple[int, int, int]:
    """Return the number of channel pairs of the axes time, row and column: a quarter, and the rest in halves."""
    pairs = head_dim // 2
    space = (pairs - pairs // 4) // 2
    return pairs - 2 * space, space, space


def _axis_angles(positions: Tensor, pairs: int, theta: float) -> Tensor:
    exponents = torch.arange(pairs, dtype=positions.dtype, device=positions.device) / max(pairs, 1)
    return positions[..., None] * theta**-exponents


def time_angles(frame_ids: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Return the angles of frames ``(T,)`` as ``(T, pairs of the time axis)``."""
    return _axis_angles(frame_ids.to(dtype), axis_pairs(head_dim)[0], theta)


def space_angles(
    rows: int, columns: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the angles of a frame's tokens, row by row, as ``(rows * columns, pairs of the two axes)``."""
    _, pairs, _ = axis_pairs(head_dim)
    row = torch.arange(rows, dtype=dtype, device=device)[:, None].expand(-1, columns).reshape(-1)
    column = torch.arange(columns, dtype=dtype, device=device).repeat(rows)
    return torch.cat([_axis_angles(row, pairs, theta), _axis_angles(column, pairs, theta)], -1)


def rotation(time: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine ``(T, n, head_dim / 2)`` of the tokens of frames."""
    frames, tokens = len(time), len(space)
    angles = torch.cat([time[:, None].expand(-1, tokens, -1), space[None].expand(frames, -1, -1)], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys ``(..., head_dim)``, whose pairs are the channels ``i`` and ``i + head_dim / 2``.

    ``cos`` and ``sin`` ``(..., head_dim / 2)`` broadcast against ``x``; the products are made in their precision.
    """
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
