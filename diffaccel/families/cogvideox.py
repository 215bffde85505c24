"""CogVideoX 1.0 and 1.5 (text to video): a v prediction on frames-first latents, both branches in one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family


class CogVideoX(Family):
    """CogVideoX; the pipeline's latents are ``(B, F, C, H, W)``, those of samplers ``(B, C, F, H, W)``.

    CogVideoX 1.5 pads the latent frames at the front to a multiple of its temporal patch, and drops the padding again.
    """

    name = "cogvideox"
    pipelines = ("CogVideoXPipeline",)
    row_args = ("encoder_hidden_states",)
    shared_args = ("image_rotary_emb", "attention_kwargs")
    casts_latents = True
    checked_multiple = 8
    fps = 8.0
    callback_args = {"prompt_embeds": "encoder_hidden_states"}  # noqa: RUF012
    negative_callback_args = {"negative_prompt_embeds": "encoder_hidden_states"}  # noqa: RUF012

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        return float(pipe.guidance_scale) if arguments["guidance_scale"] > 1 else None

    def refuse(self, arguments: dict[str, Any]) -> None:
        if arguments.get("use_dynamic_cfg"):
            raise DiffAccelError(
                "use_dynamic_cfg changes the guidance with the pipeline's own steps, which of all samplers only "
                "Scheduler() keeps. Leave it out, use that one, or diffaccel.remove(pipe)."
            )

    def prediction(self, out: Tensor, like: Tensor) -> Tensor:
        return out.float()  # before guidance, as the pipeline does

    def to_network(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    def from_network(self, out: Tensor, like: Tensor) -> Tensor:
        return out.transpose(1, 2)

    def spatial(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        return latents.transpose(1, 2)

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        config, scale = pipe.transformer.config, pipe.vae_scale_factor_spatial
        height = arguments.get("height") or config.sample_height * scale
        return int(height), int(arguments.get("width") or config.sample_width * scale)

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        config = pipe.transformer.config
        frames = arguments.get("num_frames") or config.sample_frames
        latent_frames = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        padding = -latent_frames % config.patch_size_t if config.patch_size_t else 0
        return pipe.decode_latents(x0.to(pipe.vae.dtype).transpose(1, 2)[:, padding:])
