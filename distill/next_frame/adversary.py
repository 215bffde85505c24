"""The adversarial term of distillation (arXiv 2506.01380): a frozen network's features, with heads that learn.

Real and generated frames are noised again and shown to the frozen teacher; a head on the tokens of every third layer
says which are real, trained by the hinge loss. Heads and student learn in one step: the student's term holds the heads,
the heads' term holds the frames.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.models.next_frame.block import Attend
from diffaccel.models.next_frame.transformer import NextFrameTransformer


class FeatureHeads(nn.Module):
    """One judgement a token from the tokens of some layers.

    Args:
        dim: channels of a token.
        layers: numbers of the layers whose output is judged.
    """

    def __init__(self, dim: int, layers: Sequence[int]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1)) for _ in self.layers
        )

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return the mean judgement ``(B, S)`` of every frame from tokens ``(B, S, n, d)`` of each layer."""
        return torch.stack([head(x)[..., 0].mean(-1) for head, x in zip(self.heads, features, strict=True)]).mean(0)


def every_third(layers: int) -> tuple[int, ...]:
    """Return the numbers of every third layer, the last one included."""
    return tuple(reversed(range(layers - 1, -1, -3)))


def features(
    teacher: NextFrameTransformer,
    layers: Sequence[int],
    x: Tensor,
    sigma: Tensor,
    actions: Tensor,
    frame_ids: Tensor,
    attend: Attend,
) -> list[Tensor]:
    """Return the output ``(B, S, n, d)`` of these layers; gradients reach ``x``."""
    outputs: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            outputs[number] = output.float()

        return hook

    handles = [teacher.transformer_blocks[n].register_forward_hook(keep(n)) for n in layers]
    try:
        teacher(x, sigma, actions, frame_ids, attend)
    finally:
        for handle in handles:
            handle.remove()
    return [outputs[n] for n in layers]


def hinge(real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Return the judges' loss: the mean of ``relu(1 - real) + relu(1 + fake)`` over frames of weight ``share (S,)``."""
    rows = (torch.relu(1 - real) + torch.relu(1 + fake)) * share
    return rows.sum() / (len(rows) * share.sum().clamp(min=1))


def persuasion(fake: Tensor, share: Tensor) -> Tensor:
    """Return the student's loss: the mean of ``-fake``."""
    return -(fake * share).sum() / (len(fake) * share.sum().clamp(min=1))


def frozen_heads(heads: FeatureHeads, judged: Sequence[Tensor]) -> Tensor:
    """Return the heads' judgement with gradients to the features alone."""
    held = {name: p.detach() for name, p in heads.named_parameters()}
    judgement: Tensor = torch.func.functional_call(heads, held, (list(judged),))
    return judgement
