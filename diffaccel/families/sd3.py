"""Stable Diffusion 3 and 3.5: spatial latents, velocity, both branches in one call."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family
from diffaccel.families.init_image import check_resizable


class SD3(Family):
    """Stable Diffusion 3; the network's time is ``1000 sigma``. Skip-layer guidance, tied to steps, is refused."""

    name = "sd3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    row_args: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states",
        "pooled_projections",
        "joint_attention_kwargs.ip_adapter_image_embeds",
    )
    shared_args = ("joint_attention_kwargs",)
    callback_args = {  # noqa: RUF012
        "prompt_embeds": "encoder_hidden_states", "pooled_prompt_embeds": "pooled_projections",
    }  # fmt: skip

    def refuse(self, arguments: dict[str, Any]) -> None:
        if arguments.get("skip_guidance_layers") is not None:
            raise DiffAccelError(
                "skip_guidance_layers follows the pipeline's own step index, which of all samplers only Scheduler() "
                "keeps. Leave it out, use that one, or diffaccel.remove(pipe)."
            )

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        check_resizable(arguments)
        return super().resized(arguments, height, width)

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        x0 = x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return pipe.vae.decode(x0, return_dict=False)[0]
