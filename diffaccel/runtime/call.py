"""One accelerated call: the pipeline's own ``__call__`` with its loop replaced by a sampler's.

The stock call prepares everything, and after our loop decodes, checks and packs the result, so that safety checkers,
watermarks, output types and offloading are the pipeline's own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError, UnsupportedBySampler
from diffaccel.families import find, find_for_search
from diffaccel.families.base import Family
from diffaccel.families.generic import Generic, Outdated, identify
from diffaccel.families.generic.memory import CallMemory
from diffaccel.families.generic.watching import NotIdentified
from diffaccel.modules.guard import restored
from diffaccel.modules.say_once import warn_once
from diffaccel.modules.stand_in import TextMemo, clone, random_states
from diffaccel.runtime.callbacks import Callback
from diffaccel.runtime.checked_sampling import checked_sampling
from diffaccel.runtime.interception import Recording, intercept
from diffaccel.runtime.meter import device_of
from diffaccel.runtime.native import Native
from diffaccel.runtime.partners import opened_partners
from diffaccel.runtime.probe import Opening, arguments_of, check_call, lacking, make_session, no_step
from diffaccel.runtime.stats import Stats
from diffaccel.runtime.stock_call import follow_or_call, own_loop_refusal, rewinder
from diffaccel.session import Lender

logger = logging.getLogger(__name__)


def generate(
    pipe: Any,
    config: SamplerConfig,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    folder: Path | None = None,
    shared: bool = False,
    told: tuple[str, ...] = (),
    beside: tuple[dict[str, Any], ...] = (),
    partners: tuple[Any, ...] = (),
    lender: Lender | None = None,
) -> tuple[Any, Stats]:
    """Run ``call(pipe, *args, **kwargs)`` with the loop of ``config``.

    Args:
        call: the pipeline's stock ``__call__``.
        folder: where a sampler may leave files; None for nowhere.
        shared: whether all processes of the launch make this one call together.
        told: names of the methods on the network that must be told the step of every network call, as only the native
            driver does.
        beside: the options of these methods.
        partners: other pipelines that the sampler composes with this one.
        lender: puts methods on the network for a part of the call, where the sampler asks for it.

    Returns:
        The call's result and the cost of the loop.
    """
    arguments = arguments_of(call, pipe, args, kwargs)
    extras = _Extras(folder, shared, told, beside, partners, lender)

    def follow(begin: Callable[[], None]) -> tuple[Any, Stats]:
        return _follow(pipe, config, call, arguments, extras, begin)

    if getattr(config, "is_stock_rule", False):
        return follow_or_call(pipe, config, call, arguments, follow, told)
    if getattr(pipe, "scheduler", None) is None:
        raise UnsupportedBySampler(
            f"{type(pipe).__name__} has no scheduler, so there is nothing to sample. Accelerate the pipeline whose "
            "result it takes, or remove it here by diffaccel.remove(pipe)."
        )
    return follow(lambda: None)


@dataclass(frozen=True)
class _Extras:
    """What a call gets beside its arguments; see :func:`generate`."""

    folder: Path | None
    shared: bool
    told: tuple[str, ...]
    beside: tuple[dict[str, Any], ...]
    partners: tuple[Any, ...] = ()
    lender: Lender | None = None


def _follow(
    pipe: Any,
    config: SamplerConfig,
    call: Callable[..., Any],
    arguments: dict[str, Any],
    extras: _Extras,
    begin: Callable[[], None],
) -> tuple[Any, Stats]:
    """Run the call in the native driver, or the sampler in the stock loop; call ``begin`` before the first step."""
    drive = functools.partial(_drive, pipe, config, call, arguments, extras, begin)
    family, memo = (find_for_search if config.searches else find)(pipe), TextMemo()
    if family is not None:
        return drive(family, memo)
    is_stock_rule = getattr(config, "is_stock_rule", False)
    memory = CallMemory(pipe, call, arguments)
    try:
        generic, is_recalled = _generic(pipe, call, arguments, memo, memory)
    except NotIdentified as reason:
        if is_stock_rule:
            raise
        if refusal := own_loop_refusal(pipe, config, extras.told, reason):
            raise refusal from reason
        return _generate_stock(pipe, config, call, arguments, memo, reason)
    rewind = rewinder(pipe, arguments)
    try:
        return drive(_exact(generic, is_stock_rule), memo, is_recalled)
    except Outdated as reason:
        logger.info("%s is watched again: %s", type(pipe).__name__, reason)
        memory.forget()
        rewind()
    return _follow(pipe, config, call, arguments, extras, begin)


def _generic(
    pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo, memory: CallMemory
) -> tuple[Generic, bool]:
    """Return the family of a call that none is listed for, and whether it is that of an earlier call."""
    try:
        findings = memory.findings()
        if findings is not None:
            return Generic(findings, pipe, arguments), True
        generic = identify(pipe, call, arguments, memo)
    except NotIdentified as reason:
        memory.keep(reason)
        raise
    memory.keep(generic.findings)
    return generic, False


def _exact(family: Generic, is_stock_rule: bool) -> Generic:
    """Return a family whose rules suffice: under the pipeline's own rule they must be known to the bit."""
    if is_stock_rule and not family.is_exact:
        raise NotIdentified("its rules are known up to rounding only.")
    return family


def _drive(
    pipe: Any,
    config: SamplerConfig,
    call: Callable[..., Any],
    arguments: dict[str, Any],
    extras: _Extras,
    begin: Callable[[], None],
    family: Family,
    memo: TextMemo,
    is_recalled: bool = False,
) -> tuple[Any, Stats]:
    """Run the call in the native driver; with ``is_recalled`` the family is that of an earlier call, to be checked."""
    check_call(family, pipe, arguments)
    initial = {**arguments, "generator": clone(arguments.get("generator"))}
    device = device_of(pipe)
    opening = Opening(pipe, family, call, initial, memo, device, random_states(device))
    callback = _callback(arguments)
    stats: list[Stats] = []

    def run_sampler(recording: Recording) -> Tensor:
        if is_recalled and isinstance(family, Generic):
            family.check_first_step(
                pipe, recording.calls, recording.answers, recording.guided, recording.latents, recording.timestep
            )
        session = make_session(opening, recording, arguments.get("generator"))
        session.stock_levels, session.folder, session.shared = config.state == "stock", extras.folder, extras.shared
        session.beside, session.lender = extras.beside, extras.lender
        options: Any = {"max_batch": config.max_batch or None, "halves": config.searches, "told": extras.told}
        options["guidance_stop"] = getattr(config, "guidance_stop", 1.0)
        driver = Native(session, state=config.state, callback=callback, **options)
        begin()
        with opened_partners(extras.partners, arguments) as session.partners:
            latents = driver.run(checked_sampling(config, session))
        recording.denoised = driver.denoised
        stats.append(driver.stats)
        return latents

    try:
        result = _call_with_loop(opening, arguments, run_sampler)
    except torch.OutOfMemoryError as error:
        raise DiffAccelError(
            f"{error} Out of memory: try a smaller batch or size, {type(config).__name__}(max_batch=1), "
            "pipe.enable_model_cpu_offload() or pipe.vae.enable_tiling()."
        ) from error
    except KeyError as error:
        if stats or (reason := lacking(pipe, arguments, error)) is None:
            raise
        raise reason from error
    if not stats:
        raise no_step(pipe, arguments)
    return result, stats[0]


def _call_with_loop(opening: Opening, arguments: dict[str, Any], loop: Callable[[Recording], Tensor]) -> Any:
    """Run the stock call with ``loop(recording)``, which returns final latents, in the place of its own loop."""
    pipe = opening.pipe
    interrupted, interruptible = False, hasattr(type(pipe), "interrupt")

    def on_first_step(recording: Recording) -> Tensor:
        nonlocal interrupted
        latents = loop(recording)
        interrupted = bool(getattr(pipe, "_interrupt", False))
        if interruptible:  # the stock loop's remaining iterations are skipped, then it decodes
            pipe._interrupt = True
        return latents

    stock_arguments = {**arguments}
    if "callback_on_step_end" in arguments:  # the loop calls it itself
        stock_arguments["callback_on_step_end"] = None

    def restore_interrupt() -> None:
        if interruptible:
            pipe._interrupt = interrupted

    interception = intercept(pipe, opening.family, opening.memo, opening.device, on_first_step)
    with restored(pipe, restore_interrupt), interception:
        return opening.call(pipe, **stock_arguments)


def _generate_stock(
    pipe: Any,
    config: SamplerConfig,
    call: Callable[..., Any],
    arguments: dict[str, Any],
    memo: TextMemo,
    reason: NotIdentified,
) -> tuple[Any, Stats]:
    """Run the sampler inside the stock loop of a pipeline that the native driver cannot follow."""
    from diffaccel.runtime.stock_loop import generate_stock

    warn_once(logger, pipe, "%s runs in its own loop, one guided prediction at a time: %s", type(pipe).__name__, reason)
    try:
        return generate_stock(pipe, config, call, arguments, memo)
    except UnsupportedBySampler as error:
        raise UnsupportedBySampler(f"{error} It was not identified either: {reason}") from error


def _callback(arguments: dict[str, Any]) -> Callback | None:
    function = arguments.get("callback_on_step_end")
    if function is None:
        return None
    inputs = getattr(function, "tensor_inputs", None) or arguments["callback_on_step_end_tensor_inputs"]
    return Callback(function, inputs)
