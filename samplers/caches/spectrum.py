"""Spectrum: forecasts the last block's features by Chebyshev polynomials of the step, at steps ever farther apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from diffaccel.modules.step_cache.decisions import Decision, GrowingWindow
from diffaccel.modules.step_cache.forecasts import Center, Chebyshev, Forecast
from diffaccel.samplers.caches.base import CacheConfig, Payload


@dataclass(frozen=True, kw_only=True)
class Spectrum(CacheConfig):
    """``h(t) = blend x(tau) C + (1 - blend) h_lin(t)``, ``C`` a ridge regression on Chebyshev polynomials of the step.

    Features ``h`` are the image tokens ``(B, N, D)`` after the last block; of a UNet, its output. After ``warmup`` real
    steps one step in a window is real, and the window grows by ``growth`` with each: with the defaults 14 of 50 steps,
    or 11 of 28. The pattern does not depend on data, so that rows stay independent of each other.

    Args:
        warmup: number of real steps at the start.
        window: steps in the first window after them.
        growth: growth of the window with every real step; a larger one is faster.
        degree: of the polynomials.
        ridge: of the regression.
        blend: share of the regression; the rest is linear extrapolation.
        center: fit differences to the latest real step ("last"), so that a constant is forecast exactly, or the
            features themselves ("none", as published).
    """

    name: ClassVar[str] = "spectrum"
    citation: ClassVar[str] = "Spectrum, arXiv 2603.01623"

    payload: Payload = "chebyshev"
    warmup: int = 5
    window: float = 2.0
    growth: float = 0.75
    degree: int = 4
    ridge: float = 0.1
    blend: float = 0.5
    center: Center = "last"

    @classmethod
    def paper(cls) -> Self:
        """Return the published settings: the regression alone, of the features themselves over all real steps."""
        return cls(blend=1.0, center="none", history=100)

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"growth": (0.25, 0.5, 0.75, 1.5, 3.0), "warmup": (6, 5, 4, 3), "blend": (0.5, 0.75, 1.0)}

    def validate(self) -> None:
        super().validate()
        self.require(warmup=(1, 1000), window=(1, 1000), growth=(0, 1000), degree=(1, 16), ridge=(0, 1e6), blend=(0, 1))

    def decision(self) -> Decision:
        return GrowingWindow(self.window, self.growth, self.warmup)

    def forecast(self) -> Forecast:
        if self.payload != "chebyshev":
            return super().forecast()
        return Chebyshev(self.degree, self.ridge, self.blend, self.center, self.history)
