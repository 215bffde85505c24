"""Stable Diffusion XL: as Stable Diffusion, with pooled text and size conditioning."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.conditioning import Conditioning
from diffaccel.families.sd import SD, SDImg2Img


class SDXL(SD):
    """Stable Diffusion XL.

    At another resolution ``original_size`` and ``target_size`` stay those of the final picture, since the network would
    draw a thumbnail when it is conditioned on a smaller size.
    """

    name = "sdxl"
    pipelines = ("StableDiffusionXLPipeline",)
    row_args: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states", "timestep_cond", "added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids",
        "added_cond_kwargs.image_embeds",
    )  # fmt: skip
    callback_args = {  # noqa: RUF012
        "prompt_embeds": "encoder_hidden_states",
        "add_text_embeds": "added_cond_kwargs.text_embeds",
        "add_time_ids": "added_cond_kwargs.time_ids",
    }
    negative_callback_args = {}  # noqa: RUF012

    def refuse(self, arguments: dict[str, Any]) -> None:
        super().refuse(arguments)
        if arguments.get("denoising_end") is not None:
            raise DiffAccelError(
                "denoising_end cuts the pipeline's own list of steps, which all samplers but Scheduler() replace. "
                "Leave it out, use that one, or diffaccel.remove(pipe)."
            )

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        default = pipe.default_sample_size * pipe.vae_scale_factor
        return int(arguments.get("height") or default), int(arguments.get("width") or default)

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        final = (arguments["height"], arguments["width"])
        return {
            **super().resized(arguments, height, width),
            "original_size": arguments.get("original_size") or final,
            "target_size": arguments.get("target_size") or final,
        }

    def conditioning(self, pipe: Any, calls: list[dict[str, Any]], arguments: dict[str, Any]) -> Conditioning:
        height, width = self.asked_size(pipe, arguments)  # resized() needs them, a call may omit them
        return super().conditioning(pipe, calls, {**arguments, "height": height, "width": width})

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        vae = pipe.vae
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast  # the XL decoder overflows in fp16
        if upcast:
            pipe.upcast_vae()
        mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
        x0 = x0.to(vae.dtype if vae.post_quant_conv is None else vae.post_quant_conv.weight.dtype)
        if mean is not None and std is not None:
            mean, std = (
                torch.tensor(stat, dtype=torch.float32, device="cpu").view(1, -1, 1, 1).to(x0) for stat in (mean, std)
            )
            x0 = x0 * std / vae.config.scaling_factor + mean
        else:
            x0 = x0 / vae.config.scaling_factor
        pixels = vae.decode(x0, return_dict=False)[0]
        if upcast:
            vae.to(dtype=torch.float16)
        return pixels


class SDXLImg2Img(SDXL, SDImg2Img):
    """Stable Diffusion XL, image to image: the picture has the size of the initial image."""

    pipelines = ("StableDiffusionXLImg2ImgPipeline",)
    checked_multiple = SDImg2Img.checked_multiple
    asked_size = SDImg2Img.asked_size
