"""Frames of many games in memory, made from seeds, and clips of them.

Chunk ``c`` of a pool is a function of ``(seed, c)`` alone, whatever the number of threads, so that a run that is
resumed on another machine learns from the same frames.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from scripts.zoo.coinrun.policy import HoldPolicy
from scripts.zoo.coinrun.simulator import NULL_ACTION, SIZE, CoinRun

TRAINING_LEVELS = (0, 1_000_000)  # first and number
VALIDATION_LEVELS = (1_000_000, 1_000_000)
_SKIPPED = 3  # first frames of a chunk, in which all games stand at the start of a level


@dataclass(frozen=True)
class PoolSize:
    """How many frames are made: ``chunks`` times ``games`` times ``steps``."""

    chunks: int
    games: int = 64
    steps: int = 512

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.chunks * self.games * self.steps


@dataclass(frozen=True)
class Recording:
    """Games played side by side: frame ``(g, s)`` was produced by action ``(g, s)``.

    Attributes:
        frames: ``(games, steps, 64, 64, 3)`` uint8.
        actions: ``(games, steps)`` uint8; ``NULL_ACTION`` for the first frame of an episode.
        first: ``(games, steps)`` bool, where an episode begins.
        levels: ``(games, steps)`` int32.
    """

    frames: np.ndarray
    actions: np.ndarray
    first: np.ndarray
    levels: np.ndarray


def record(folder: Path, levels: tuple[int, int], seed: int, games: int, steps: int) -> Recording:
    """Play ``games`` games for ``steps`` frames."""
    game = CoinRun(folder, games, seed % 2**31, levels)
    policy = HoldPolicy(games, np.random.default_rng(seed))
    recording = Recording(
        np.empty((games, steps, SIZE, SIZE, 3), np.uint8), np.empty((games, steps), np.uint8),
        np.empty((games, steps), bool), np.empty((games, steps), np.int32),
    )  # fmt: skip
    try:
        for step in range(-_SKIPPED, steps):
            actions = policy()
            game.step(actions)
            if step >= 0:
                first = game.first.astype(bool)
                recording.frames[:, step], recording.first[:, step] = game.frames, first
                recording.actions[:, step] = np.where(first, NULL_ACTION, actions)
                recording.levels[:, step] = game.level
    finally:
        game.close()
    return recording


def clip_starts(first: Tensor, length: int) -> Tensor:
    """Return the flat indices ``(M,)`` int64 of frames from which ``length`` frames of one episode follow.

    Args:
        first: ``(rows, steps)`` bool, where an episode begins; a clip may begin there, and nowhere go over it.
    """
    steps = first.shape[1]
    if length > steps:
        return torch.empty(0, dtype=torch.int64, device=first.device)
    begun = torch.nn.functional.pad(first.to(torch.int32).cumsum(1), (1, 0))  # episodes begun before a frame
    inside = begun[:, length:] - begun[:, 1 : steps - length + 2] == 0
    row, step = inside.nonzero(as_tuple=True)
    return row * steps + step


class Pool:
    """All frames of a pool on one device as uint8, with every clip of ``length`` frames that they hold.

    Args:
        folder: of ``fetch``.
        levels: first level and number of levels.
        seed: of all of it.
        length: frames of a clip.
        threads: that draw frames; the number of cores by default.
    """

    def __init__(
        self,
        folder: Path,
        size: PoolSize,
        levels: tuple[int, int],
        seed: int,
        length: int,
        device: torch.device | str,
        threads: int | None = None,
    ) -> None:
        rows = size.chunks * size.games
        self.length = length
        self.frames = torch.empty(rows * size.steps, SIZE, SIZE, 3, dtype=torch.uint8, device=device)
        self.actions = torch.empty(rows * size.steps, dtype=torch.int64, device=device)
        first = torch.empty(rows, size.steps, dtype=torch.bool, device=device)
        record(folder, levels, seed, 1, 1)  # the library sets itself up, once and alone

        def fill(chunk: int) -> None:
            recording = record(folder, levels, seed * 100_003 + chunk, size.games, size.steps)
            part = slice(chunk * size.games * size.steps, (chunk + 1) * size.games * size.steps)
            self.frames[part].copy_(torch.from_numpy(recording.frames).flatten(0, 1))
            self.actions[part].copy_(torch.from_numpy(recording.actions).flatten())
            first[chunk * size.games : (chunk + 1) * size.games].copy_(torch.from_numpy(recording.first))

        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as workers:
            list(workers.map(fill, range(size.chunks)))
        self.starts = clip_starts(first, length)
        if not len(self.starts):
            raise DiffAccelError(f"No clip of {length} frames in {size.frames} frames; make more of them.")

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw clips: frames ``(count, length, 3, 64, 64)`` uint8 and actions ``(count, length)`` int64."""
        chosen = torch.randint(len(self.starts), (count,), generator=generator, device=generator.device)
        return self.clips(self.starts[chosen])

    def clips(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clips that begin at these flat indices."""
        index = starts[:, None] + torch.arange(self.length, dtype=torch.int64, device=starts.device)
        return self.frames[index].permute(0, 1, 4, 2, 3), self.actions[index]


def to_unit(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uint8 frames as values in [-1, 1]."""
    return frames.to(dtype) / 127.5 - 1


def to_bytes(frames: Tensor) -> Tensor:
    """Return frames in [-1, 1] as uint8, clamped and rounded."""
    return ((frames.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
