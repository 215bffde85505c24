"""Flow matching of clips whose frames have noise levels of their own (arXiv 2506.01380, arXiv 2407.01392)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.distill.next_frame.layouts import ClipLayout, LevelLaw
from diffaccel.models.next_frame.block import Attend
from diffaccel.models.next_frame.transformer import TIME_CHANNELS, NextFrameTransformer


@dataclass(frozen=True)
class NoisyClip:
    """A batch of training sequences: ``x = (1 - sigma) x0 + sigma eps`` per frame.

    Attributes:
        x0: clean frames ``(B, S, C, H, W)``.
        eps: their noise.
        sigma: levels ``(B, S)``.
        actions: ``(B, S)``, that which produces each frame.
        weight: ``(B, S)`` of each frame in the loss.
    """

    x0: Tensor
    eps: Tensor
    sigma: Tensor
    actions: Tensor
    weight: Tensor

    @property
    def x(self) -> Tensor:
        """Noisy frames."""
        sigma = self.sigma[:, :, None, None, None]
        return (1 - sigma) * self.x0 + sigma * self.eps

    @property
    def v(self) -> Tensor:
        """Velocity that the network is to predict, ``eps - x0``."""
        return self.eps - self.x0


def noisy_clip(
    frames: Tensor,
    actions: Tensor,
    layout: ClipLayout,
    law: LevelLaw,
    generator: torch.Generator,
    part: tuple[int, int] = (0, 1),
) -> NoisyClip:
    """Draw levels and noise for clips ``(B, T, C, H, W)`` in [-1, 1] and actions ``(B, T)``, laid out as a sequence.

    Args:
        part: number of this process and of all: the clips are its part of the batch, whose noise is drawn as a whole,
            so that a batch does not depend on how many processes share it.
    """
    rank, size = part
    x0, actions = frames[:, layout.source], actions[:, layout.source]
    own = slice(rank * len(x0), (rank + 1) * len(x0))
    sigma, weight = (rows[own].to(x0.dtype) for rows in law.draw(layout, len(x0) * size, generator))
    eps = torch.randn(len(x0) * size, *x0.shape[1:], generator=generator, dtype=x0.dtype, device=x0.device)[own]
    return NoisyClip(x0, eps, sigma, actions, weight)


def forcing_loss(model: NextFrameTransformer, clip: NoisyClip, layout: ClipLayout, attend: Attend) -> Tensor:
    """Return the weighted mean over frames of ``mean |v_hat - v|^2``."""
    v = model(clip.x, clip.sigma, clip.actions, layout.source, attend)
    errors = (v.float() - clip.v.float()).square().mean((2, 3, 4))
    return (clip.weight * errors).sum() / clip.weight.sum().clamp(min=1)


def limit_frequencies(model: NextFrameTransformer, fastest: float) -> None:
    """Make the network blind to faster waves of the noise level than ``fastest`` radians per unit, while it learns too.

    The columns of the first layer that reads the waves are set to zero and get no gradient.
    """
    half = TIME_CHANNELS // 2
    weight = model.time_embedding[0].get_parameter("weight")
    exponents = torch.arange(half, dtype=torch.float64, device=weight.device) / half
    slow = (1000 * 10000.0**-exponents <= fastest).repeat(2)
    with torch.no_grad():
        weight.mul_(slow)
    weight.register_hook(lambda gradient: gradient * slow)
