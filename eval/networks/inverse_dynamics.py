"""A network that reads the action off a video: which action produced a frame, from it and the frames before.

Trained on real clips, it judges generated ones: a frame that shows what its action does is recognised. Its features are
also a space for distances between sets of clips.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError

CONTEXT = 3  # frames that are looked at: the produced one and two before it


class InverseDynamics(nn.Module):
    """Convolutions over consecutive frames, stacked in channels, and a linear layer to the actions.

    Args:
        num_actions: number of actions.
        channels: of a frame.
        width: channels of the first layer; the three after it have two, four and four times as many.
    """

    def __init__(self, num_actions: int, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        sizes = (CONTEXT * channels, width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for inner, outer in pairwise(sizes):
            layers += [nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
            layers += [nn.Conv2d(outer, outer, 3, padding=1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(16 * width, 256), nn.SiLU())
        self.head = nn.Linear(256, num_actions)

    def features(self, clips: Tensor) -> Tensor:
        """Return ``(B, T - 2, 256)`` of the frames from the third on of clips ``(B, T, C, H, W)`` in [-1, 1]."""
        if clips.ndim != 5 or clips.shape[1] < CONTEXT:
            raise DiffAccelError(
                f"clips have the shape {tuple(clips.shape)}; give (B, T, C, H, W) with {CONTEXT} frames or more."
            )
        count = clips.shape[1] - CONTEXT + 1
        stacked = torch.cat([clips[:, i : i + count] for i in range(CONTEXT)], 2)
        features: Tensor = self.hidden(self.body(stacked.flatten(0, 1)))
        return features.unflatten(0, (len(clips), count))

    def forward(self, clips: Tensor) -> Tensor:
        """Return the logits ``(B, T - 2, actions)`` of the action that produced each frame from the third on."""
        logits: Tensor = self.head(self.features(clips))
        return logits


def action_accuracy(network: InverseDynamics, clips: Tensor, actions: Tensor, batch: int = 64) -> float:
    """Return the share of frames, from the third on, whose action ``(B, T)`` the network reads right.

    Frames whose action it has no name for ("no action") are left out.
    """
    right = count = 0
    with torch.no_grad():
        for part, taken in zip(clips.split(batch), actions[:, CONTEXT - 1 :].split(batch), strict=True):
            known = taken < network.head.out_features
            right += int(((network(part).argmax(-1) == taken) & known).sum())
            count += int(known.sum())
    return right / max(count, 1)
