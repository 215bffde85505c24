"""The stock call itself with a meter, where the native driver cannot follow a call under the pipeline's own rule."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError, UnsupportedBySampler, first_line
from diffaccel.families import find
from diffaccel.families.generic.memory import kind_of_parts
from diffaccel.families.generic.stand_ins import state_of
from diffaccel.families.generic.watching import NotIdentified
from diffaccel.modules.guard import restored
from diffaccel.modules.stand_in import random_states, set_random_states
from diffaccel.runtime.meter import Meter, device_of
from diffaccel.runtime.stats import Stats

logger = logging.getLogger(__name__)

_REFUSALS: WeakKeyDictionary[Any, dict[Any, str]] = WeakKeyDictionary()  # by pipeline and kind of call

Follow = Callable[[Callable[[], None]], tuple[Any, Stats]]


def follow_or_call(
    pipe: Any,
    config: SamplerConfig,
    call: Callable[..., Any],
    arguments: dict[str, Any],
    follow: Follow,
    told: tuple[str, ...] = (),
) -> tuple[Any, Stats]:
    """Return ``follow(begin)``, or the result of the stock call where that fails before it calls ``begin``.

    A kind of call that could not be followed once is not tried again.

    Args:
        call: the pipeline's stock ``__call__``.
        arguments: the call's, by name.
        follow: runs the call in the native driver; it calls ``begin`` before the first step.
        told: names of methods on the network that need the native driver, without which the call is refused.
    """
    kind, refusals = _kind(pipe, arguments), _REFUSALS.setdefault(pipe, {})
    reason = refusals.get(kind) or _callback_reason(pipe, config, arguments)
    error: Exception | None = None
    if reason is None:
        rewind, has_begun = rewinder(pipe, arguments), False

        def begin() -> None:
            nonlocal has_begun
            has_begun = True

        try:
            return follow(begin)
        except Exception as failure:
            if has_begun or (told and not isinstance(failure, DiffAccelError)):
                raise
            error, reason = failure, first_line(failure)
        rewind()
    if refusal := own_loop_refusal(pipe, config, told, reason):
        raise refusal from error
    result, stats = _call_metered(pipe, call, arguments, error)
    if isinstance(error, DiffAccelError):  # others may pass
        refusals[kind] = reason
    stats.report["reason"] = reason
    logger.warning("%s ran its own call: %s", type(pipe).__name__, reason)
    if config.max_batch:
        logger.warning("max_batch=%d was not applied to it.", config.max_batch)
    return result, stats


def own_loop_refusal(
    pipe: Any, config: SamplerConfig, told: tuple[str, ...], reason: object
) -> UnsupportedBySampler | None:
    """Return the error for a call that runs in the pipeline's own loop and was asked for what only the driver does.

    That is to tell methods on the network their steps, to leave out the unconditional prediction at the end, and to
    search; None where none of it was asked for.
    """
    why = str(reason).rstrip(".")
    if told:
        names = " and ".join(f"'{name}'" for name in told)
        return UnsupportedBySampler(
            f"{names} must be told the step of every network call, and this call of {type(pipe).__name__} cannot be "
            f"followed: {why}. Leave that out of the call, or diffaccel.remove(pipe) first."
        )
    if getattr(config, "guidance_stop", 1.0) < 1:
        return UnsupportedBySampler(
            f"guidance_stop={config.guidance_stop} was asked of a call of {type(pipe).__name__} that only its own loop "
            f"can make: {why}. Leave it out."
        )
    if config.searches:
        return UnsupportedBySampler(
            f"'{config.name}' predicts many samples at once, and this call of {type(pipe).__name__} runs in the "
            f"pipeline's own loop alone: {why}. Search with a pipeline without it, or use 'euler', 'dpmpp2m', "
            "'ancestral' or 'scheduler' here."
        )
    return None


def _call_metered(
    pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], refusal: Exception | None
) -> tuple[Any, Stats]:
    """Return the result and the cost of the stock call; where it fails before its loop, our refusal says why."""
    meter = Meter(pipe, "stock call")
    with restored(pipe, meter.remove):
        meter.install()
        try:
            with meter.stats.timed(meter.device):
                result = call(pipe, **arguments)
        except Exception as error:
            is_ours = isinstance(refusal, DiffAccelError) and not isinstance(refusal, NotIdentified)
            if is_ours and not meter.has_counted:
                raise refusal from error  # type: ignore[misc]
            raise
    return result, meter.finish()


def _callback_reason(pipe: Any, config: SamplerConfig, arguments: dict[str, Any]) -> str | None:
    """Return why a call with a step callback is not followed: it may return a tensor that only its own loop takes."""
    if arguments.get("callback") is not None:
        return "its old `callback` is called by its own loop only."
    if arguments.get("callback_on_step_end") is None or config.max_batch:
        return None
    family = find(pipe)
    if family is None:
        return "its step callback may change more than latents."
    names = set(getattr(pipe, "_callback_tensor_inputs", ()))
    others = names - set(family.callback_names())
    return f"its step callback may change {', '.join(sorted(others))}." if others else None


def rewinder(pipe: Any, arguments: dict[str, Any]) -> Callable[[], None]:
    """Return a function that undoes what the preparation of a call changes: pipeline, scheduler, random states."""
    restore = state_of(pipe)
    generator = arguments.get("generator")
    generators = [g for g in (generator if isinstance(generator, list | tuple) else [generator]) if g is not None]
    states = [g.get_state() for g in generators]
    device = device_of(pipe)
    global_states = random_states(device)

    def rewind() -> None:
        restore()
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
        set_random_states(device, global_states)

    return rewind


def _kind(pipe: Any, arguments: dict[str, Any]) -> Any:
    """Return what tells apart calls that may be followed or not: the pipeline's parts, options, types of the others."""

    def is_option(name: str, value: Any) -> bool:
        return isinstance(value, bool | int | float) or (isinstance(value, str) and "prompt" not in name)

    plain = {k: v if is_option(k, v) else type(v).__name__ for k, v in arguments.items()}
    return kind_of_parts(pipe), tuple(sorted(plain.items()))
