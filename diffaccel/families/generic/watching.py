"""Running a pipeline's own call through its loop with random predictions, and recording every step.

Nothing is evaluated: the network answers with known random tensors and ``scheduler.step`` with known latents. All
steps of the call are run, since a rule may change during it (such as guidance over a part of the steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel import schedules
from diffaccel.errors import DiffAccelError
from diffaccel.families.generic.stand_ins import install, preserved_state
from diffaccel.families.generic.values import frozen, pictures, rounded
from diffaccel.modules.stand_in import TextMemo, clone, network_arguments, random_like
from diffaccel.modules.step_output import NetworkOutput

DIFFERENT_STEPS = 3  # number of steps with different answers; later ones repeat them


class NotIdentified(DiffAccelError):
    """The reason why the native driver cannot follow a pipeline that no family describes."""


def _nothing() -> Tensor:
    return torch.empty(0, dtype=torch.float32, device="cpu")


@dataclass(eq=False)
class Turn:
    """One iteration of a pipeline's loop.

    Attributes:
        denoiser, network: attribute of the pipeline that holds the network, and the network.
        calls: the network's arguments, call by call.
        answers: the network's random outputs, call by call.
        guided, sample, timestep: arguments of ``scheduler.step``.
    """

    denoiser: str
    network: Any
    calls: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)
    guided: Tensor = field(default_factory=_nothing)
    sample: Tensor = field(default_factory=_nothing)
    timestep: Tensor = field(default_factory=_nothing)


class _Done(Exception):
    """Unwinds a watched call."""


class _Watcher:
    """Answers the calls of a loop, and passes each turn to ``visit``.

    Attributes:
        is_preparing: whether the scheduler has not set its timesteps yet; networks are evaluated until then.
        first: index of the loop's first entry in the scheduler's timesteps.
        index: number of finished turns.
        returned: the latents that the last step returned.
        turn: the current turn, None between turns.
        denoiser: attribute of the pipeline that holds the network; "" before its first call.
        drawn: random answers by seed.
    """

    def __init__(self, pipe: Any, visit: Callable[[Turn], bool], row_shape: torch.Size | None) -> None:
        self.scheduler, self.visit, self.row_shape = pipe.scheduler, visit, row_shape
        self.is_preparing = True
        self.first = self.index = 0
        self.returned: Tensor | None = None
        self.turn: Turn | None = None
        self.denoiser = ""
        self.drawn: dict[int, Any] = {}

    def begin(self) -> None:
        """Note that the scheduler sets its timesteps."""
        self.is_preparing = False

    def network(self, name: str, module: Any, *args: Any, **kwargs: Any) -> Any:
        """Answer a network call at random."""
        if self.is_preparing:
            return module(*args, **kwargs)
        if "controlnet" in name:
            raise NotIdentified(f"its loop calls a second network, '{name}', whose residuals change from step to step.")
        if self.turn is None:
            self.turn = Turn(name, module)
        turn = self.turn
        self.denoiser = self.denoiser or name
        if self.denoiser != name:  # in the same step or later, as experts for high and low noise do
            raise NotIdentified(f"its loop calls two networks, '{self.denoiser}' and '{name}'.")
        arguments = network_arguments(module, args, kwargs)
        turn.calls.append(arguments)
        like = next((value for value in arguments.values() if pictures(value)), None)
        if like is None:
            raise NotIdentified(f"its '{name}' is called without latents.")
        shape = (len(like), *(like[0].shape if self.row_shape is None else self.row_shape))
        seed = 1000 * (self.index % DIFFERENT_STEPS) + len(turn.calls)
        if seed not in self.drawn:
            self.drawn[seed] = random_like(like, shape, seed)
        turn.answers.append(self.drawn[seed])
        answer = frozen(turn.answers[-1])  # the loop may change it in place
        return NetworkOutput(sample=answer) if arguments.get("return_dict", True) else (answer,)

    def step(self, output: Any, sample: Any, timestep: Any) -> Tensor:
        """Finish a turn and return known latents for the next."""
        turn, timesteps = self.turn, self.scheduler.timesteps
        if turn is None:
            raise NotIdentified("its loop steps the scheduler without calling a network.")
        if not (isinstance(output, Tensor) and isinstance(sample, Tensor)):
            raise NotIdentified("its loop steps something other than one tensor of latents.")
        if self.index == 0:
            self.first = schedules.start_index(self.scheduler, timestep)
        expected = timesteps[self.first + self.index]
        if float(timestep) != float(expected):
            raise NotIdentified(
                f"step {self.index} of its loop is at time {float(timestep):g}, its scheduler's is {float(expected):g}."
            )
        if self.returned is not None and not rounded(self.returned, sample):
            raise NotIdentified("its loop changes the latents between the scheduler's steps (as inpainting does).")
        turn.guided, turn.sample, turn.timestep = output, sample, expected
        is_enough = self.visit(turn)
        self.turn = None
        self.index += 1
        if is_enough or self.first + self.index == len(timesteps):
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
    """Run ``call`` through its loop with random predictions, and restore the pipeline.

    Args:
        visit: called with every turn; returns whether the loop need not go on.
        row_shape: shape of a row of the network's answer; None for that of its input.

    Raises:
        NotIdentified: when the loop fails on random predictions. Errors of the call before its loop, such as those
            about bad arguments, are raised unchanged.
    """
    watcher = _Watcher(pipe, visit, row_shape)
    overrides = {"callback_on_step_end": None, "output_type": "latent", "return_dict": False}
    overrides["generator"] = clone(arguments.get("generator"))
    call_arguments = {**arguments, **{k: v for k, v in overrides.items() if k in arguments}}
    try:
        with preserved_state(pipe), torch.no_grad():
            install(pipe, memo, watcher.begin, watcher.network, watcher.step)
            call(pipe, **call_arguments)
    except _Done:
        return
    except NotIdentified:
        raise
    except Exception as error:
        if watcher.turn is None and watcher.index == 0:
            if "output_type" not in str(error):
                raise
            raise NotIdentified(f"it has no output_type 'latent' ({error}).") from error
        reason = f"its loop does not take made-up predictions ({type(error).__name__}: {error})."
        raise NotIdentified(reason) from error
    raise NotIdentified(f"its loop ended after {watcher.index} steps, before the last timestep of its scheduler.")
