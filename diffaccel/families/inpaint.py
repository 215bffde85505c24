"""Inpainting pipelines, as searches follow them.

Two forms exist. Either the network is the text-to-image one, and after every step the pipeline puts the known latents
back, with the call's own noise at the level of that step; or the mask and the latents of the masked picture are further
channels of the network's input.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family
from diffaccel.families.conditioning import Conditioning
from diffaccel.families.flux import Flux
from diffaccel.families.init_image import strength_problem
from diffaccel.families.sd import SD
from diffaccel.families.sd3 import SD3
from diffaccel.families.sdxl import SDXL
from diffaccel.modules.stand_in import StandIn

BESIDE = "beside_latents"  # key of the channels that follow the latents in the network's input


class Inpaint(Family):
    """The rules of inpainting, before those of the family whose network it has.

    Class attributes:
        channel_axis: axis of the network's input along which the mask follows the latents.
    """

    prepares = ("prepare_latents", "prepare_mask_latents")
    channel_axis: ClassVar[int] = 1

    def refuse(self, arguments: dict[str, Any]) -> None:
        super().refuse(arguments)
        reason = strength_problem(arguments) if arguments.get("denoising_start") is None else None
        if reason is not None:
            raise DiffAccelError(f"The call would finish without a single scheduler step: {reason}")

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        raise DiffAccelError(
            "An inpainting call has its mask and its image at one resolution, and the sampler also works at another. "
            "Use one that keeps the resolution, such as 'steps:N' for drafts."
        )

    # -- the mask among the network's channels ---------------------------------------------------------------------

    def latent_channels(self, network: Any) -> int:
        """Return how many channels of the network's input are latents."""
        return int(network.config.get("out_channels") or network.config["in_channels"])

    def output_shape(self, network: Any, like: Tensor) -> tuple[int, ...]:
        shape = list(super().output_shape(network, like))
        shape[self.channel_axis] = self.latent_channels(network)
        return tuple(shape)

    def conditioning(self, pipe: Any, calls: list[dict[str, Any]], arguments: dict[str, Any]) -> Conditioning:
        split = []
        for call in calls:
            value, own = call[self.latent_arg], self.latent_channels(getattr(pipe, self.denoiser))
            beside = value.narrow(self.channel_axis, own, value.shape[self.channel_axis] - own)
            split.append({**call, BESIDE: beside} if beside.numel() else call)
        return super().conditioning(pipe, split, arguments)

    def network(self, pipe: Any, timestep: Tensor) -> Any:
        """Return the network; its latent argument may lack the channels beside the latents, which are another."""
        module = super().network(pipe, timestep)
        return StandIn(module, functools.partial(self._evaluate, module))

    def _evaluate(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        beside = kwargs.pop(BESIDE, None)
        if beside is None:
            return module(*args, **kwargs)
        x = args[0] if args else kwargs.pop(self.latent_arg)
        whole = torch.cat([x, beside.to(x.dtype)], dim=self.channel_axis)
        return module(whole, *args[1:], **kwargs) if args else module(**{self.latent_arg: whole}, **kwargs)

    # -- what is kept ----------------------------------------------------------------------------------------------

    def kept_region(self, pipe: Any, prepared: dict[str, Any], latents: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        if type(getattr(pipe, "vae", None)).__name__ == "AsymmetricAutoencoderKL":
            raise DiffAccelError(
                f"The AsymmetricAutoencoderKL of {type(pipe).__name__} decodes with the masked picture beside the "
                "latents, which a search cannot do for its particles. Use the pipeline with an AutoencoderKL."
            )
        made, masks = prepared.get("prepare_latents", ()), prepared.get("prepare_mask_latents", ())
        if len(made) < 3:  # no clean latents were made: nothing is put back
            return None
        noise, clean = made[1], made[2]
        mask = masks[0][: len(latents)] if masks else None  # of a joint call both branches have it
        parts = (mask, clean, noise)
        if not all(isinstance(part, Tensor) and len(part) == len(latents) for part in parts):
            raise DiffAccelError(
                f"The mask, image and noise that {type(pipe).__name__} keeps its known region by have not one row for "
                "each picture. Use the pipeline class of diffusers itself, or call it without a search."
            )
        return parts  # type: ignore[return-value]

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Decode as the pipeline does; with ``padding_mask_crop`` to the whole picture with the crop laid into it."""
        pixels = super().decode(pipe, x0, arguments)
        return pixels if arguments.get("padding_mask_crop") is None else _overlaid(pipe, pixels, arguments)


def _overlaid(pipe: Any, pixels: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Lay decoded crops ``(R, 3, h, w)`` into the call's picture by the pipeline's own rule, ``(R, 3, H, W)``."""
    if pixels.requires_grad:
        raise DiffAccelError(
            "With padding_mask_crop the pipeline lays its crop into the whole picture, which has no gradient. Leave "
            "padding_mask_crop or guide out."
        )
    processor, mask, image = pipe.image_processor, arguments["mask_image"], arguments["image"]
    height, width = (arguments.get("height") or pixels.shape[-2]), (arguments.get("width") or pixels.shape[-1])
    crop = pipe.mask_processor.get_crop_region(mask, width, height, pad=arguments["padding_mask_crop"])
    pictures = processor.postprocess(pixels.detach(), output_type="pil")
    whole = [np.asarray(processor.apply_overlay(mask, image, picture, crop), np.float32) for picture in pictures]
    return torch.from_numpy(np.stack(whole)).permute(0, 3, 1, 2).to(pixels) / 127.5 - 1


class SDInpaint(Inpaint, SD):
    """Stable Diffusion, inpainting by 4 channels or by 9."""

    pipelines = ("StableDiffusionInpaintPipeline",)
    row_args = (*SD.row_args, BESIDE)


class SDXLInpaint(Inpaint, SDXL):
    """Stable Diffusion XL, inpainting by 4 channels or by 9."""

    pipelines = ("StableDiffusionXLInpaintPipeline",)
    row_args = (*SDXL.row_args, BESIDE)
    asked_size = SD.asked_size


class SD3Unshifted(SD3):
    """Stable Diffusion 3 as its inpainting pipeline decodes: without the shift by which it encodes."""

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        return pipe.vae.decode(x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]


class SD3Inpaint(Inpaint, SD3Unshifted):
    """Stable Diffusion 3, inpainting by 16 channels or by 33."""

    pipelines = ("StableDiffusion3InpaintPipeline",)
    row_args = (*SD3.row_args, BESIDE)


class FluxInpaint(Inpaint, Flux):
    """FLUX.1, inpainting with the text-to-image network."""

    pipelines = ("FluxInpaintPipeline",)
    row_args = (*Flux.row_args, BESIDE)
    channel_axis = 2


class FluxFill(FluxInpaint):
    """FLUX.1 Fill, whose network sees the mask; guidance is embedded."""

    pipelines = ("FluxFillPipeline",)

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        return None
