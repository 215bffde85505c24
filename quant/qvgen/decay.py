"""The side branches of a network, whose rank falls with the steps of training."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from diffaccel.quant.qvgen.layer import FakeQLinear
from diffaccel.quant.qvgen.prepare import fake_layers
from diffaccel.quant.qvgen.schedule import RankSchedule


class RankDecay:
    """Sets the gates of all side branches, and cuts their columns off where a phase ends.

    A layer too small for the rank has its largest; nothing of it fades before the others are as small.
    """

    def __init__(self, network: nn.Module, schedule: RankSchedule) -> None:
        self.schedule, self.layers = schedule, [layer for _, layer in fake_layers(network)]

    def step(self, step: int) -> bool:
        """Prepare the layers for a step, counted from 0; return whether side branches changed their shape."""
        point = self.schedule.at(step)
        larger = [layer for layer in self.layers if layer.rank > point.rank]
        if larger:
            cut(larger, point.rank)
        for layer in self.layers:
            layer.keep, layer.gate = min(point.keep, layer.rank), point.gate
        return bool(larger)


@torch.no_grad()
def cut(layers: list[FakeQLinear], rank: int) -> None:
    """Keep the first columns of side branches, in new matrices ordered by the singular values of their product."""
    by_shape: dict[tuple[int, int], list[FakeQLinear]] = defaultdict(list)
    for layer in layers:
        if rank == 0:
            layer.set_side(None, None)
        else:
            by_shape[(layer.out_features, layer.in_features)].append(layer)
    for same in by_shape.values():
        left = torch.stack([layer.side_left[:, :rank] for layer in same])  # type: ignore[index]
        right = torch.stack([layer.side_right[:rank] for layer in same])  # type: ignore[index]
        for layer, new_left, new_right in zip(same, *refactored(left, right), strict=True):
            layer.set_side(new_left, new_right)


def refactored(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``U sqrt(S)`` and ``sqrt(S) V^T`` of the products of ``(B, N, r)`` and ``(B, r, K)``, fp32.

    Both are orthogonalised first, so that the singular values are those of matrices of r rows and columns.
    """
    q_left, r_left = torch.linalg.qr(left.float())
    q_right, r_right = torch.linalg.qr(right.float().mT)
    u, values, v = torch.linalg.svd(r_left @ r_right.mT)
    root = values.sqrt().unsqueeze(-2)
    return (q_left @ u) * root, (q_right @ v.mT * root).mT
