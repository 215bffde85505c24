"""Installing stand-ins in a whole pipeline while its call is watched, and restoring all that the call changes."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffaccel.modules.guard import contents_of, restored
from diffaccel.modules.stand_in import StandIn, TextMemo, silent_bar
from diffaccel.modules.step_output import StepOutput

# parts of names of components that are no denoiser and that run while the call is prepared
NO_DENOISERS = ("encoder", "vae", "vocoder", "safety", "vqgan", "movq", "connector", "tokenizer", "feature")


def install(
    pipe: Any,
    memo: TextMemo,
    begin: Callable[[], None],
    network: Callable[..., Any],
    step: Callable[[Tensor, Tensor, Any], Tensor],
) -> None:
    """Put stand-ins into a pipeline; :func:`preserved_state` takes them out.

    Args:
        memo: caches encodings of prompts and pictures.
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
    def take_step(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        latents = step(bound["model_output"], bound["sample"], bound["timestep"])
        # the second value is a clean sample, which a loop may go on with
        return StepOutput(latents, latents, latents) if bound.get("return_dict", True) else (latents, latents)

    scheduler.set_timesteps, scheduler.step = set_and_begin, take_step
    if hasattr(scheduler, "scale_model_input"):
        # the native driver scales the network's input itself
        scheduler.scale_model_input = functools.wraps(scheduler.scale_model_input)(lambda sample, *a, **k: sample)
    for name in pipe.config:
        module = vars(pipe).get(name)
        if isinstance(module, torch.nn.Module) and not any(word in name for word in NO_DENOISERS):
            # past DiffusionPipeline.__setattr__, which changes pipe.config
            object.__setattr__(pipe, name, StandIn(module, functools.partial(network, name, module)))
    device = torch.device(pipe._execution_device)
    if hasattr(pipe, "encode_prompt"):
        object.__setattr__(pipe, "encode_prompt", memo.wrap(pipe.encode_prompt, device))
    for name, encoder in memo.picture_encoders(pipe, device).items():
        object.__setattr__(pipe, name, encoder)
    if hasattr(pipe, "progress_bar"):
        object.__setattr__(pipe, "progress_bar", functools.partial(silent_bar, pipe.progress_bar))


def state_of(pipe: Any) -> Callable[[], None]:
    """Return a function that restores what a call changes on a pipeline.

    That is attributes of pipeline, scheduler and guiders, and attention processors.
    """
    components = [vars(pipe).get(name) for name in pipe.config if not name.startswith("_")]
    networks: list[Any] = [c for c in components if isinstance(c, torch.nn.Module)]
    others = [c for c in components if not isinstance(c, torch.nn.Module)]
    helpers = [c for c in others if type(c).__module__.startswith("diffusers.")]
    restores = [contents_of(owner) for owner in (pipe, *helpers)]
    # pipelines with perturbed attention set other processors during a call
    processors = [(network, network.attn_processors) for network in networks if hasattr(network, "set_attn_processor")]

    def restore() -> None:
        for restore_contents in restores:
            restore_contents()
        for network, originals in processors:
            if any(originals[name] is not current for name, current in network.attn_processors.items()):
                network.set_attn_processor(dict(originals))

    return restore


@contextlib.contextmanager
def preserved_state(pipe: Any) -> Iterator[None]:
    """Restore what :func:`state_of` does, and the random states."""
    restore = state_of(pipe)
    device = torch.device(pipe._execution_device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), restored(pipe, restore):
        yield
