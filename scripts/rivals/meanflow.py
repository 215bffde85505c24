"""MeanFlow (arXiv 2505.13447): the average velocity between two times is learnt from pictures, without a teacher.

    u(z, r, t) = 1 / (t - r) * integral of v from r to t        x0 = z1 - u(z1, 0, 1)
    u_target = v - (t - r) (v . du/dz + du/dt),                 z = (1 - t) x0 + t eps,   v = eps - x0

The bracket is one product of the network's Jacobian with the tangent ``(v, 0, 1)``, in forward mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from scripts.rivals.bed import Bed, Rival, Try
from scripts.zoo.fashion import unet

_MEAN, _DEVIATION = -0.4, 1.0  # of the logit of both times
_SMALL = 1e-3  # beside the squared error in the weight
_SLOWER = 0.025  # the embedding's fastest wave has a slope of 1000 in t, which would drown that of the network


class TwoTimes(nn.Module):
    """The UNet with a second time, ``t - r``, that is embedded as the first one is and added to it.

    Called as a UNet it has ``r = 0``: its output at ``t = 1`` leads from noise to a picture.
    """

    def __init__(self, network: UNet2DModel) -> None:
        super().__init__()
        first = network.config.block_out_channels[0]
        self.unet, self.labels = network, network.class_embedding
        network.class_embedding = nn.Identity()  # is given the sum of label and span
        self.project, self.span = Timesteps(first, True, 0), TimestepEmbedding(first, 4 * first)

    @property
    def device(self) -> torch.device:
        return self.labels.weight.device

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False, span: Tensor | None = None
    ) -> tuple[Tensor]:
        waves = self.project(_SLOWER * (timestep if span is None else span))  # always in float32
        embedded = self.span(waves.to(self.labels.weight.dtype))
        return self.unet(
            x, _SLOWER * timestep, class_labels=self.labels(class_labels) + embedded, return_dict=return_dict
        )


def target(
    u: Callable[[Tensor, Tensor, Tensor], Tensor], z: Tensor, r: Tensor, t: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``u(z, r, t)`` and what it is to be, without gradients. Times are ``(B,)``."""
    with sdpa_kernel(SDPBackend.MATH):  # the attention that forward mode goes through
        value, slope = torch.func.jvp(u, (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    span = (t - r).reshape(-1, *[1] * (z.ndim - 1))
    return value, (v - span * slope).detach()


def weighted(error: Tensor) -> Tensor:
    """Return the mean of ``|d|^2 / (|d|^2 + 1e-3)``, whose denominator is a constant."""
    square = error.square().flatten(1).sum(1)
    return (square / (square.detach() + _SMALL)).mean()


def times(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return ``r <= t`` of ``count`` rows, both logit-normal."""
    normal = torch.randn(2, count, generator=generator, device=generator.device)
    both = torch.sigmoid(_MEAN + _DEVIATION * normal).sort(0).values
    return both[0], both[1]


def errors(network: nn.Module, bed: Bed, x0: Tensor, labels: Tensor, eps: Tensor, generator: Any) -> Tensor:
    """Return the errors of a batch: of average velocities first, then of those between equal times."""
    few = max(1, round(len(x0) * bed.recipe.jvp_rows))
    r, t = times(len(x0), generator)
    level, v = t[:, None, None, None], eps - x0
    z = (1 - level) * x0 + level * eps

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return network(z, 1000 * t, labels[:few], span=1000 * (t - r))[0]

    value, wanted = target(u, z[:few], r[:few], t[:few], v[:few])  # float32: a slope in 16 bits would be noise
    with bed.autocast():
        plain = network(z[few:], 1000 * t[few:], labels[few:], span=torch.zeros_like(t[few:]))[0]
    return torch.cat([value - wanted, plain.float() - v[few:]])


class MeanFlow(Rival):
    """MeanFlow from scratch, under labels, without guidance."""

    name = "meanflow"

    def build(self, bed: Bed, seed: int) -> nn.Module:
        return TwoTimes(unet.build(bed.fashion, seed))

    def loss_of(self, bed: Bed, network: nn.Module, one: Try) -> Callable[[torch.Generator], tuple[Tensor, int]]:
        def loss(generator: torch.Generator) -> tuple[Tensor, int]:
            x0, labels, eps = bed.batch(generator)
            return weighted(errors(network, bed, x0, labels, eps, generator)), len(x0)

        return loss
