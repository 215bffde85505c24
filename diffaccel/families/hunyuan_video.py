"""HunyuanVideo (text to video): velocity, embedded guidance or two-call classifier-free guidance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.families.base import Family
from diffaccel.families.guidance import true_cfg_scale


class HunyuanVideo(Family):
    """HunyuanVideo; its latents are fp32, and the network's time is the schedule's timestep, ``1000 sigma``."""

    name = "hunyuan-video"
    pipelines = ("HunyuanVideoPipeline",)
    row_args = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance")
    shared_args = ("attention_kwargs",)
    checked_multiple = 16
    fps = 24.0
    joint_branches = False  # positive first, then negative
    callback_args = {"prompt_embeds": "encoder_hidden_states"}  # noqa: RUF012

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        return true_cfg_scale(arguments)

    def input_dtype(self, session: Any) -> torch.dtype:
        return session.denoiser.dtype

    def time(self, pipe: Any, timestep: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        return timestep.expand(len(x)).to(dtype)

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        return int(arguments["height"]), int(arguments["width"])

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        return pipe.vae.decode(x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
