"""Stop a pipeline's own ``__call__`` at its first ``scheduler.step`` and see what it prepared.

The pipeline encodes prompts, draws latents, computes time ids and timesteps as it always does; its network is replaced
by a recorder that costs nothing. What the recorder saw is all that a family does before its loop, so nothing of it is
written again here. Because the recorder answers with known random tensors, the guidance rule that the pipeline applied
to them can be checked against the one that the family declares.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffaccel import schedules
from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family
from diffaccel.modules.stand_in import StandIn, TextMemo, clone, network_arguments, random_like, silent_bar, uncompiled
from diffaccel.session import Session

GUIDANCE_TOLERANCE = 1e-4


@dataclass(eq=False)
class Recording:
    """What one probe saw: the network's arguments call by call, its answers, and the first ``scheduler.step``."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    guided: Tensor | None = None
    latents: Tensor | None = None
    timestep: Any = None
    step_arguments: dict[str, Any] = field(default_factory=dict)


def _recorder(module: Any, recording: Recording, family: Family) -> StandIn:
    """A network that answers at random, and notes what it was called with and what it answered."""

    def called(*args: Any, **kwargs: Any) -> Any:
        given = network_arguments(module, args, kwargs)
        recording.calls.append(given)
        like = given[family.latent_arg]
        out = random_like(like, family.output_shape(module, like), len(recording.calls))
        recording.outputs.append(out)
        return SimpleNamespace(sample=out) if given.get("return_dict", True) else (out,)

    return StandIn(module, called)


class _Stop(Exception):
    """Unwinds a probed call."""


@contextlib.contextmanager
def intercept(pipe: Any, family: Family, memo: TextMemo, on_first_step: Callable[[Recording], Any]) -> Iterator[None]:
    """While open, the pipeline's network records, and its first ``scheduler.step`` is ``on_first_step(recording)``.

    Everything is put back before ``on_first_step`` runs, and in any case at the end. A pipeline that cannot be
    interrupted goes on with its loop afterwards: network and scheduler then do nothing, so that it costs nothing.
    """
    recording = Recording()
    networks, scheduler = family.networks(pipe), pipe.scheduler
    for name, network in networks.items():
        if hasattr(uncompiled(network), "_cp_config") or hasattr(network, "_cp_shard_fn"):
            raise DiffAccelError(
                f"The {name} of {type(pipe).__name__} is split over devices by context parallelism, "
                "which cannot be probed yet. Load it without parallel_config."
            )
    ours = [name for name in ("encode_prompt", "progress_bar") if name not in pipe.__dict__ and hasattr(pipe, name)]
    original_step = scheduler.step
    signature = inspect.signature(original_step)
    open_now = False

    def replace(step: Callable[..., Any]) -> None:
        nonlocal open_now
        open_now = True
        for name, network in networks.items():  # past DiffusionPipeline.__setattr__, which would rewrite pipe.config
            object.__setattr__(pipe, name, _recorder(network, recording, family))
        scheduler.step = functools.wraps(original_step)(step)
        if "encode_prompt" in ours:
            object.__setattr__(pipe, "encode_prompt", memo.wrap(pipe.encode_prompt))
        if "progress_bar" in ours:  # the loop that follows brings its own bar
            object.__setattr__(pipe, "progress_bar", functools.partial(silent_bar, pipe.progress_bar))

    def close() -> None:
        nonlocal open_now
        if open_now:
            open_now = False
            for name, network in networks.items():
                object.__setattr__(pipe, name, network)
            del scheduler.step
            for name in ours:
                pipe.__dict__.pop(name, None)

    def first_step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        recording.guided, recording.latents = bound.pop("model_output"), bound.pop("sample")
        recording.timestep = bound.pop("timestep")
        recording.step_arguments = {**bound.pop("kwargs", {}), **bound}
        recording.step_arguments.pop("return_dict", None)
        close()
        left = len(scheduler.timesteps) - schedules.begin(scheduler, recording.timestep)
        latents = on_first_step(recording)

        def answer(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0:  # the loop ends: offloading hooks that the call then moves need the real network
                close()
            if kwargs.get("return_dict", True):
                return SimpleNamespace(prev_sample=latents)
            return (latents, None)  # the second value is CogVideoXDPMScheduler's previous prediction

        replace(answer)
        if hasattr(type(pipe), "interrupt"):  # the rest of the loop is skipped, or at least changes nothing
            for name, network in networks.items():
                object.__setattr__(pipe, name, network)
        return answer(**kwargs)

    replace(first_step)
    try:
        yield
    finally:
        close()


def check_guidance(family: Family, pipe: Any, recording: Recording, arguments: dict[str, Any]) -> None:
    """Compare the rule that the pipeline applied to the recorder's answers with the one the family declares.

    Solves ``guided = w_neg negative + w_pos positive`` by least squares; ``(1 - s, s)`` is classifier-free guidance.
    """
    scale = family.guidance_scale(pipe, arguments, recording.timestep)
    if not family.is_linear(pipe):
        return
    inputs = [call[family.latent_arg] for call in recording.calls]
    outputs = [family.prediction(out, like) for out, like in zip(recording.outputs, inputs, strict=True)]
    if scale is None:
        columns, expected = [outputs[0]], [1.0]
    elif family.joint_branches:
        columns, expected = list(family.branches(outputs[0])), [1 - scale, scale]
    else:
        columns, expected = [outputs[1], outputs[0]], [1 - scale, scale]
    guided = None if recording.guided is None else family.unwrap(recording.guided, arguments)
    if guided is None or columns[0].numel() != guided.numel():
        raise DiffAccelError(f"{type(pipe).__name__} steps with something other than its network's guided output.")
    basis = torch.stack([c.double().flatten() for c in columns], dim=1)
    target = guided.double().flatten()
    # normal equations: two columns of independent noise are as good as orthogonal, and only 2x2 leaves the device
    gram, moment = (basis.T @ basis).cpu(), (basis.T @ target).cpu()
    fit = torch.linalg.solve(gram, moment)
    residual = (basis @ fit.to(basis.device) - target).norm().cpu() / target.norm().cpu()
    wrong = max(abs(float(w) - e) for w, e in zip(fit, expected, strict=True))
    if residual > GUIDANCE_TOLERANCE or wrong > GUIDANCE_TOLERANCE * max(1.0, abs(scale or 1.0)):
        raise DiffAccelError(
            f"{type(pipe).__name__} does not combine its predictions by classifier-free guidance of scale {scale} "
            f"(fitted weights {[round(float(w), 4) for w in fit]}, residual {float(residual):.1e}). Non-linear rules "
            "cannot be followed by a sampler: call without them, or diffaccel.remove(pipe)."
        )


def arguments_of(call: Callable[..., Any], pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A pipeline call's arguments by name, defaults filled in; wrong ones raise as the call itself would."""
    bound = inspect.signature(call).bind(pipe, *args, **kwargs)
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    arguments.pop("self")
    arguments.update(arguments.pop("kwargs", None) or {})
    return arguments


def probe(pipe: Any, family: Family, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo) -> Session:
    """Open a session by running ``call`` up to its first step, and leave no trace of it in the pipeline."""
    with _private_state_kept(pipe):
        return _probe(pipe, family, call, arguments, memo)


def _probe(pipe: Any, family: Family, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo) -> Session:
    """As :func:`probe`, but the pipeline keeps what its call noted in private attributes, such as the guidance."""
    scheduler_state = dict(pipe.scheduler.__dict__)
    generator = clone(arguments.get("generator"))
    opened: list[Session] = []
    quiet = {"callback_on_step_end": None, "output_type": "latent", "return_dict": False, "generator": clone(generator)}

    def on_first_step(recording: Recording) -> Any:
        after = given["generator"]
        session = make_session(pipe, family, call, recording, {**arguments, "generator": generator}, memo, after)
        session.scheduler = _copy(pipe.scheduler)  # the pipeline's own goes back to what it was
        opened.append(session)
        raise _Stop

    given = {**arguments, **{k: v for k, v in quiet.items() if k in arguments}}
    global_rng = torch.random.get_rng_state() if generator is None else None
    try:
        with intercept(pipe, family, memo, on_first_step):
            call(pipe, **given)
    except _Stop:
        pass
    finally:
        if global_rng is not None:
            torch.random.set_rng_state(global_rng)
        pipe.scheduler.__dict__.clear()
        pipe.scheduler.__dict__.update(scheduler_state)
    if not opened:
        raise DiffAccelError(
            f"{type(pipe).__name__} finished without a single scheduler step. Ask for at least one inference step."
        )
    return opened[0]


def _copy(scheduler: Any) -> Any:
    """A scheduler of the same state whose steps leave this one alone; tensors are replaced by steps, lists changed."""
    other = copy.copy(scheduler)
    other.__dict__.update({k: list(v) for k, v in scheduler.__dict__.items() if isinstance(v, list)})
    return other


@contextlib.contextmanager
def _private_state_kept(pipe: Any) -> Iterator[None]:
    """Restore the pipeline's private attributes, where a call notes guidance scale, step count and the like."""
    private = {k: v for k, v in pipe.__dict__.items() if k.startswith("_") and k != "_internal_dict"}
    try:
        yield
    finally:
        for name in [k for k in pipe.__dict__ if k.startswith("_") and k not in private and k != "_internal_dict"]:
            del pipe.__dict__[name]
        pipe.__dict__.update(private)


def make_session(
    pipe: Any,
    family: Family,
    call: Callable[..., Any],
    recording: Recording,
    arguments: dict[str, Any],
    memo: TextMemo,
    generator: Any,
) -> Session:
    """The session of a recorded first step. ``generator`` is in the state the pipeline left it in."""
    latents = recording.latents
    if latents is None:
        raise DiffAccelError(f"{type(pipe).__name__} passed no sample to its scheduler.")
    check_guidance(family, pipe, recording, arguments)
    height, width = family.size(pipe, arguments)
    schedule: schedules.Schedule | DiffAccelError
    try:
        schedule = schedules.read(pipe.scheduler, recording.timestep)
    except DiffAccelError as error:  # for whoever asks: the scheduler's own steps do without
        schedule = error
    start = arguments.get("generator")

    def reopen(fresh_text: bool = False, **changes: Any) -> Session:
        changed = {**arguments, "generator": clone(start), **changes}
        return probe(pipe, family, call, changed, TextMemo() if fresh_text else memo)

    return Session(
        pipe=pipe,
        family=family,
        scheduler=pipe.scheduler,
        conds=[family.conditioning(pipe, recording.calls, arguments)],
        latents=latents,
        timesteps=pipe.scheduler.timesteps[schedules.begin(pipe.scheduler, recording.timestep) :],
        step_arguments=recording.step_arguments,
        read_schedule=schedule,
        dtype=latents.dtype,
        height=height,
        width=width,
        generator=generator,
        reopen=reopen,
    )


@contextlib.contextmanager
def open_session(pipe: Any, **arguments: Any) -> Iterator[Session]:
    """A session of a pipeline call, for looking at or driving by hand; afterwards the pipeline is as it was.

    ``arguments`` are those of ``pipe(...)``. The caller's generators are not advanced.

    Raises:
        DiffAccelError: for a pipeline of no family that cannot be identified, or options that a sampler cannot follow.
    """
    from diffaccel.families import FAMILIES, find
    from diffaccel.families.generic import identify
    from diffaccel.families.generic.watching import NotIdentified

    call, memo = stock_call(type(pipe)), TextMemo()
    full = arguments_of(call, pipe, (), arguments)
    try:
        family = find(pipe) or identify(pipe, call, full, memo)
    except NotIdentified as refusal:
        raise DiffAccelError(
            f"No family for {type(pipe).__name__}, and none can be made from its call: {refusal} "
            f"Supported pipelines: {', '.join(sorted(FAMILIES))}."
        ) from refusal
    check_call(family, pipe, full)
    with _private_state_kept(pipe):
        try:
            yield _probe(pipe, family, call, full, memo)
        finally:
            pipe.maybe_free_model_hooks()


def check_call(family: Family, pipe: Any, arguments: dict[str, Any]) -> None:
    """Refuse what no sampler can follow, before anything is computed."""
    family.refuse(arguments)
    family.check_size(pipe, *family.size(pipe, arguments))
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
    """The ``__call__`` that diffusers wrote, below any wrapper of ours."""
    call = cls.__call__
    return getattr(call, "stock_call", call)
