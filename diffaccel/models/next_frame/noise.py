"""Noise of a frame as a function of its number alone, so that no batching, draft or cache changes it."""

from __future__ import annotations

import torch
from torch import Tensor

CONTEXT = -1  # the step whose noise is mixed into a frame that others look back at
_BITS = (1 << 64) - 1


def _mixed(state: int, value: int) -> int:
    """Return 64 bits that depend on every bit of both numbers (the finalizer of splitmix64)."""
    z = (state * 0x9E3779B97F4A7C15 + (value & _BITS) + 0x9E3779B97F4A7C15) & _BITS
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _BITS
    return z ^ (z >> 31)


def noise_seed(seed: int, frame: int, step: int) -> int:
    """Return the generator's seed for one frame of one video at one step."""
    return _mixed(_mixed(_mixed(0, seed), frame), step) >> 1  # torch takes 63 bits


class FrameNoise:
    """Draws ``e(frame, step)`` of each row's video on one device.

    Numbers are drawn in float32 for every dtype, since a generator has other numbers in double precision.

    Args:
        seeds: one for each row of the batch.
        device: on which noise is drawn; another kind of device has other numbers.
    """

    def __init__(self, seeds: tuple[int, ...], device: torch.device) -> None:
        self.seeds = seeds
        self._generator = torch.Generator(device)

    def fill(self, target: Tensor, frame: int, step: int) -> None:
        """Fill ``target`` ``(B, C, H, W)`` with the noise of one frame at one step."""
        single = target if target.dtype == torch.float32 else torch.empty_like(target, dtype=torch.float32)
        for row, seed in enumerate(self.seeds):
            single[row].normal_(generator=self._generator.manual_seed(noise_seed(seed, frame, step)))
        if single is not target:
            target.copy_(single)
