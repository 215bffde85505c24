"""The embedded world model as quantization-aware training asks it, and the videos that it draws.

A sample is the frames that are noise; the frames before them, nearly clean as the sampler holds them, and the actions
are conditions. A noisy frame sees the frames before it and itself, which is what it sees when it is drawn.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.distill.next_frame.attention import LayoutAttention
from diffaccel.distill.next_frame.layouts import cached_layout
from diffaccel.eval.metrics.world_model import squared_error
from diffaccel.models.next_frame.pipeline import NextFramePipeline
from scripts.qvgen_beds.clips import Clips
from scripts.zoo.coinrun.forks import Forks
from scripts.zoo.coinrun.pool import to_unit
from scripts.zoo.coinrun.score import draw, seen_mask

KEPT = ("shared_modulation", "modulation_out")  # of the noise level and action alone: a table, not few bits
STEPS = 4  # of a frame
HORIZONS = (1, 4, 8)


class World:
    """A world model that is followed, with the clips of which it draws the last frames.

    Args:
        network: of a ``NextFramePipeline``.
        pool: of clips of ``context + 1`` frames.
        count, seed: clips that are chosen.
        context, queries: frames that are looked back at, and frames that are noise.
        batch: clips of a step.
        context_noise: level of the noise on the frames that are looked back at.
    """

    kind, guidance = "velocity", 1.0

    def __init__(
        self, network: Any, pool: Any, count: int, seed: int, *, context: int, queries: int, batch: int,
        context_noise: float,
    ) -> None:  # fmt: skip
        self.network, self.batch, self.context_noise = network, batch, context_noise
        device = pool.starts.device
        self.layout = cached_layout(context + queries, network.config.window, queries, 1, device)
        self.shape = (queries, *network.frame_shape)
        self.clips = Clips(pool, count, seed, self.shape, lambda frames: frames[:, self.layout.source[context:]])

    @property
    def groups(self) -> int:
        return self.clips.groups(self.batch)

    @property
    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind, "shape": list(self.shape), "context": self.layout.held, "noise": self.context_noise}

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``1 - sigma`` and ``sigma``, the linear path."""
        s = sigma.reshape(-1, 1, 1, 1, 1)
        return 1 - s, s

    def ask(self, network: Any, x: Tensor, sigma: Tensor, group: int, branch: str = "positive") -> Tensor:
        """Return the velocity of the noisy frames ``(B, Q, C, H, W)`` after the frames and actions of a group."""
        held, level = self.layout.held, self.context_noise
        frames, actions = self.clips.taken(group, len(x))
        frames, actions = frames[:, self.layout.source[:held]], actions[:, self.layout.source]
        draws = torch.Generator(frames.device).manual_seed(group)
        noise = torch.randn(frames.shape, generator=draws, dtype=torch.float32, device=frames.device)
        x = torch.cat([(1 - level) * frames + level * noise, x], 1)
        levels = torch.full(x.shape[:2], level, dtype=torch.float32, device=x.device)
        levels[:, held:] = sigma.to(levels)[:, None]
        attend = LayoutAttention(network, self.layout)
        return network(x, levels, actions, self.layout.source, attend)[:, held:].float()


@torch.no_grad()
def drawn_errors(pipe: NextFramePipeline, network: nn.Module, forks: Forks) -> dict[str, Tensor]:
    """Return mean squared errors ``(N, H)`` of drawn videos by horizon, on whole frames and on pixels seen before."""
    other = copy.copy(pipe)
    other.transformer = network
    frames = draw(other, forks.given, forks.given_actions, forks.actions["true"], STEPS)
    truth, rows = to_unit(forks.frames["true"]), [h - 1 for h in HORIZONS]
    whole, seen = squared_error(frames, truth), squared_error(frames, truth, seen_mask(forks))
    return {"drawn": whole[:, rows], "drawn, seen before": seen[:, rows]}
