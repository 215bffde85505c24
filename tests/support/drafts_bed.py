"""A test bed of drafts: searches on data known in closed form, with drafts by another velocity than the finish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from analytic import BIMODAL
from search_bed import Velocity, stand_in
from torch import Tensor

from diffaccel.flow import LINEAR
from diffaccel.session import Draft, Eval, Lent, Pred, Progress, Session, Step, bcast

LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.35, 0.15, 0.0])


def exact(x: Tensor, sigma: Tensor) -> Tensor:
    """Return the velocity of the data."""
    return BIMODAL.velocity(LINEAR, x, sigma)


def rough(x: Tensor, sigma: Tensor) -> Tensor:
    """Return a velocity near it, as a cheap network's."""
    return exact(x, sigma) * 0.98


def starts(pictures: int) -> Tensor:
    return torch.randn(pictures, 1, 2, 2, generator=torch.Generator().manual_seed(5))


def call(pictures: int = 2, folder: Path | None = None) -> Session:
    """Return a session without a pipeline, with pictures of one channel."""
    return stand_in(starts(pictures), LEVELS, prompts=[f"prompt {i}" for i in range(pictures)], folder=folder)


@dataclass
class Outcome:
    """What a search by drafts came to: its latents, its report, and the requests made as drafts and in full."""

    x: Tensor
    report: dict[str, Any]
    cheap: list[Eval] = field(default_factory=list)
    full: list[Eval] = field(default_factory=list)
    wishes: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> list[dict[str, Any]]:
        return self.report["search"]["pictures"]


def search(
    config: Any,
    here: Session,
    lent: Lent | None = None,
    cheap: Velocity = rough,
    before: Callable[[bool], None] = lambda is_draft: None,
    stop: Callable[[int], bool] = lambda done: False,
) -> Outcome:
    """Run a search: ``cheap`` answers while a draft is lent, :func:`exact` else; ``before`` is called at each."""
    outcome = Outcome(here.x, here.report)
    sampling, reply, wish = config.sample(here), None, ""
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration as end:
            outcome.x = end.value
            return outcome
        if isinstance(event, Draft):
            wish = event.acceleration
            outcome.wishes.append(wish)
            reply = (lent or Lent()) if wish else Lent()
        elif isinstance(event, Progress):
            reply = stop(event.done)
        elif isinstance(event, Step):
            reply = event.x
        else:
            before(bool(wish))
            (outcome.cheap if wish else outcome.full).append(event)
            velocity = cheap if wish else exact
            sigma = bcast(event.sigma, event.x)
            reply = Pred(here.path, event.x, sigma, velocity(event.x, sigma))
