"""Drawing tools of the families: random numbers of a batch, coordinates, colours, noise, and layers."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Draw:
    """Random numbers and coordinates of ``n`` pictures of ``size`` pixels; numbers are (n,) or (n, *shape)."""

    def __init__(self, n: int, size: int, generator: torch.Generator) -> None:
        self.n, self.size, self.generator, self.device = n, size, generator, generator.device
        axis = (torch.arange(size, device=self.device) + 0.5) * (2 / size) - 1
        v, u = torch.meshgrid(axis, axis, indexing="ij")
        self.grid = u.expand(n, -1, -1), v.expand(n, -1, -1)  # right and down, in [-1, 1]

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw uniform numbers in [low, high)."""
        return low + (high - low) * torch.rand(self.n, *shape, generator=self.generator, device=self.device)

    def log_uniform(self, low: float, high: float) -> Tensor:
        """Draw numbers whose logarithm is uniform."""
        return self.uniform(math.log(low), math.log(high)).exp()

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(self.n, *shape, generator=self.generator, device=self.device)

    def integer(self, below: int, *shape: int) -> Tensor:
        """Draw uniform integers in [0, below)."""
        return torch.randint(below, (self.n, *shape), generator=self.generator, device=self.device)

    def chance(self, p: float) -> Tensor:
        """Draw 1 with probability ``p``, else 0."""
        return (self.uniform(0, 1) < p).float()

    def turned(self, angle: Tensor, shift: float = 1.0) -> tuple[Tensor, Tensor]:
        """Return coordinates rotated by ``angle`` and shifted at random by up to ``shift``."""
        u, v = self.grid
        c, s = angle.cos()[:, None, None], angle.sin()[:, None, None]
        dx, dy = self.uniform(-shift, shift)[:, None, None], self.uniform(-shift, shift)[:, None, None]
        return c * u + s * v + dx, c * v - s * u + dy


def hat(t: Tensor, count: int) -> Tensor:
    """Compute linear interpolation weights of ``count`` knots at ``t`` (N, H, W) in [0, 1]: (N, count, H, W)."""
    knots = torch.arange(count, device=t.device)[:, None, None]
    return (1 - (t[:, None].clamp(0, 1) * (count - 1) - knots).abs()).clamp_min(0)


def ramp(t: Tensor, colours: Tensor) -> Tensor:
    """Map ``t`` (N, H, W) in [0, 1] through a gradient of colours (N, K, 3): (N, 3, H, W)."""
    n, k, _ = colours.shape
    return torch.bmm(colours.mT, hat(t, k).flatten(2)).view(n, 3, *t.shape[1:])


def palette(d: Draw, count: int) -> Tensor:
    """Draw colours (N, count, 3): hues close, opposite or unrelated; vivid, pale, dark or nearly grey."""
    spread = torch.tensor([0.03, 0.12, 0.5], device=d.device)[d.integer(3)]
    hue = d.uniform(0, 1)[:, None] + spread[:, None] * 2 * (d.uniform(0, 1, count) - 0.5)
    opposite = d.chance(0.3)[:, None] * 0.5 * (torch.arange(count, device=d.device) % 2)
    top = torch.tensor([0.12, 0.5, 0.95, 1.0], device=d.device)[d.integer(4)][:, None]
    saturation = top * d.uniform(0.5, 1, count)
    value = d.uniform(0.15, 1, count)
    value = torch.where(d.chance(0.3)[:, None] > 0, 0.6 + 0.4 * value, value)
    # HSV to RGB: a colour is V (1 - S (1 - pure hue))
    offset = torch.tensor([0.0, 2 / 3, 1 / 3], device=d.device)
    pure = ((((hue + opposite)[..., None] + offset) % 1 * 6 - 3).abs() - 1).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * (1 - pure))


def noise(d: Draw, slope: Tensor, stretch: Tensor | None = None, angle: Tensor | None = None) -> Tensor:
    """Draw Gaussian fields (N, S, S) of power spectrum ``f^-slope``, mean 0 and deviation 1, periodic.

    ``stretch`` and ``angle`` weaken frequencies away from a direction: ``f^2 -> f^2 + (e^stretch - 1) (f . n)^2``.
    """
    fy = torch.fft.fftfreq(d.size, 1 / d.size, device=d.device)[:, None]
    fx = torch.fft.rfftfreq(d.size, 1 / d.size, device=d.device)[None]
    square = (fx * fx + fy * fy).expand(d.n, -1, -1)
    if stretch is not None and angle is not None:
        along = angle.cos()[:, None, None] * fx + angle.sin()[:, None, None] * fy
        square = square + stretch.expm1()[:, None, None] * along * along
    gain = square.clamp_min(1.0) ** (-slope[:, None, None] / 4)
    field = torch.fft.irfft2(torch.fft.rfft2(d.normal(d.size, d.size)) * gain, s=(d.size, d.size))
    field = field - field.mean((1, 2), keepdim=True)
    return field / field.std((1, 2), keepdim=True).clamp_min(1e-6)


def soft(distance: Tensor) -> Tensor:
    """Turn a signed distance in pixels, positive inside, into a mask with an edge of one pixel."""
    return (distance + 0.5).clamp(0, 1)


def over(under: Tensor, layer: Tensor, mask: Tensor) -> Tensor:
    """Composite ``layer`` over ``under`` (N, 3, H, W) where ``mask`` (N, H, W) is 1."""
    return under + (layer - under) * mask[:, None]


def flat(colour: Tensor, d: Draw) -> Tensor:
    """Fill pictures (N, 3, S, S) with one colour (N, 3) each."""
    return colour[:, :, None, None].expand(-1, -1, d.size, d.size)


def turn(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Encode a direction without sign as two numbers in [0, 1]."""
    return 0.5 + 0.5 * torch.cos(2 * angle), 0.5 + 0.5 * torch.sin(2 * angle)


Family = Callable[[Draw], tuple[Tensor, list[Tensor]]]  # pictures (N, 3, S, S), factors (N,) each
