"""FLUX.1 (text or image to image): packed latents, velocity, embedded guidance or two-call classifier-free guidance."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from diffaccel.families.base import Family
from diffaccel.families.guidance import true_cfg_scale
from diffaccel.families.init_image import check_resizable


class Flux(Family):
    """FLUX.1; a token packs a 2x2 patch of latents, channel order (c, dy, dx), and the network's time is sigma."""

    name = "flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline", "FluxImg2ImgPipeline")
    row_args: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states", "pooled_projections", "guidance", "joint_attention_kwargs.ip_adapter_image_embeds",
    )  # fmt: skip
    shared_args = ("txt_ids", "img_ids", "joint_attention_kwargs", "controlnet_blocks_repeat")
    rounds = True
    joint_branches = False  # positive first, then negative
    callback_args = {"prompt_embeds": "encoder_hidden_states"}  # noqa: RUF012

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        return true_cfg_scale(arguments)

    def resized(self, arguments: dict[str, Any], height: int, width: int) -> dict[str, Any]:
        check_resizable(arguments)
        return super().resized(arguments, height, width)

    def to_network(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        x = x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(b, (h // 2) * (w // 2), c * 4)

    def from_network(self, out: Tensor, like: Tensor) -> Tensor:
        b, _, h, w = like.shape
        out = out.view(b, h // 2, w // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(b, -1, h, w)

    def patch(self, pipe: Any) -> int:
        return 2  # packed by the pipeline: the network's own patch is one token

    def spatial(self, pipe: Any, latents: Tensor, height: int, width: int) -> Tensor:
        h, w = (side // self.grid(pipe) * self.patch(pipe) for side in (height, width))
        return self.from_network(latents, latents.new_empty(len(latents), 1, h, w))

    def time(self, pipe: Any, timestep: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return timestep.expand(len(x)).to(dtype) / 1000

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        x0 = x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return pipe.vae.decode(x0, return_dict=False)[0]
