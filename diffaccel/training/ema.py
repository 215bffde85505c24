"""Averages of weights over a training run."""

from __future__ import annotations

import torch
from torch import nn

from diffaccel.training.shards import local


class EMA:
    """Exponential moving average of parameters in fp32, with decay min(decay, (1 + n) / (10 + n)) at update n.

    As a context manager, it puts the averages in place of the live values inside the block. Of weights that are shared
    out among processes, each averages its own part.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.live = [p for p in module.parameters() if p.requires_grad]
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        self.shadow = [local(p.detach()).float().clone() for p in self.live]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the live values."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self.shadow, [local(p.detach()) for p in self.live], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange live and averaged values; a second call restores them."""
        for live, shadow in zip(self.live, self.shadow, strict=True):
            part = local(live.detach())
            before = part.clone()
            part.copy_(shadow)
            shadow.copy_(before)

    def __enter__(self) -> EMA:
        self.swap()
        return self

    def __exit__(self, *_: object) -> None:
        self.swap()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self.names, self.shadow, strict=True))
