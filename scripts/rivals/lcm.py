"""LCM (arXiv 2310.04378): consistency along the teacher's trajectories, begun at noised pictures.

    f(x, t) = x - t v(x, t)          x_s = x_t - (t - s) v_teacher(x_t, t)
    loss = huber(f(x_t, t) - constant(f(x_s, s)))

on a grid of levels; ``f`` is the identity at level 0. The constant is of the weights as they are (arXiv 2310.14189).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scripts.rivals.bed import Bed, Rival, Try
from scripts.zoo.fashion import unet

_HUBER = 5.4e-4  # times the root of the number of coordinates

Velocity = Callable[[Tensor, Tensor], Tensor]


def distance(network: Velocity, teacher: Velocity, x: Tensor, place: Tensor, grid: int) -> Tensor:
    """Return the mean distance between the clean estimates at neighbouring points of a trajectory.

    Args:
        x: ``(B, ...)`` states at levels ``(place + 1) / grid``.
        place: ``(B,)`` numbers below ``grid`` of the levels that the teacher's step ends at.
    """
    axes = (-1, *[1] * (x.ndim - 1))
    t, s = (place + 1).to(x.dtype) / grid, place.to(x.dtype) / grid
    level, below = t.reshape(axes), s.reshape(axes)
    with torch.no_grad():
        x_s = x - (level - below) * teacher(x, t)
        goal = torch.where(below > 0, x_s - below * network(x_s, s), x_s)
    error = (x - level * network(x, t) - goal).flatten(1)
    c = _HUBER * error.shape[1] ** 0.5
    return ((error.square().sum(1) + c * c).sqrt() - c).mean()


class LCM(Rival):
    """Consistency distillation of the teacher, from real pictures, for one call from noise."""

    name = "lcm"
    needs_teacher = True

    def build(self, bed: Bed, seed: int) -> nn.Module:
        network = unet.build(bed.fashion, seed)
        network.load_state_dict(bed.teacher.state_dict())
        return network

    def loss_of(self, bed: Bed, network: nn.Module, one: Try) -> Callable[[torch.Generator], tuple[Tensor, int]]:
        teacher, grid = bed.teacher.requires_grad_(False), bed.recipe.grid

        def loss(generator: torch.Generator) -> tuple[Tensor, int]:
            x0, labels, eps = bed.batch(generator)
            place = torch.randint(grid, (len(x0),), generator=generator, device=bed.device)
            level = ((place + 1) / grid)[:, None, None, None]

            def of(model: nn.Module) -> Velocity:
                return lambda x, t: unet.ask(model, x, t, labels).float()

            with bed.autocast():
                value = distance(of(network), of(teacher), (1 - level) * x0 + level * eps, place, grid)
            return value, len(x0)

        return loss
