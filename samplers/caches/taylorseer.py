"""TaylorSeer: every n-th step is real, and the others are extrapolated from differences of the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from diffaccel.modules.step_cache.decisions import Decision, EveryNth
from diffaccel.samplers.caches.base import CacheConfig, Payload


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(CacheConfig):
    """``r(t) = sum_k f_k (t - t_i)^k / k!`` for the residual ``r`` of all blocks ``(B, N, D)``; of a UNet, its output.

    The differences ``f_k`` are of the real steps, which are the first ``warmup`` and every ``interval``-th after them.
    By default the polynomial through the latest ``order + 1`` of them, which is exact at any spacing. The pattern does
    not depend on data, so that rows stay independent of each other.

    Args:
        interval: real steps are so far apart; a larger one is faster, 1 makes every step real.
        warmup: number of real steps at the start.
    """

    name: ClassVar[str] = "taylorseer"
    citation: ClassVar[str] = (
        "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv 2503.06923"
    )

    payload: Payload = "newton"
    order: int = 1
    interval: int = 3
    warmup: int = 3

    @classmethod
    def paper(cls) -> Self:
        """Return published settings: every fourth step, second order, by the Taylor sum."""
        return cls(interval=4, order=2, payload="taylor")

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"interval": (2, 3, 4, 5, 6), "order": (1, 2, 3)}

    def validate(self) -> None:
        super().validate()
        self.require(interval=(1, 1000), warmup=(1, 1000))

    def decision(self) -> Decision:
        return EveryNth(self.interval, self.warmup)
