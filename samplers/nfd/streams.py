"""Streams of actions to try a world model with: held ones, as players make, and ones that change at every frame."""

from __future__ import annotations

import torch

from diffaccel.errors import DiffAccelError


def held_actions(frames: int, actions: int, mean_hold: float = 10.0, seed: int = 0) -> list[int]:
    """Return actions that are drawn evenly and held for a geometric number of frames.

    The next action is the present one with the probability ``1 - 1 / mean_hold``, else another one.

    Args:
        frames: number of frames.
        actions: number of actions to draw from, two or more.
        mean_hold: mean number of frames for which an action is held; 1 changes at every frame.
        seed: of the draws.
    """
    if frames < 1:
        raise DiffAccelError(f"frames is {frames}; it must be 1 or more.")
    if mean_hold < 1:
        raise DiffAccelError(f"the mean hold is {mean_hold}; it must be 1 frame or more.")
    draw = torch.Generator("cpu").manual_seed(seed)
    changes = torch.rand(frames, generator=draw, dtype=torch.float64, device="cpu") < 1 / mean_hold
    moves = torch.randint(1, max(actions, 2), (frames,), generator=draw, dtype=torch.int64, device="cpu")
    stream = [int(moves[0]) % actions]
    for change, move in zip(changes[1:].tolist(), moves[1:].tolist(), strict=True):
        stream.append((stream[-1] + move) % actions if change else stream[-1])
    return stream
