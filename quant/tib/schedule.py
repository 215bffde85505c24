"""The timesteps that a pipeline of a known family passes to its network in a call, in the network's own form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel import families


def timesteps_of(pipe: Any, sample: Tensor, time: Tensor) -> list[Tensor]:
    """Return the network's time argument at every timestep of the pipeline's schedule; [] where it is not known.

    Args:
        sample: the latents that the network is given.
        time: its time argument in the call at hand, whose shape, dtype and device the others have.
    """
    family, timesteps = families.find(pipe), getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    if family is None or not isinstance(timesteps, Tensor):
        return []
    times = []
    for timestep in timesteps:
        predicted = family.time(pipe, timestep, sample, sample.dtype)
        if time.ndim == 0:
            predicted = predicted.reshape(-1)[0]
        if predicted.shape != time.shape or predicted.dtype != time.dtype:
            return []
        times.append(predicted.to(time.device))
    return times if any(torch.equal(predicted, time) for predicted in times) else []


class Timesteps:
    """The timesteps of a pipeline's scheduler at the moment of a call; None before it has any."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(self) -> Tensor | None:
        timesteps = getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)
        return timesteps if isinstance(timesteps, Tensor) else None
