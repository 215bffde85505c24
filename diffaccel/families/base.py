"""What a method must know of a pipeline family, and nothing more: names, layout, time convention, guidance rule.

A family is stateless. Everything else, prompts, time ids, rope, latents, IP adapters, is prepared by the pipeline
itself while it is probed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families import rows
from diffaccel.session import Conditioning


class Family:
    """Facts and small rules of one family of diffusers pipelines.

    Class attributes:
        name: short name used in messages and records.
        pipelines: diffusers class names whose instances (and subclasses) belong here.
        denoiser: attribute of the pipeline that holds the network.
        latent_arg, time_arg: the network's argument names for its input and its time.
        row_args: network arguments with one row per sample, dotted into dicts; lists of tensors count by tensor.
        shared_args: further arguments that are understood and the same for every row.
        other_denoisers: attributes of further networks that take over at other noise levels, where there are any.
        joint_branches: whether negative and positive rows go through one network call.
        negative_first: which of them come first then.
        casts_latents: whether the pipeline gives its latents their first dtype again after every step.
        callback_args: names a step callback may ask for, and the network argument each one is.
        size_multiple: picture sides must be multiples of this.
        fps: frames a second of the videos that a video model was trained on.
    """

    name: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]
    denoiser: ClassVar[str] = "transformer"
    latent_arg: ClassVar[str] = "hidden_states"
    time_arg: ClassVar[str] = "timestep"
    row_args: ClassVar[tuple[str, ...]] = ()
    shared_args: ClassVar[tuple[str, ...]] = ()
    other_denoisers: ClassVar[tuple[str, ...]] = ()
    joint_branches: ClassVar[bool] = True
    negative_first: ClassVar[bool] = True
    casts_latents: ClassVar[bool] = False
    callback_args: ClassVar[dict[str, str]] = {}
    size_multiple: ClassVar[int] = 16
    fps: ClassVar[float] = 16.0

    # -- network -------------------------------------------------------------------------------------------------

    def networks(self, pipe: Any) -> dict[str, Any]:
        """Attribute and module of every network that a call may evaluate."""
        found = {name: getattr(pipe, name, None) for name in (self.denoiser, *self.other_denoisers)}
        return {name: module for name, module in found.items() if module is not None}

    def network(self, pipe: Any, timestep: Tensor) -> Any:
        """The network for the schedule's ``timestep`` (scalar or one per row)."""
        return getattr(pipe, self.denoiser)

    def input_dtype(self, session: Any) -> torch.dtype:
        """In which dtype latents go into the network: the pipeline's own."""
        return session.dtype

    def output_shape(self, network: Any, like: Tensor) -> tuple[int, ...]:
        """The shape of the network's output for latents shaped as ``like``."""
        return tuple(like.shape)

    def prediction(self, out: Tensor, like: Tensor) -> Tensor:
        """The part of the network's output that predicts, without a learned variance."""
        return out

    # -- guidance ------------------------------------------------------------------------------------------------

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        """The scale that joins the branches now, or None when only the positive branch is evaluated.

        ``timestep`` is the schedule's, where the scale depends on it; None for the first of a call. Read from the
        pipeline at every call, since callbacks may switch guidance off half-way.
        """
        return float(pipe.guidance_scale) if pipe.do_classifier_free_guidance else None

    def combine(self, pipe: Any, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance, ``negative + scale (positive - negative)`` (arXiv 2207.12598)."""
        return negative + scale * (positive - negative)

    def branches(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The negative and the positive rows of a joint call."""
        first, second = both.chunk(2)
        return (first, second) if self.negative_first else (second, first)

    def join_branches(self, negative: dict[str, Any], positive: dict[str, Any]) -> dict[str, Any]:
        """The network's arguments of a joint call."""
        return self.join_rows([negative, positive] if self.negative_first else [positive, negative])

    def is_linear(self, pipe: Any) -> bool:
        """Whether the guided output is the linear combination above, which the probe then checks."""
        return True

    def refuse(self, arguments: dict[str, Any]) -> None:
        """Raise for call arguments whose rule depends on the step index, which a sampler's own steps do not share."""

    # -- layout --------------------------------------------------------------------------------------------------

    def unwrap(self, latents: Tensor, arguments: dict[str, Any]) -> Tensor:
        """One row per sample of the latents that the pipeline steps its scheduler with."""
        return latents

    def wrap(self, rows: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The inverse of :meth:`unwrap`."""
        return rows

    def to_network(self, x: Tensor) -> Tensor:
        """Spatial latents ``(R, C, H, W)`` in the network's layout."""
        return x

    def from_network(self, out: Tensor, like: Tensor) -> Tensor:
        """The network's output as spatial latents of the shape of ``like``."""
        return out

    def spatial(self, latents: Tensor, height: int, width: int) -> Tensor:
        """The pipeline's latents as spatial ones."""
        return latents

    def time(self, pipe: Any, timestep: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The network's time argument for its input ``x``, from the schedule's timestep (scalar or one per row).

        ``dtype`` is that of the pipeline's own latents. Some pipelines keep their timesteps on the CPU.
        """
        return timestep.expand(len(x)).to(x.device)

    # -- size ----------------------------------------------------------------------------------------------------

    def size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        """Height and width in pixels of a call, with the pipeline's own default."""
        default = pipe.default_sample_size * pipe.vae_scale_factor
        return int(arguments.get("height") or default), int(arguments.get("width") or default)

    def multiple(self, pipe: Any) -> int:
        """What both sides of a picture must be multiples of."""
        return self.size_multiple

    def check_size(self, pipe: Any, height: int, width: int) -> None:
        """Raise with the nearest valid size when a side does not fit the model."""
        step = self.multiple(pipe)
        if height % step or width % step or min(height, width) <= 0:
            near = [max(step, round(side / step) * step) for side in (height, width)]
            raise DiffAccelError(
                f"The size {height}x{width} does not fit {type(pipe).__name__}: sides must be multiples of {step}. "
                f"The nearest valid size is {near[0]}x{near[1]}."
            )

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """Changes to a call's arguments that make the same picture at another resolution."""
        if "height" not in arguments:
            raise DiffAccelError(
                f"A pipeline of the {self.name} family draws at one size only, that of its network; "
                f"{height}x{width} was asked for. Use a sampler that keeps the resolution."
            )
        return {"height": height, "width": width}

    # -- decode --------------------------------------------------------------------------------------------------

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Pixels ``(B, 3, H, W)`` or ``(B, 3, F, H, W)`` in [-1, 1] of clean latents, as the pipeline decodes."""
        raise NotImplementedError

    # -- conditioning --------------------------------------------------------------------------------------------

    def conditioning(self, pipe: Any, calls: list[dict[str, Any]], arguments: dict[str, Any]) -> Conditioning:
        """Sort what the pipeline passed to its network in one step into branches."""
        for call in calls:
            known = {self.latent_arg, self.time_arg, "return_dict", *self.shared_args}
            known |= {name.split(".")[0] for name in self.row_args}
            strange = [name for name, value in call.items() if value is not None and name not in known]
            if strange:
                raise DiffAccelError(
                    f"{type(pipe).__name__} passed {', '.join(strange)} to its network, which the {self.name} family "
                    "cannot follow. Call without the option that causes it, or diffaccel.remove(pipe)."
                )
        kept = [{k: v for k, v in call.items() if k not in (self.latent_arg, self.time_arg)} for call in calls]
        guided = self.guidance_scale(pipe, arguments) is not None
        if not guided:
            return Conditioning(kept[0], None, None, arguments)
        if self.joint_branches:
            negative, positive = (
                self.map_rows(kept[0], lambda tensor, i=i: self.branches(tensor)[i])  # type: ignore[misc]
                for i in (0, 1)
            )
            return Conditioning(positive, negative, kept[0], arguments)
        return Conditioning(kept[0], kept[1], None, arguments)

    def map_rows(self, kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """``kwargs`` with ``change`` applied to every tensor that has one row per sample."""
        return rows.map_rows(kwargs, self.row_args, change)

    def join_rows(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        """Several sets of network arguments as one, rows concatenated in order."""
        return rows.join_rows(parts, self.row_args)


def true_cfg_scale(arguments: dict[str, Any]) -> float | None:
    """Guidance beside an embedded scale: on where a negative prompt was given and ``true_cfg_scale`` is above 1."""
    negative = arguments.get("negative_prompt") is not None or (
        arguments.get("negative_prompt_embeds") is not None
        and arguments.get("negative_pooled_prompt_embeds") is not None
    )
    scale = float(arguments["true_cfg_scale"])
    return scale if scale > 1 and negative else None


def signature_of(module: Any) -> inspect.Signature:
    """The signature of a network's forward, seen through ``torch.compile``."""
    return inspect.signature(type(getattr(module, "_orig_mod", module)).forward)
