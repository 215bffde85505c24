"""What a sampler sees in a stock loop, and the noise levels at which it will ask there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.config import SamplerConfig
from diffaccel.errors import UnsupportedBySampler
from diffaccel.families import FAMILIES
from diffaccel.noise import noise_like
from diffaccel.runtime.checked_sampling import checked_sampling
from diffaccel.schedules import Schedule
from diffaccel.session import Eval, Pred, Step

_WORDS = {  # what a sampler is after that asks a session for more than levels and predictions
    "family": "the layout of the pipeline's latents, for other sizes or for pixels",
    "at": "other sizes",
    "conds": "the conditions of the call one by one",
    "partners": "other pipelines beside this one",
}


class StockSession:
    """The part of a session that a stock loop can provide: initial latents, noise levels, and noise."""

    def __init__(self, config: SamplerConfig, pipe: Any, schedule: Schedule, x: Tensor, generator: Any) -> None:
        self.schedule, self.x, self.generator = schedule, x, generator
        self._sampler, self._pipeline = config.name, type(pipe).__name__

    @property
    def sigmas(self) -> Tensor:
        """``(n + 1,)`` noise levels of the call."""
        return self.schedule.sigmas

    @property
    def path(self) -> Any:
        """The noise path whose coordinates ``x`` has."""
        return self.schedule.path

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw noise from the caller's generator, as a full session does."""
        return noise_like(x, self.generator)

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedBySampler(
            f"'{self._sampler}' needs {_WORDS.get(name, name)}, and in the loop of {self._pipeline} a sampler gets one "
            "guided prediction at a time, at the call's own size, and nothing else. Use 'euler', 'dpmpp2m', "
            f"'ancestral' or 'scheduler' there, or '{self._sampler}' on one of {', '.join(sorted(FAMILIES))}."
        )


def rehearse(config: SamplerConfig, pipe: Any, schedule: Schedule) -> list[Tensor]:
    """Return the noise levels at which a sampler will ask for predictions, in order."""
    x = torch.zeros(1, 1, 1, 1, dtype=torch.float32, device="cpu")
    session: Any = StockSession(config, pipe, schedule, x, torch.Generator("cpu"))
    sampling = checked_sampling(config, session)
    requested: list[Tensor] = []
    reply: Any = None
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration:
            return requested
        if isinstance(event, Step):
            reply = event.x
        else:
            check_single(event, config, pipe)
            requested.append(event.sigma)  # type: ignore[union-attr]
            reply = Pred(schedule.path, event.x, event.sigma, torch.zeros_like(x))  # type: ignore[union-attr]


def check_single(event: Any, config: SamplerConfig, pipe: Any) -> None:
    """Raise for anything but a request for one guided prediction of the call's own rows."""
    plain = isinstance(event, Eval) and event.cond == 0 and event.branch == "guided" and event.sigma.ndim == 0
    if not plain or event.rows is not None or event.at is not None:
        raise UnsupportedBySampler(
            f"'{config.name}' asks for more than one guided prediction at a time, which needs a pipeline family; "
            f"{type(pipe).__name__} has none. Supported: {', '.join(sorted(FAMILIES))}."
        )
