"""A world of which everything is known: a dot on a ring-shaped board that an action moves by one pixel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOVES = torch.tensor([[0, -1], [0, 1], [-1, 0], [1, 0], [0, 0]])  # left, right, up, down, none: (row, column)
SIDE = 8


def picture(place: Tensor) -> Tensor:
    """Frames ``(..., 1, 8, 8)`` in [-1, 1] of dots at ``place (..., 2)``."""
    axis = torch.arange(SIDE, dtype=torch.float32)
    away = (axis - place[..., None].float() + SIDE / 2) % SIDE - SIDE / 2  # (..., 2, 8)
    bump = (-(away**2) / 2).exp()
    return (2 * bump[..., 0, :, None] * bump[..., 1, None, :] - 1)[..., None, :, :]


def play(start: Tensor, actions: Tensor) -> Tensor:
    """Frames ``(B, T, 1, 8, 8)`` that the actions ``(B, T)`` produce from ``start (B, 2)``."""
    return picture(start[:, None] + MOVES[actions].cumsum(1))


@dataclass
class DotClips:
    """Clips of the world; an action is kept with probability 0.75."""

    length: int

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        new = torch.randint(len(MOVES), (count, self.length), generator=generator)
        change = torch.rand(count, self.length, generator=generator) < 0.25
        change[:, 0] = True
        last = torch.where(change, torch.arange(self.length), 0).cummax(1).values
        actions = new.gather(1, last)
        start = torch.randint(SIDE, (count, 2), generator=generator)
        return play(start, actions), actions


def dot_options(**changes: int | str) -> dict[str, int | str]:
    """Options of a small network for this world."""
    return {
        "in_channels": 1, "height": SIDE, "width": SIDE, "patch_size": 4, "num_layers": 3, "num_attention_heads": 2,
        "attention_head_dim": 32, "num_actions": len(MOVES), "window": 6, "modulation": "shared",
        "prediction": "sample", **changes,
    }  # fmt: skip
