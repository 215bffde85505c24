"""The situations in which the sampler asks the network, as layouts of a training sequence, and their noise levels.

- "forcing": all frames of a clip, each with a level of its own (diffusion forcing, arXiv 2407.01392); in a share of the
  clips a prefix is nearly clean, and in a share the last frames have one level, as a draft has.
- "cached": frames as the cache holds them, nearly clean, beside the same frames as noise. A noisy frame sees the cached
  frames before its draft and the noisy ones of its draft up to itself, which is what it sees when it is sampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.mask import band

LONGEST_DRAFT = 4


@dataclass(frozen=True)
class ClipLayout:
    """Frames of a training sequence.

    Attributes:
        source: ``(S,)`` int64, the frame of the clip that each is, and its position in time.
        sees: ``(S, S)`` bool, which frame (row) sees which.
        cached: ``(S,)`` bool, frames that stand for the cache: nearly clean, without a loss.
        draft: ``(S,)`` int64, number of the draft that a noisy frame belongs to, -1 for cached ones; frames of a draft
            share a level.
        held: number of cached frames, which come first.
    """

    source: Tensor
    sees: Tensor
    cached: Tensor
    draft: Tensor
    held: int

    @property
    def clip_length(self) -> int:
        """Number of frames of the clip that the layout takes its frames from."""
        return int(self.source.max()) + 1


def forcing_layout(frames: int, window: int, device: torch.device | str = "cpu") -> ClipLayout:
    """Return the layout of a clip whose frames all have a level of their own."""
    ids = torch.arange(frames, dtype=torch.int64, device=device)
    return ClipLayout(ids, band(ids, ids, window), torch.zeros(frames, dtype=torch.bool, device=device), ids, 0)


def cached_layout(frames: int, window: int, queries: int, draft: int, device: torch.device | str = "cpu") -> ClipLayout:
    """Return the layout of ``frames - queries`` cached frames beside ``queries`` noisy ones, in drafts of ``draft``.

    The noisy frames are the last ones of the cached, shifted by one: the last has all cached frames before it.

    Raises:
        DiffAccelError: for more noisy frames than half of the sequence, or a draft that is longer than them.
    """
    held = frames - queries
    if not 1 <= queries <= held + 1 or not 1 <= draft <= queries:
        raise DiffAccelError(
            f"queries is {queries} and draft {draft} in {frames} frames; queries must be in [1, {(frames + 1) // 2}] "
            "and draft in [1, queries]."
        )
    ids = torch.arange(held, dtype=torch.int64, device=device)
    noisy = torch.arange(held - queries + 1, held + 1, dtype=torch.int64, device=device)
    number = torch.arange(queries, dtype=torch.int64, device=device) // draft
    begin = noisy[0] + number * draft  # the frame with which the draft of a noisy frame begins
    source = torch.cat([ids, noisy])
    sees = torch.zeros(frames, frames, dtype=torch.bool, device=device)
    sees[:held, :held] = band(ids, ids, window)
    sees[held:, :held] = band(noisy, ids, window) & (ids < begin[:, None])
    sees[held:, held:] = band(noisy, noisy, window) & (number[:, None] == number)
    cached = torch.arange(frames, dtype=torch.int64, device=device) < held
    return ClipLayout(source, sees, cached, torch.cat([torch.full_like(ids, -1), number]), held)


@dataclass(frozen=True, kw_only=True)
class LevelLaw:
    """How noise levels are drawn.

    A level is ``sigmoid(N(mean, deviation^2))``, moved by ``shift`` towards noise: ``shift s / (1 + (shift - 1) s)``.

    Attributes:
        context: largest level of frames that stand for the cache, drawn uniformly from 0.
        prefix: share of clips under "forcing" with a prefix of such frames.
        tail: share of clips under "forcing" whose last 1 to 4 frames have one level.
    """

    mean: float = 0.0
    deviation: float = 1.0
    shift: float = 1.0
    context: float = 0.1
    prefix: float = 0.3
    tail: float = 0.3

    def __post_init__(self) -> None:
        for option, low, high in (("context", 0, 0.5), ("prefix", 0, 1), ("tail", 0, 1)):
            if not low <= getattr(self, option) <= high:
                raise DiffAccelError(f"{option} is {getattr(self, option)}; it must be in [{low}, {high}].")
        if not (0 < self.deviation < math.inf and 0 < self.shift < math.inf and math.isfinite(self.mean)):
            raise DiffAccelError(
                f"deviation is {self.deviation}, shift {self.shift} and mean {self.mean}; all must be finite, and the "
                "first two above 0."
            )

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw levels of frames that are learnt, fp32."""
        normal = torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)
        sigma = torch.sigmoid(self.mean + self.deviation * normal)
        return self.shift * sigma / (1 + (self.shift - 1) * sigma)

    def draw(self, layout: ClipLayout, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw levels ``(batch, S)`` and weights ``(batch, S)``: 1 for frames to learn, 0 for those of the cache."""
        device, frames = generator.device, len(layout.source)
        sigma = self.noise((batch, frames), generator)
        near = self.context * torch.rand(batch, frames, generator=generator, dtype=torch.float32, device=device)
        chance = torch.rand(4, batch, 1, generator=generator, dtype=torch.float32, device=device)
        place = torch.arange(frames, dtype=torch.int64, device=device)
        if layout.held:
            sigma = sigma[:, layout.draft.clamp(min=0)]
            context = layout.cached.expand(batch, -1)
        else:
            length = 1 + (chance[2] * min(LONGEST_DRAFT, frames)).long()
            tail = (chance[1] < self.tail) & (place >= frames - length)
            sigma = torch.where(tail, sigma[:, -1:], sigma)
            end = 1 + (chance[3] * (frames - 1)).long().clamp(max=frames - 2)
            context = (chance[0] < self.prefix) & (place < end) & ~tail
        return torch.where(context, near, sigma), (~context).float()
