"""Stable Diffusion 1.x and 2.x: a UNet on spatial latents, epsilon or v, both branches in one call."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family
from diffaccel.families.init_image import resized_source, source_size, strength_problem


class SD(Family):
    """Stable Diffusion; the UNet's time is the train step, guidance may be rescaled (arXiv 2305.08891, section 3.4)."""

    name = "sd"
    pipelines = ("StableDiffusionPipeline",)
    denoiser = "unet"
    latent_arg = "sample"
    row_args: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "timestep_cond", "added_cond_kwargs.image_embeds")
    shared_args = ("cross_attention_kwargs", "added_cond_kwargs")
    callback_args = {"prompt_embeds": "encoder_hidden_states"}  # noqa: RUF012
    negative_callback_args = {"negative_prompt_embeds": "encoder_hidden_states"}  # noqa: RUF012
    checked_multiple = 8
    rounds = True

    def combine(self, pipe: Any, negative: Tensor, positive: Tensor, scale: float) -> Tensor:
        guided = super().combine(pipe, negative, positive, scale)
        if not self.is_linear(pipe):
            from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

            return rescale_noise_cfg(guided, positive, guidance_rescale=pipe.guidance_rescale)
        return guided

    def is_linear(self, pipe: Any) -> bool:
        return not getattr(pipe, "guidance_rescale", 0.0) > 0.0

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        sample = pipe.unet.config.sample_size
        latent_size = (sample, sample) if isinstance(sample, int) else tuple(sample)
        if not arguments.get("height") or not arguments.get("width"):
            return latent_size[0] * pipe.vae_scale_factor, latent_size[1] * pipe.vae_scale_factor
        return int(arguments["height"]), int(arguments["width"])

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        x0 = x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
        return pipe.vae.decode(x0, return_dict=False)[0]


class SDImg2Img(SD):
    """Stable Diffusion, image to image: the picture has the size of the initial image."""

    pipelines = ("StableDiffusionImg2ImgPipeline",)
    checked_multiple = 1  # images are brought to multiples of the VAE's factor

    def refuse(self, arguments: dict[str, Any]) -> None:
        super().refuse(arguments)
        reason = strength_problem(arguments) if arguments.get("denoising_start") is None else None
        if reason is not None:
            raise DiffAccelError(f"The call would finish without a single scheduler step: {reason}")

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        return source_size(pipe, arguments)

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        return {"image": resized_source(arguments, height, width)}
