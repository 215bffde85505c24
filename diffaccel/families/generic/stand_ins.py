"""Stand-ins for a pipeline's networks and scheduler while its call is watched, and their removal without a trace."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffaccel.modules.stand_in import StandIn, TextMemo, silent_bar

# components that are no denoiser, and that must work while the call prepares itself
NO_DENOISERS = ("encoder", "vae", "vocoder", "safety", "vqgan", "movq", "connector", "tokenizer", "feature")


def replace(
    pipe: Any,
    memo: TextMemo,
    begin: Callable[[], None],
    network: Callable[..., Any],
    step: Callable[[Tensor, Tensor, Any], Tensor],
) -> None:
    """Put stand-ins into a pipeline; :func:`no_trace` takes them out.

    Args:
        begin: called when the scheduler sets its timesteps.
        network: called as ``network(name, module, *args, **kwargs)`` in the place of every component that may be the
            denoiser.
        step: called with output, sample and time in the place of ``scheduler.step``.
    """
    scheduler = pipe.scheduler
    set_timesteps, signature = scheduler.set_timesteps, inspect.signature(scheduler.step)

    @functools.wraps(set_timesteps)  # signatures stay, since pipelines inspect them
    def set_and_begin(*args: Any, **kwargs: Any) -> Any:
        begin()
        return set_timesteps(*args, **kwargs)

    @functools.wraps(scheduler.step)
    def take(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        latents = step(bound["model_output"], bound["sample"], bound["timestep"])
        # the second value is CogVideoXDPMScheduler's previous prediction
        return SimpleNamespace(prev_sample=latents) if bound.get("return_dict", True) else (latents, None)

    scheduler.set_timesteps, scheduler.step = set_and_begin, take
    if hasattr(scheduler, "scale_model_input"):
        # the native driver scales the network's input itself
        scheduler.scale_model_input = functools.wraps(scheduler.scale_model_input)(lambda sample, *a, **k: sample)
    for name in pipe.config:
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module) and not any(word in name for word in NO_DENOISERS):
            # past DiffusionPipeline.__setattr__, which would rewrite pipe.config
            object.__setattr__(pipe, name, StandIn(module, functools.partial(network, name, module)))
    if hasattr(pipe, "encode_prompt"):
        object.__setattr__(pipe, "encode_prompt", memo.wrap(pipe.encode_prompt))
    if hasattr(pipe, "progress_bar"):
        object.__setattr__(pipe, "progress_bar", functools.partial(silent_bar, pipe.progress_bar))


@contextlib.contextmanager
def no_trace(pipe: Any) -> Iterator[None]:
    """Put back afterwards what a call changes: attributes of pipeline, scheduler and guiders, attention processors and
    random states."""
    parts = [getattr(pipe, name, None) for name in pipe.config if not name.startswith("_")]
    ours = [p for p in parts if type(p).__module__.startswith("diffusers.") and not isinstance(p, torch.nn.Module)]
    before = [(thing, dict(vars(thing))) for thing in (pipe, *ours)]
    # pipelines of perturbed attention give their network other processors for the time of a call
    networks: list[Any] = [p for p in parts if isinstance(p, torch.nn.Module) and hasattr(p, "set_attn_processor")]
    processors = [(network, network.attn_processors) for network in networks]
    device = torch.device(pipe._execution_device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for thing, attributes in before:
                vars(thing).clear()
                vars(thing).update(attributes)
            for network, own in processors:
                if any(own[name] is not other for name, other in network.attn_processors.items()):
                    network.set_attn_processor(dict(own))
