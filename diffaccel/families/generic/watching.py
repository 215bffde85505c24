"""Run a pipeline's own call through its loop with made-up predictions, and see what goes in and out at every step.

Nothing is evaluated: the network answers with known random tensors and ``scheduler.step`` with known latents. Every
step of the call is walked, since a rule may change half-way (guidance over a part of the steps, say).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffaccel import schedules
from diffaccel.errors import DiffAccelError
from diffaccel.families.generic.stand_ins import no_trace, replace
from diffaccel.families.generic.values import frozen, pictures, rounded
from diffaccel.modules.stand_in import TextMemo, clone, network_arguments, random_like

DIFFERENT_STEPS = 3  # this many steps get answers of their own


class NotIdentified(DiffAccelError):
    """Why a pipeline that no family describes cannot be followed by the native driver."""


@dataclass(eq=False)
class Turn:
    """One iteration of a pipeline's loop: network arguments and answers call by call, then ``scheduler.step``."""

    denoiser: str
    network: Any
    calls: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    guided: Tensor = field(default_factory=lambda: torch.empty(0))
    sample: Tensor = field(default_factory=lambda: torch.empty(0))
    timestep: Tensor = field(default_factory=lambda: torch.empty(0))


class _Done(Exception):
    """Unwinds a watched call."""


class _Watcher:
    def __init__(self, pipe: Any, visit: Callable[[Turn], bool], row_shape: torch.Size | None) -> None:
        self.scheduler, self.visit, self.row_shape = pipe.scheduler, visit, row_shape
        self.preparing = True
        self.first = self.index = 0
        self.returned: Tensor | None = None
        self.turn: Turn | None = None
        self.denoiser = ""
        self.drawn: dict[int, Any] = {}

    def begin(self) -> None:
        self.preparing = False

    def network(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        if self.preparing:
            return module(*args, **kwargs)
        if "controlnet" in name:
            raise NotIdentified(f"its loop calls a second network, '{name}', whose residuals change from step to step.")
        if self.turn is None:
            self.turn = Turn(name, module)
        turn = self.turn
        self.denoiser = self.denoiser or name
        if self.denoiser != name:  # in the same step or later, as experts for high and low noise do
            raise NotIdentified(f"its loop calls two networks, '{self.denoiser}' and '{name}'.")
        bound = network_arguments(module, args, kwargs)
        turn.calls.append(bound)
        like = next((v for v in bound.values() if pictures(v)), None)
        if like is None:
            raise NotIdentified(f"its '{name}' is called without latents.")
        shape = (len(like), *(like[0].shape if self.row_shape is None else self.row_shape))
        seed = 1000 * (self.index % DIFFERENT_STEPS) + len(turn.calls)
        if seed not in self.drawn:
            self.drawn[seed] = random_like(like, shape, seed)
        turn.answers.append(self.drawn[seed])
        given = frozen(turn.answers[-1])  # the loop may change it in place
        return SimpleNamespace(sample=given) if bound.get("return_dict", True) else (given,)

    def step(self, output: Any, sample: Any, timestep: Any) -> Tensor:
        turn, timesteps = self.turn, self.scheduler.timesteps
        if turn is None:
            raise NotIdentified("its loop steps the scheduler without calling a network.")
        if not (isinstance(output, Tensor) and isinstance(sample, Tensor)):
            raise NotIdentified("its loop steps something other than one tensor of latents.")
        if self.index == 0:
            self.first = schedules.begin(self.scheduler, timestep)
        due = timesteps[self.first + self.index]
        if float(timestep) != float(due):
            raise NotIdentified(
                f"step {self.index} of its loop is at time {float(timestep):g}, its scheduler's is {float(due):g}."
            )
        if self.returned is not None and not rounded(self.returned, sample):
            raise NotIdentified("its loop changes the latents between the scheduler's steps (as inpainting does).")
        turn.guided, turn.sample, turn.timestep = output, sample, due
        enough = self.visit(turn)
        self.turn = None
        self.index += 1
        if enough or self.first + self.index == len(timesteps):
            raise _Done
        self.returned = sample * (1 - 0.01 * (1 + self.index % DIFFERENT_STEPS))
        return self.returned.clone()


def watch(
    pipe: Any,
    call: Callable[..., Any],
    arguments: dict[str, Any],
    memo: TextMemo,
    visit: Callable[[Turn], bool],
    row_shape: torch.Size | None = None,
) -> None:
    """Walk ``call``'s loop and leave no trace in the pipeline.

    Args:
        visit: called with every turn; returns whether that was enough.
        row_shape: shape of a row of the network's answer; None for that of its input.

    Raises:
        NotIdentified: when the loop does not go on with made-up predictions. What the call raises before its loop,
            about bad arguments say, comes through as it is.
    """
    watcher = _Watcher(pipe, visit, row_shape)
    quiet = {"callback_on_step_end": None, "output_type": "latent", "return_dict": False}
    quiet["generator"] = clone(arguments.get("generator"))
    given = {**arguments, **{k: v for k, v in quiet.items() if k in arguments}}
    try:
        with no_trace(pipe), torch.no_grad():
            replace(pipe, memo, watcher.begin, watcher.network, watcher.step)
            call(pipe, **given)
    except _Done:
        return
    except NotIdentified:
        raise
    except Exception as error:
        if watcher.turn is None and watcher.index == 0:
            raise
        reason = f"its loop does not take made-up predictions ({type(error).__name__}: {error})."
        raise NotIdentified(reason) from error
    raise NotIdentified(f"its loop ended after {watcher.index} steps, before the last timestep of its scheduler.")
