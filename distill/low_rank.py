"""A generator that changes every matrix of the teacher by one of low rank, so that a student is small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffaccel.errors import DiffAccelError


class LowRankChange(nn.Module):
    """``W + up down`` with ``up (out, r)``, ``down (r, in)``; kernels of convolutions are taken as ``(out, in * k)``.

    ``up`` begins as zero and ``down`` with deviation ``r^(-1/2)``, so that a step of Adam changes ``W`` by about the
    learning rate, as it would without.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = len(weight), weight[0].numel()
        down = torch.randn(rank, columns, generator=generator, dtype=torch.float32, device="cpu") * rank**-0.5
        self.down = nn.Parameter(down.to(weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=torch.float32, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def restrict(network: nn.Module, rank: int, seed: int) -> nn.Module:
    """Let every matrix of a network learn a change of ``rank`` alone, and vectors as they are; return the network.

    Matrices with a side of ``rank`` or less learn as a whole.

    Raises:
        DiffAccelError: where no matrix is larger than the rank.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    restricted = 0
    for module in list(network.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.ndim >= 2 and min(len(weight), weight[0].numel()) > rank:
                parametrize.register_parametrization(module, name, LowRankChange(weight.detach(), rank, generator))
                module.parametrizations[name].original.requires_grad_(False)  # type: ignore[index, union-attr]
                restricted += 1
    if not restricted:
        raise DiffAccelError(
            f"rank is {rank}, but no matrix of {type(network).__name__} is larger. Take a smaller one, or 0 for any."
        )
    return network


@torch.no_grad()
def begin_as(restricted: nn.Module, network: nn.Module) -> nn.Module:
    """Let a network of :func:`restrict` begin as near to another one of its kind as its rank allows; return it.

    Changes are the leading singular directions of the difference; what learns as a whole is copied.
    """
    for key, weight in network.named_parameters():
        path, _, leaf = key.rpartition(".")
        module = restricted.get_submodule(path)
        if not parametrize.is_parametrized(module, leaf):
            getattr(module, leaf).copy_(weight)
            continue
        held: Any = module.parametrizations[leaf]  # type: ignore[index]
        change, original = held[0], held.original
        difference = (weight.float().to(original.device) - original).flatten(1)
        u, s, v = torch.linalg.svd(difference.cpu(), full_matrices=False)  # as exact on every machine
        rank, columns = change.down.shape
        size = (columns / rank) ** 0.5  # of a row of ``down``, as it begins without
        change.down.copy_(size * v[:rank])
        change.up.copy_(u[:, :rank] * s[:rank] / size)
    return restricted
