"""DiT (class to image): the pipeline steps its scheduler with every sample twice, the positive rows first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.families.pixart import LearnedVariance


class DiT(LearnedVariance):
    """DiT; it draws at the size of its network only. Under guidance the pipeline's latents are ``[x, x]``."""

    name = "dit"
    pipelines = ("DiTPipeline",)
    has_sizes = False
    row_args = ("class_labels",)
    negative_first = False

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        scale = float(arguments["guidance_scale"])
        return scale if scale > 1 else None

    def unwrap(self, latents: Tensor, arguments: dict[str, Any]) -> Tensor:
        return latents.chunk(2)[0] if arguments["guidance_scale"] > 1 else latents

    def wrap(self, rows: Tensor, arguments: dict[str, Any]) -> Tensor:
        return torch.cat([rows] * 2) if arguments["guidance_scale"] > 1 else rows

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        side = pipe.transformer.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        return side, side

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        return pipe.vae.decode(1 / pipe.vae.config.scaling_factor * x0.to(pipe.vae.dtype)).sample
