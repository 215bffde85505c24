"""Small teachers: a Gaussian whose network is exact, and a network of a few weights on two coordinates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffaccel.distill.teacher import NetworkTeacher


class Velocity(nn.Module):
    """A flow network on points ``(B, 2)``."""

    def __init__(self, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(
            nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.layers(torch.cat([x, sigma[:, None].to(x)], dim=1))


def small_teacher(guidance: float = 1.0) -> NetworkTeacher:
    """Return a teacher with random weights; its condition is added to the output."""

    def call(network: nn.Module, x: Tensor, sigma: Tensor, condition: float) -> Tensor:
        return network(x, sigma) + condition

    return NetworkTeacher(Velocity(), call, "velocity", (2,), conditions=(0.0, 0.5), negative=-0.5, guidance=guidance)


class Gaussian(nn.Module):
    """The exact velocity of data N(mean, std^2): its two weights are what a generator of this form learns."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = (nn.Parameter(torch.tensor(v, dtype=torch.float32)) for v in (mean, std))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.reshape(-1, 1).to(x)
        variance = (1 - s) ** 2 * self.std**2 + s**2
        x0 = self.mean + (1 - s) * self.std**2 / variance * (x - (1 - s) * self.mean)
        return (x - x0) / s


def gaussian_teacher(mean: float = -0.3, std: float = 0.9) -> NetworkTeacher:
    """Return the exact teacher of a Gaussian."""
    return NetworkTeacher(Gaussian(mean, std), lambda network, x, sigma, _: network(x, sigma), "velocity", (1,))
