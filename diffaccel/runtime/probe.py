"""A session from a pipeline's own ``__call__``, stopped at its first ``scheduler.step``.

What the pipeline prepared for its network by then is all that a family does before its loop, so nothing of it is
written again here. Because the network answered with known random tensors, the guidance rule that the pipeline applied
to them can be checked against the one that the family declares.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffaccel import schedules
from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family
from diffaccel.families.init_image import strength_problem
from diffaccel.modules.call_class import stock_class
from diffaccel.modules.guard import alone, contents_of, restored
from diffaccel.modules.stand_in import TextMemo, by_name, clone, global_generator, random_states, set_random_states
from diffaccel.runtime.guidance_check import check_guidance
from diffaccel.runtime.interception import Recording, intercept
from diffaccel.runtime.meter import device_of
from diffaccel.session import Session


class _Stop(Exception):
    """Unwinds a probed call."""


@dataclass(frozen=True, eq=False)
class Opening:
    """All that opens a session of one call of a pipeline, any number of times; :attr:`Session.reopen` of the session.

    Attributes:
        call: the pipeline's stock ``__call__``.
        arguments: the call's, by name, with its generator in the state before the call.
        memo: the call's text encodings, for the same call at another resolution.
        device: where the pipeline runs; diffusers looks for it in every module, so it is asked once a call.
        random_before: states of torch's global generators before the call.
        is_checked: whether the call's guidance was found to be the family's, as it is at every resolution.
    """

    pipe: Any
    family: Family
    call: Callable[..., Any]
    arguments: dict[str, Any]
    memo: TextMemo
    device: torch.device
    random_before: list[Tensor]
    is_checked: bool = False

    def __call__(self, fresh_text: bool = False, **changes: Any) -> Session:
        changed = {**self.arguments, "generator": clone(self.arguments.get("generator")), **changes}
        memo = TextMemo() if fresh_text else self.memo
        with _preserved_private_state(self.pipe):
            family = self.family.of_call(self.pipe, self.call, changed, memo)
        return probe(replace(self, arguments=changed, memo=memo, family=family, is_checked=not fresh_text))


def arguments_of(call: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name, defaults filled in; wrong ones raise as the call itself would.

    What a class of the user's takes as ``*args``, to pass it on, has the names of the pipeline below it.

    Raises:
        DiffAccelError: for positional arguments that have no name.
    """
    bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    arguments = by_name(bound)
    arguments.pop("self")
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL and (unnamed := arguments.pop(name)):
            named = dict(zip(_names_below(pipe, bound.signature), unnamed, strict=False))
            if len(named) < len(unnamed):
                raise DiffAccelError(
                    f"{type(pipe).__name__} takes '*{name}', and {len(unnamed)} arguments passed so have no name that "
                    "a sampler could follow. Pass them by name."
                )
            inspect.signature(call).bind(pipe, **(arguments := {**arguments, **named}))
    return arguments


def _names_below(pipe: Any, signature: inspect.Signature) -> list[str]:
    """Return names of positional arguments for a call that takes none by name: those of the pipeline below it."""
    return [] if _named(signature) else _names_of_pipeline(pipe)


def _named(signature: inspect.Signature) -> list[str]:
    """Return the names of a call's positional arguments, besides ``self``."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [name for name, parameter in signature.parameters.items() if parameter.kind is kind][1:]


def _names_of_pipeline(pipe: Any) -> list[str]:
    """Return the names of the first class's arguments, from the pipeline's own upwards, whose call has names."""
    calls = (vars(cls)["__call__"] for cls in type(pipe).__mro__ if "__call__" in vars(cls))
    return next(filter(None, (_named(inspect.signature(call)) for call in calls)), [])


def lacking(pipe: Any, arguments: dict[str, Any], error: KeyError) -> DiffAccelError | None:
    """Return the error for an argument that a class of the user's leaves to the pipeline below it; None for others."""
    name = error.args[0] if error.args else None
    if name in arguments or name not in _names_of_pipeline(pipe):
        return None
    return DiffAccelError(
        f"{type(pipe).__name__} passes its arguments on, and the call does not say '{name}', which a sampler must "
        f"know. Pass {name}=... by name."
    )


def probe(opening: Opening) -> Session:
    """Open a session by running the call up to its first step; the pipeline's state is restored."""

    def open_and_restore() -> Session:
        with _preserved_private_state(opening.pipe):
            return _probe(opening)

    return alone(opening.pipe, open_and_restore)


def _probe(opening: Opening) -> Session:
    """Open a session as :func:`probe`, but leave the pipeline's private attributes, such as its guidance scale, set.

    A call without a generator draws from torch's global ones. These are left as they are, and the session goes on with
    a generator of its own, in the state in which the pipeline left the global one.
    """
    pipe, arguments = opening.pipe, opening.arguments
    generator = clone(arguments.get("generator"))
    sessions: list[Session] = []
    overrides = {"callback_on_step_end": None, "output_type": "latent", "return_dict": False}
    overrides["generator"] = clone(generator)
    kept = replace(opening, arguments={**arguments, "generator": generator})

    def on_first_step(recording: Recording) -> Any:
        advanced = probe_arguments.get("generator")
        session = make_session(kept, recording, global_generator(device) if advanced is None else advanced)
        session.scheduler = _copy(pipe.scheduler)  # the pipeline's own goes back to what it was
        sessions.append(session)
        raise _Stop

    probe_arguments = {**arguments, **{k: v for k, v in overrides.items() if k in arguments}}
    device = opening.device
    random_now = random_states(device)
    try:
        set_random_states(device, opening.random_before)
        with (
            restored(pipe, contents_of(pipe.scheduler)),
            intercept(pipe, opening.family, opening.memo, device, on_first_step),
        ):
            opening.call(pipe, **probe_arguments)
    except _Stop:
        pass
    finally:
        set_random_states(device, random_now)
    if not sessions:
        raise no_step(pipe, arguments)
    return sessions[0]


def no_step(pipe: Any, arguments: dict[str, Any]) -> DiffAccelError:
    """Return the error for a call that stepped its scheduler not once, with the argument that left no step."""
    problem = f"{type(pipe).__name__} finished without a single scheduler step"
    if arguments.get("denoising_start") is not None:
        start, steps = arguments["denoising_start"], arguments.get("num_inference_steps")
        return DiffAccelError(f"{problem}: denoising_start={start} leaves none of {steps}. Use a smaller one.")
    reason = strength_problem(arguments)
    inner = [name for name, part in getattr(pipe, "__dict__", {}).items() if isinstance(part, DiffusionPipeline)]
    if inner and not reason:
        return DiffAccelError(f"{problem}: its steps are those of {' and '.join(inner)}. Accelerate these pipelines.")
    return DiffAccelError(f"{problem}: {reason}" if reason else f"{problem}. Ask for at least one inference step.")


def _copy(scheduler: Any) -> Any:
    """Copy a scheduler so that steps of one leave the other alone: steps replace its tensors and change its lists."""
    duplicate = copy.copy(scheduler)
    duplicate.__dict__.update({k: list(v) for k, v in scheduler.__dict__.items() if isinstance(v, list)})
    return duplicate


@contextlib.contextmanager
def _preserved_private_state(pipe: Any) -> Iterator[None]:
    """Restore the pipeline's private attributes, where a call notes guidance scale, step count and the like."""
    private = {k: v for k, v in pipe.__dict__.items() if k.startswith("_") and k != "_internal_dict"}

    def restore() -> None:
        for name in [k for k in pipe.__dict__ if k.startswith("_") and k not in private and k != "_internal_dict"]:
            del pipe.__dict__[name]
        pipe.__dict__.update(private)

    with restored(pipe, restore):
        yield


def make_session(opening: Opening, recording: Recording, generator: Any) -> Session:
    """Return the session of a recorded first step.

    Args:
        opening: opens the session of the same call with other arguments.
        generator: the generator in the state in which the pipeline left it.
    """
    pipe, family, arguments = opening.pipe, opening.family, opening.arguments
    latents = recording.latents
    if latents is None:
        raise DiffAccelError(f"{type(pipe).__name__} passed no sample to its scheduler.")
    if not opening.is_checked:
        check_guidance(family, pipe, recording, arguments)
    height, width = family.size(pipe, arguments)
    time = recording.calls[0].get(family.time_arg)
    schedule: schedules.Schedule | DiffAccelError
    try:
        schedule = schedules.read(pipe.scheduler, recording.timestep)
    except DiffAccelError as error:  # raised where the schedule is used: the scheduler's own steps need none
        schedule = error
    return Session(
        pipe=pipe,
        family=family,
        scheduler=pipe.scheduler,
        conds=[family.conditioning(pipe, recording.calls, arguments)],
        latents=latents,
        timesteps=pipe.scheduler.timesteps[schedules.start_index(pipe.scheduler, recording.timestep) :],
        step_arguments=recording.step_arguments,
        noised=recording.noised,
        prepared=recording.prepared,
        read_schedule=schedule,
        positional=recording.positional,
        returns=recording.returns,
        scalar_time=isinstance(time, Tensor) and time.ndim == 0,
        dtype=latents.dtype,
        height=height,
        width=width,
        generator=generator,
        reopen=opening,
    )


@contextlib.contextmanager
def open_session(pipe: Any, **arguments: Any) -> Iterator[Session]:
    """Open a session of a pipeline call, to inspect it or drive it by hand; the pipeline is restored afterwards.

    ``arguments`` are those of ``pipe(...)``. The caller's generators are not advanced, nor are torch's global ones:
    without a generator the session draws what the call would draw, from a copy of them.

    Raises:
        DiffAccelError: for a pipeline of no family that cannot be identified, or options that a sampler cannot follow.
    """
    from diffaccel.families import FAMILIES, INPAINTING, find_for_search
    from diffaccel.families.generic import identify
    from diffaccel.families.generic.watching import NotIdentified

    call, memo = stock_call(type(pipe)), TextMemo()
    call_arguments = arguments_of(call, pipe, (), arguments)
    try:
        family = find_for_search(pipe) or alone(pipe, lambda: identify(pipe, call, call_arguments, memo))
    except NotIdentified as refusal:
        raise DiffAccelError(
            f"No family for {type(pipe).__name__}, and none can be made from its call: {refusal} "
            f"Supported pipelines: {', '.join(sorted({**FAMILIES, **INPAINTING}))}."
        ) from refusal
    check_call(family, pipe, call_arguments)
    device = device_of(pipe)
    opening = Opening(pipe, family, call, call_arguments, memo, device, random_states(device))
    with _preserved_private_state(pipe):
        try:
            yield alone(pipe, lambda: _probe(opening))
        finally:
            pipe.maybe_free_model_hooks()


def check_call(family: Family, pipe: Any, arguments: dict[str, Any]) -> None:
    """Raise for arguments that no sampler can follow, before anything is computed."""
    family.refuse(arguments)
    family.check_call_size(pipe, arguments)
    if arguments.get("callback") is not None:
        raise DiffAccelError("The old `callback` argument is not called by samplers; pass `callback_on_step_end`.")
    if arguments.get("output_type") not in ("pil", "np", "pt", "latent", None):
        raise DiffAccelError(
            f"output_type '{arguments['output_type']}' is unknown. Use one of 'pil', 'np', 'pt', 'latent'."
        )
    steps = arguments.get("num_inference_steps")
    if isinstance(steps, int) and steps < 1:
        raise DiffAccelError(f"num_inference_steps is {steps}; it must be at least 1.")


def stock_call(cls: type) -> Callable[..., Any]:
    """Return the ``__call__`` of a pipeline class without diffaccel's wrapper."""
    return stock_class(cls).__call__
