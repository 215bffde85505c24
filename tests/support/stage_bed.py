"""Stages on data whose flow is known: independent Gaussian coefficients of the DCT, at any resolution."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffaccel.flow import LINEAR
from diffaccel.modules.dct import dct_matrix
from diffaccel.samplers.bottleneck.stages import Stage, Target
from diffaccel.session import Decode, Encode, Eval, Pred, Stages, Step

LATENT = 8  # pixels a latent


@dataclass(eq=False)
class Bed:
    """A session without a network: what the stage engine asks of one.

    Attributes:
        power: variance of each coefficient ``(H, W)`` of the orthonormal DCT at the call's own size.
        mean: of the lowest coefficient's picture, the same at every place and size.
    """

    height: int
    width: int
    sigmas: Tensor
    power: Any = 1.0
    mean: float = 0.0
    rows: int = 2
    seed: int = 0
    path: Any = LINEAR
    siblings: dict[tuple[int, int], Bed] = field(default_factory=dict)
    generator: Any = None
    calls: list[tuple[int, int]] = field(default_factory=list)
    steps: int = 0
    parts: Any = ()
    scheduler: Any = None
    schedule: Any = field(default_factory=lambda: SimpleNamespace(state_scale=lambda sigma: 1.0))

    def __post_init__(self) -> None:
        self.generator = self.generator or torch.Generator().manual_seed(self.seed)
        shape = (self.rows, 1, self.height // LATENT, self.width // LATENT)
        self.x = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed + 1), dtype=torch.float64)

    def at(self, height: int, width: int) -> Bed:
        if (height, width) == (self.height, self.width):
            return self
        key = (height, width)
        if key not in self.siblings:
            self.siblings[key] = Bed(
                height, width, self.sigmas, self.power, self.mean, self.rows, self.seed + height, self.path,
                generator=self.generator,
            )  # fmt: skip
        return self.siblings[key]

    def randn_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """Return ``E[eps - x0 | x]`` of Gaussian coefficients with variance ``power`` around the mean."""
        h, w = x.shape[-2:]
        power = self.power[:h, :w] if isinstance(self.power, Tensor) else self.power
        centred = x - (1 - t) * self.mean
        tall, wide = dct_matrix(h), dct_matrix(w)
        spectrum = tall @ centred @ wide.T
        gain = (t - (1 - t) * power) / ((1 - t) ** 2 * power + t**2)
        return tall.T @ (gain * spectrum) @ wide - self.mean

    def drive(self, sampling: Any) -> Tensor:
        """Answer a sampler's events and return its latents."""
        reply: Any = None
        try:
            while True:
                event = sampling.send(reply)
                if isinstance(event, Stages):
                    self.parts, reply = event.parts, None
                elif isinstance(event, Eval):
                    self.calls.append(tuple(event.x.shape[-2:]))
                    v = self.velocity(event.x, float(event.sigma))
                    reply = Pred(self.path, event.x, event.sigma, v)
                elif isinstance(event, Step):
                    self.steps += 1
                    reply = event.x
                elif isinstance(event, Decode):
                    reply = torch.nn.functional.interpolate(event.x0, scale_factor=LATENT, mode="nearest")
                elif isinstance(event, Encode):
                    reply = torch.nn.functional.avg_pool2d(event.pixels, LATENT)
        except StopIteration as stop:
            return stop.value


def target(height: int, width: int, levels: Tensor, multiple: int = 16) -> Target:
    """Return what the rules know of a call."""
    return Target((height, width), levels.double(), multiple, LATENT)


def stage(size: tuple[int, int], levels: Any, **options: Any) -> Stage:
    return Stage(size, torch.as_tensor(levels, dtype=torch.float64), **options)


def flux_levels(n: int, tokens: int = 4096) -> Tensor:
    """Return the levels of FLUX.1-dev's scheduler for ``n`` steps of a picture of ``tokens`` tokens."""
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / n, n), mu=calculate_shift(tokens, 256, 4096, 0.5, 1.15))
    return scheduler.sigmas


def wan_levels(n: int, shift: float = 5.0) -> Tensor:
    """Return Wan's levels under Euler for ``n`` steps."""
    u = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    return shift * u / (1 + (shift - 1) * u)
