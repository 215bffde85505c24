"""What a method must know of a pipeline family, and nothing more: names, layout, time convention, guidance rule.

A family is stateless. Everything else, prompts, time ids, rope, latents, IP adapters, is prepared by the pipeline
itself while it is probed.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.guidance import Guided


class Family(Guided):
    """Facts and small rules of one family of diffusers pipelines.

    Class attributes, beside those of :class:`~diffaccel.families.guidance.Guided`:
        pipelines: diffusers class names whose instances (and subclasses) belong here.
        denoiser: attribute of the pipeline that holds the network.
        other_denoisers: attributes of further networks that take over at other noise levels, where there are any.
        casts_latents: whether the pipeline gives its latents their first dtype again after every step.
        callback_args: names a step callback may ask for, and the network argument each one is.
        size_multiple: picture sides must be multiples of this.
        fps: frames a second of the videos that a video model was trained on.
    """

    pipelines: ClassVar[tuple[str, ...]]
    denoiser: ClassVar[str] = "transformer"
    other_denoisers: ClassVar[tuple[str, ...]] = ()
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
