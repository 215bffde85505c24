"""Clips of the game as quantization-aware training sees clean samples: indices into frames that lie on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scripts.zoo.coinrun.pool import to_unit

Arrange = Callable[[Tensor], Tensor]  # frames of clips (B, T, 3, H, W) to samples


class Clips:
    """A fixed choice of the clips of a pool, in the place of ``CleanSamples``, whose samples lie in memory whole.

    Args:
        pool: frames and beginnings of clips, as ``scripts.zoo.coinrun.pool.Pool`` has them.
        count: number of clips, chosen by ``seed``; all where the pool has fewer.
        shape: of a sample.
        arrange: makes samples from the frames of clips, in [-1, 1].

    Attributes:
        x0: without memory: the number of samples and their shape.
        prompts: empty ones, as many as there are samples.
    """

    kind = "given"

    def __init__(self, pool: Any, count: int, seed: int, shape: tuple[int, ...], arrange: Arrange) -> None:
        order = torch.randperm(len(pool.starts), generator=torch.Generator().manual_seed(seed))[:count]
        self.pool, self.arrange = pool, arrange
        self.starts = pool.starts[order.to(pool.starts.device)]
        self.x0 = torch.empty(len(self.starts), *shape, dtype=torch.float32, device="meta")
        self.prompts = ("",) * len(self.starts)

    @property
    def identity(self) -> str:
        """A hash of the choice and of the first clip."""
        digest = hashlib.sha256(str((self.starts.tolist(), list(self.x0.shape))).encode())
        digest.update(self.pool.clips(self.starts[:1])[0].cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def groups(self, count: int) -> int:
        """Return the number of groups of ``count`` clips."""
        return -(-len(self.prompts) // count)

    def taken(self, group: int, count: int) -> tuple[Tensor, Tensor]:
        """Return frames in [-1, 1] and actions of a group's clips; after the last clip comes the first."""
        places = torch.arange(group * count, (group + 1) * count, dtype=torch.int64, device=self.starts.device)
        frames, actions = self.pool.clips(self.starts[places % len(self.starts)])
        return to_unit(frames), actions

    def rows(self, group: int, count: int) -> Tensor:
        """Return the samples of a group of ``count`` clips."""
        return self.arrange(self.taken(group, count)[0])
