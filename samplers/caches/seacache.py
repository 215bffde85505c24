"""SeaCache: skips steps while the clean part of the latents, filtered out by frequency, hardly changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.modules.network_call import NetworkCall
from diffaccel.modules.step_cache.decisions import Decision
from diffaccel.modules.step_cache.indicators import ChangeBound, filtered
from diffaccel.samplers.caches.base import CacheConfig, Payload


@dataclass(frozen=True, kw_only=True)
class SeaCache(CacheConfig):
    """Real when ``sum_t mean|I_t - I_{t-1}| / mean|I_{t-1}| >= threshold`` since the last real step.

    ``I`` are the latents ``(B, C, [F,] H, W)``, filtered along each axis by the gain ``g(f) = (1 - s) P / ((1 - s)^2 P
    + s^2)`` of mean 1, for noise share ``s`` and ``P(f) = |f|^-power``. Rows of one call decide together. By default
    the newest change is read one step late, which keeps the device busy: its rate stands in for the step's own.

    Args:
        threshold: change at which a step is real; a larger one is faster, 0 makes every step real.
        power: exponent of the spectrum: 2 for pictures, 3 for video; 0 for these by the latents' axes.
        first, last: numbers of steps that are real at the start and at the end.
        most_skips: maximum number of skipped steps in a row; 0 for no limit.
        same_step: read the change of the step itself, as published: waits for the device at every step.
    """

    name: ClassVar[str] = "seacache"
    citation: ClassVar[str] = "SeaCache, arXiv 2602.18993"
    watches: ClassVar[bool] = True

    payload: Payload = "linear"
    threshold: float = 0.3
    power: float = 0.0
    first: int = 1
    last: int = 1
    most_skips: int = 4
    same_step: bool = False

    @classmethod
    def fits(cls, pipeline: str, family: Any) -> tuple[bool | None, str]:
        """Return what the base does; of pipelines on pixels only the loaded scheduler shows whether it can be read."""
        if family is not None and family.name == "pixels":
            return None, "works where the scheduler's noise levels can be read, which clip_sample prevents"
        return super().fits(pipeline, family)

    @classmethod
    def paper(cls) -> Self:
        """Return the settings published for pictures: the last residual, and the change of the step itself."""
        return cls(payload="last", same_step=True, most_skips=0)

    @classmethod
    def tunable(cls) -> dict[str, tuple[Any, ...]]:
        return {"threshold": (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.9), "most_skips": (2, 4, 8)}

    def validate(self) -> None:
        super().validate()
        self.require(threshold=(0, 1e9), power=(0, 16), first=(1, 1000), last=(0, 1000), most_skips=(0, 1000))

    def decision(self) -> Decision:
        return ChangeBound(self.threshold, True, self.first, self.last, self.most_skips, self.same_step)

    def look(self, call: NetworkCall, base: Tensor, before: Tensor | None) -> Tensor:
        if call.noise_share is None or call.spatial is None:
            raise DiffAccelError(
                "'seacache' filters latents by their noise level, and the levels of this scheduler cannot be read. Use "
                "'spectrum' or 'taylorseer', whose steps do not depend on it."
            )
        latents = call.spatial()
        return filtered(latents, call.noise_share, self.power or (2.0 if latents.ndim == 4 else 3.0))
