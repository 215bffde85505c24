"""First-block cache: skips the other blocks while what the first one adds hardly changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.modules.network_call import NetworkCall
from diffaccel.modules.step_cache.decisions import Decision
from diffaccel.modules.step_cache.indicators import ChangeBound
from diffaccel.samplers.caches.base import CacheConfig, Payload


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(CacheConfig):
    """Skip where ``mean|r_t - r_s| / mean|r_s| < threshold`` for the first block's residual r, s the last real step.

    The first block runs at every step; the residual ``(B, N, D)`` of the others is forecast. Rows of one call decide
    together. By default the newest change is read one step late, which keeps the device busy. A simplification of
    TeaCache's indicator that needs no fitted coefficients.

    Args:
        threshold: change at which a step is real; a larger one is faster, 0 makes every step real.
        first, last: numbers of steps that are real at the start and at the end.
        most_skips: maximum number of skipped steps in a row; 0 for no limit.
        same_step: read the change of the step itself, as published: waits for the device at every step.
    """

    name: ClassVar[str] = "firstblock"
    citation: ClassVar[str] = "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv 2411.19108"
    probes: ClassVar[int] = 1
    watches: ClassVar[bool] = True

    payload: Payload = "linear"
    threshold: float = 0.1
    first: int = 1
    last: int = 0
    most_skips: int = 4
    same_step: bool = False

    @classmethod
    def paper(cls) -> Self:
        """Return the usual settings: the last residual, no limit of skips, and the change of the step itself."""
        return cls(payload="last", threshold=0.08, same_step=True, most_skips=0)

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"threshold": (0.03, 0.05, 0.08, 0.12, 0.18, 0.25), "most_skips": (2, 4, 8)}

    def validate(self) -> None:
        super().validate()
        self.require(threshold=(0, 1e9), first=(1, 1000), last=(0, 1000), most_skips=(0, 1000))

    def decision(self) -> Decision:
        return ChangeBound(self.threshold, False, self.first, self.last, self.most_skips, self.same_step)

    def look(self, call: NetworkCall, base: Tensor, before: Tensor | None) -> Tensor:
        if before is None:
            raise DiffAccelError(
                "'firstblock' was not shown what its first block was given. Put it on the network again."
            )
        return base - before
