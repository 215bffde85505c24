"""Substitutes for a pipeline's networks and first ``scheduler.step`` while its own ``__call__`` prepares a call.

The pipeline encodes prompts, draws latents, computes time ids and timesteps as it always does; its network is replaced
by a recorder that evaluates nothing and answers with known random tensors.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel import schedules
from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family
from diffaccel.modules.guard import attributes_of, restored
from diffaccel.modules.stand_in import (
    PICTURE_ENCODERS,
    StandIn,
    TextMemo,
    by_name,
    network_arguments,
    random_like,
    silent_bar,
    uncompiled,
)
from diffaccel.modules.step_output import NetworkOutput, StepOutput

NOISING = ("add_noise", "scale_noise")  # methods of schedulers by which pipelines begin at an image


@dataclass(eq=False)
class Recording:
    """A pipeline call up to its first ``scheduler.step``.

    Attributes:
        calls: the network's arguments, call by call.
        answers: the random tensors that it was given for predictions.
        guided: what the pipeline made of them, ``model_output`` of the scheduler's step.
        positional: names of the network's arguments that were passed by position.
        returns: ``return_dict`` of the network's calls, where they say it.
        latents: ``sample`` of the scheduler's step.
        denoised: the last clean sample where the scheduler's step returns one besides the latents; set by the loop.
        step_arguments: further arguments of the scheduler's step, such as ``eta``.
        noised: clean latents and the noise that the scheduler added to them, where it did; of an image to begin at.
        prepared: results of the pipeline's methods that the family asks for, by name.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    positional: tuple[str, ...] = ()
    returns: dict[str, Any] = field(default_factory=dict)
    guided: Tensor | None = None
    latents: Tensor | None = None
    timestep: Any = None
    denoised: Tensor | None = None
    step_arguments: dict[str, Any] = field(default_factory=dict)
    noised: tuple[Tensor, Tensor] | None = None
    prepared: dict[str, Any] = field(default_factory=dict)

    def note_noise(self, arguments: dict[str, Any]) -> None:
        """Take over the arguments of the scheduler's ``add_noise`` or ``scale_noise``, by name."""
        clean, noise = arguments.get("original_samples", arguments.get("sample")), arguments.get("noise")
        if isinstance(clean, Tensor) and isinstance(noise, Tensor):
            self.noised = clean, noise

    def note_step(self, arguments: dict[str, Any]) -> None:
        """Take over the arguments of ``scheduler.step``, by name."""
        self.guided, self.latents = arguments.pop("model_output"), arguments.pop("sample")
        self.timestep = arguments.pop("timestep")
        self.step_arguments = dict(arguments)
        self.step_arguments.pop("return_dict", None)


@contextlib.contextmanager
def intercept(
    pipe: Any, family: Family, memo: TextMemo, device: torch.device, on_first_step: Callable[[Recording], Any]
) -> Iterator[None]:
    """Record the pipeline's network while open, and make its first ``scheduler.step`` ``on_first_step(recording)``.

    Everything is put back before ``on_first_step`` runs, and in any case at the end. A pipeline that cannot be
    interrupted goes on with its loop afterwards: network and scheduler then do nothing, so that it takes no time.
    """
    recording = Recording()
    substitutes = _Substitutes(pipe, family, memo, device, recording)
    scheduler, step_signature = pipe.scheduler, inspect.signature(pipe.scheduler.step)

    def first_step(*args: Any, **kwargs: Any) -> Any:
        recording.note_step(by_name(step_signature.bind(*args, **kwargs)))
        substitutes.remove()
        steps_left = len(scheduler.timesteps) - schedules.start_index(scheduler, recording.timestep)
        latents = on_first_step(recording)

        def later_step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps_left
            steps_left -= 1
            if steps_left <= 0:  # the loop ends: offloading hooks that the call then moves need the real network
                substitutes.remove()
            # some pipelines decode the second value, a clean sample; at the end of other samplers it is the latents
            denoised = latents if recording.denoised is None else recording.denoised
            if kwargs.get("return_dict", True):
                return StepOutput(latents, denoised, denoised)
            return (latents, denoised)

        substitutes.install(later_step)
        if family.prepares:  # what it lays its image into is the end already, where the image has no noise
            substitutes.add_no_noise()
        if hasattr(type(pipe), "interrupt"):  # the rest of the loop is skipped, or at least changes nothing
            substitutes.restore_networks()
        return later_step(**kwargs)

    with restored(pipe, substitutes.remove):
        substitutes.install(first_step)
        yield


class _Substitutes:
    """Recording networks, a step function, cached text encodings and a silent progress bar for one pipeline."""

    def __init__(self, pipe: Any, family: Family, memo: TextMemo, device: torch.device, recording: Recording) -> None:
        self.pipe, self.family, self.memo, self.device, self.recording = pipe, family, memo, device, recording
        self.networks = family.networks(pipe)
        self.scheduler, self.original_step = pipe.scheduler, pipe.scheduler.step
        # a method that the user replaced on the instance stays
        self.methods = [
            name for name in ("encode_prompt", "progress_bar") if name not in pipe.__dict__ and hasattr(pipe, name)
        ]
        self.is_installed = False
        self.restore_pipe = attributes_of(pipe, [*self.networks, *self.methods, *family.prepares, *PICTURE_ENCODERS])
        self.restore_scheduler = attributes_of(self.scheduler, ["step", *NOISING])
        for name, network in self.networks.items():
            if type(network) is StandIn:  # its class is the network's
                raise DiffAccelError(
                    f"{type(pipe).__name__} is called by one of its own parts while it prepares a call, "
                    "which cannot be followed. Call another pipeline there."
                )
            if hasattr(uncompiled(network), "_cp_config") or hasattr(network, "_cp_shard_fn"):
                raise DiffAccelError(
                    f"The {name} of {type(pipe).__name__} is split over devices by context parallelism, "
                    "which cannot be probed yet. Load it without parallel_config."
                )

    def install(self, step: Callable[..., Any]) -> None:
        """Replace the networks by recorders and ``scheduler.step`` by ``step``."""
        pipe = self.pipe
        self.is_installed = True
        for name, network in self.networks.items():  # past DiffusionPipeline.__setattr__, which changes pipe.config
            object.__setattr__(pipe, name, _recorder(network, self.recording, self.family))
        self.scheduler.step = functools.wraps(self.original_step)(step)
        if self.recording.latents is None:
            for name in NOISING:
                if hasattr(self.scheduler, name):
                    setattr(self.scheduler, name, _noted(getattr(self.scheduler, name), self.recording))
            for name in filter(functools.partial(hasattr, pipe), self.family.prepares):
                object.__setattr__(pipe, name, _kept(getattr(pipe, name), self.recording.prepared, name))
        if "encode_prompt" in self.methods:
            object.__setattr__(pipe, "encode_prompt", self.memo.wrap(pipe.encode_prompt, self.device))
        if self.recording.latents is None and self.memo.has_pictures():  # afterwards the VAE decodes
            for name, encoder in self.memo.picture_encoders(pipe, self.device).items():
                object.__setattr__(pipe, name, encoder)
        if "progress_bar" in self.methods:  # the loop that follows brings its own bar
            object.__setattr__(pipe, "progress_bar", functools.partial(silent_bar, pipe.progress_bar))

    def remove(self) -> None:
        """Put everything back, unless that is done."""
        if self.is_installed:
            self.restore_pipe()
            self.restore_scheduler()
            self.is_installed = False

    def add_no_noise(self) -> None:
        """Make the scheduler leave as it is what it is to add noise to, the first argument."""
        for name in filter(functools.partial(hasattr, self.scheduler), NOISING):
            setattr(self.scheduler, name, lambda clean, *args, **kwargs: clean)

    def restore_networks(self) -> None:
        """Put back the networks alone."""
        for name, network in self.networks.items():
            object.__setattr__(self.pipe, name, network)


def _noted(method: Callable[..., Any], recording: Recording) -> Callable[..., Any]:
    """Return a scheduler's method that also records what noise is added to."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def noted(*args: Any, **kwargs: Any) -> Any:
        recording.note_noise(by_name(signature.bind(*args, **kwargs)))
        return method(*args, **kwargs)

    return noted


def _kept(method: Callable[..., Any], results: dict[str, Any], name: str) -> Callable[..., Any]:
    """Return a pipeline's method that also keeps its result."""

    @functools.wraps(method)
    def kept(*args: Any, **kwargs: Any) -> Any:
        results[name] = method(*args, **kwargs)
        return results[name]

    return kept


def _recorder(network: Any, recording: Recording, family: Family) -> StandIn:
    """Return a network that answers at random and records its arguments and answers."""

    def called(*args: Any, **kwargs: Any) -> Any:
        arguments = network_arguments(network, args, kwargs)
        recording.calls.append(arguments)
        recording.positional = tuple(arguments)[: len(args)]
        recording.returns = {name: arguments[name] for name in ("return_dict",) if name in arguments}
        latents = arguments[family.latent_arg]
        answer = random_like(latents, family.output_shape(network, latents), len(recording.calls))
        recording.answers.append(answer)
        return NetworkOutput(sample=answer) if arguments.get("return_dict", True) else (answer,)

    return StandIn(network, called)
