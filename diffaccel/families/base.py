"""The base of pipeline families: names, layout, time convention and guidance rule, as methods need to know them.

A family is stateless. Everything else (prompts, time ids, rotary embeddings, latents, IP adapters) is prepared by the
pipeline itself while it is probed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.families.guidance import Guided
from diffaccel.modules.stand_in import TextMemo


class Family(Guided):
    """Facts and small rules of one family of diffusers pipelines.

    Class attributes, beside those of :class:`~diffaccel.families.guidance.Guided`:
        pipelines: diffusers class names whose instances (and subclasses) belong here.
        denoiser: attribute of the pipeline that holds the network.
        other_denoisers: attributes of further networks that replace it at other noise levels, where there are any.
        casts_latents: whether the pipeline casts its latents back to their first dtype after every step.
        callback_args: names that a step callback may ask for, and the network argument of each.
        negative_callback_args: the same for names of the negative branch. Where both branches go through one call, the
            pipeline joins them before its loop, so that a callback sees the negative rows but does not change them.
        checked_multiple: the pipeline's own check of its arguments takes sides that are multiples of this only.
        rounds: whether it rounds these down to what it can draw; else it fails on other ones later.
        has_sizes: whether a call chooses the size of its picture.
        draws_pixels: whether :meth:`decode` and :meth:`encode` work between steps.
        prepares: the pipeline's methods whose results tell what region of an image it keeps, where it keeps one.
        fps: frame rate of the videos that a video model was trained on.
    """

    pipelines: ClassVar[tuple[str, ...]]
    denoiser: ClassVar[str] = "transformer"
    other_denoisers: ClassVar[tuple[str, ...]] = ()
    casts_latents: ClassVar[bool] = False
    callback_args: ClassVar[dict[str, str]] = {}
    negative_callback_args: ClassVar[dict[str, str]] = {}
    checked_multiple: ClassVar[int] = 1
    rounds: ClassVar[bool] = False
    has_sizes: ClassVar[bool] = True
    draws_pixels: ClassVar[bool] = True
    prepares: ClassVar[tuple[str, ...]] = ()
    fps: ClassVar[float] = 16.0

    # -- network -------------------------------------------------------------------------------------------------

    def networks(self, pipe: Any) -> dict[str, Any]:
        """Return every network that a call may evaluate, by attribute name."""
        modules = {name: getattr(pipe, name, None) for name in (self.denoiser, *self.other_denoisers)}
        return {name: module for name, module in modules.items() if module is not None}

    def callback_names(self) -> list[str]:
        """Return the names of all tensors that a step callback may ask for."""
        return ["latents", *self.callback_args, *self.negative_callback_args]

    def network(self, pipe: Any, timestep: Tensor) -> Any:
        """Return the network for the schedule's ``timestep`` (scalar or one per row)."""
        return getattr(pipe, self.denoiser)

    def input_dtype(self, session: Any) -> torch.dtype:
        """Return the dtype of the network's latent input: that of the pipeline's latents."""
        return session.dtype

    def output_shape(self, network: Any, like: Tensor) -> tuple[int, ...]:
        """Return the shape of the network's output for latents shaped as ``like``."""
        return tuple(like.shape)

    def prediction(self, out: Tensor, like: Tensor) -> Tensor:
        """Return the network's prediction: its output without a learned variance."""
        return out

    # -- layout --------------------------------------------------------------------------------------------------

    def unwrap(self, latents: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return one row per sample of the latents that the pipeline steps its scheduler with."""
        return latents

    def wrap(self, rows: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Invert :meth:`unwrap`."""
        return rows

    def to_network(self, x: Tensor) -> Tensor:
        """Convert spatial latents ``(R, C, H, W)`` to the network's layout."""
        return x

    def from_network(self, out: Tensor, like: Tensor) -> Tensor:
        """Convert the network's output to spatial latents of the shape of ``like``."""
        return out

    def spatial(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Convert the pipeline's latents, one row per sample, to spatial ones, for a picture of this size."""
        return latents

    def time(self, pipe: Any, timestep: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the network's time argument for its input ``x`` at a timestep (scalar or one per row).

        ``dtype`` is that of the pipeline's own latents. Some pipelines keep their timesteps on the CPU.
        """
        return timestep.expand(len(x)).to(x.device)

    # -- size ----------------------------------------------------------------------------------------------------

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        """Return height and width in pixels that a call asks for, with the pipeline's own default."""
        default = pipe.default_sample_size * pipe.vae_scale_factor
        return int(arguments.get("height") or default), int(arguments.get("width") or default)

    def size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        """Return height and width in pixels of the picture that the pipeline draws."""
        grid = self.grid(pipe)
        height, width = self.asked_size(pipe, arguments)
        return height // grid * grid, width // grid * grid

    def grid(self, pipe: Any) -> int:
        """Return the side in pixels of what the network sees as one: the VAE's factor times the patch."""
        return vae_factor(pipe) * self.patch(pipe)

    def patch(self, pipe: Any) -> int:
        """Return the side of the network's patches in latents."""
        patch = next(iter(self.networks(pipe).values())).config.get("patch_size") or 1
        return patch if isinstance(patch, int) else patch[-1]

    def multiple(self, pipe: Any) -> int:
        """Return the number of which the sides of a picture must be multiples to be drawn as they are asked for."""
        return math.lcm(self.grid(pipe), self.checked_multiple)

    def check_call_size(self, pipe: Any, arguments: dict[str, Any]) -> None:
        """Raise with the nearest valid size for a call whose size the pipeline cannot draw, rounded or not."""
        height, width = self.asked_size(pipe, arguments)
        is_refused = height % self.checked_multiple or width % self.checked_multiple or not self.rounds
        if is_refused or min(self.size(pipe, arguments)) <= 0:
            self.check_size(pipe, height, width)

    def check_size(self, pipe: Any, height: int, width: int) -> None:
        """Raise with the nearest valid size when the pipeline cannot draw one, or draws a smaller one instead."""
        multiple = self.multiple(pipe)
        if height % multiple or width % multiple or min(height, width) <= 0:
            nearest = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
            raise DiffAccelError(
                f"The size {size_text(height, width)} does not fit {type(pipe).__name__}: sides must be multiples of "
                f"{multiple}. The nearest valid size is {size_text(*nearest)}."
            )

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        """Return changes to a call's arguments that make the same picture at another resolution."""
        if "height" not in arguments:
            raise DiffAccelError(
                f"A pipeline of the {self.name} family draws at one size only, that of its network; "
                f"{size_text(height, width)} was asked for. Use a sampler that keeps the resolution."
            )
        return {"height": height, "width": width}

    def of_call(self, pipe: Any, call: Callable[..., Any], arguments: dict[str, Any], memo: TextMemo) -> Family:
        """Return the family of a call with other arguments: this one, where nothing of it depends on them."""
        return self

    # -- inpainting ----------------------------------------------------------------------------------------------

    def kept_region(self, pipe: Any, prepared: dict[str, Any], latents: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return what the pipeline puts back into its ``latents`` after every step; None where it puts nothing back.

        Args:
            prepared: results of the methods :attr:`prepares`, by name.

        Returns:
            The mask, 1 where the picture is drawn anew; the image's clean latents; and the call's own noise, by which
            these are brought to the level of a step. One row per sample, in the layout of ``latents``.
        """
        return None

    # -- decode --------------------------------------------------------------------------------------------------

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Decode clean latents as the pipeline does to pixels ``(B, 3, H, W)`` or ``(B, 3, F, H, W)`` in [-1, 1]."""
        raise NotImplementedError

    def encode(self, pipe: Any, pixels: Tensor) -> Tensor:
        """Encode pixels ``(B, 3, H, W)`` in [-1, 1] to clean latents, the mode of the VAE's posterior.

        Raises:
            DiffAccelError: for a pipeline whose VAE has another form.
        """
        vae: Any = getattr(pipe, "vae", None)
        if vae is None or not hasattr(vae, "encode"):
            raise DiffAccelError(f"{type(pipe).__name__} has no VAE that encodes pictures. Use a method without it.")
        config, dtype = vae.config, vae.dtype
        needs_float = dtype == torch.float16 and config.get("force_upcast")  # SDXL's overflows in half precision
        vae = vae.to(torch.float32) if needs_float else vae
        posterior = vae.encode(pixels.to(vae.dtype), return_dict=False)[0]
        latents = posterior.mode() if hasattr(posterior, "mode") else posterior
        if needs_float:
            vae.to(dtype)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        factor = config.get("scaling_factor") or 1.0
        if mean and std:
            shape = (1, -1, *[1] * (latents.ndim - 2))
            return (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(std).view(shape) * factor
        return (latents - (config.get("shift_factor") or 0.0)) * factor


def vae_factor(pipe: Any) -> int:
    """Return the side in pixels of one latent; 1 for a pipeline on pixels."""
    names = ("vae_scale_factor", "vae_scale_factor_spatial")
    return next((value for name in names if (value := getattr(pipe, name, None))), 1)
