"""DDPM and DDIM pipelines: an unconditional UNet on pixels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family


class Pixels(Family):
    """Diffusion on pixels without guidance; it draws at the size of its network only."""

    name = "pixels"
    pipelines = ("DDPMPipeline", "DDIMPipeline")
    has_sizes = False
    denoiser = "unet"
    latent_arg = "sample"

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        return None

    def prediction(self, out: Tensor, like: Tensor) -> Tensor:
        if out.shape[1] != like.shape[1]:
            raise DiffAccelError(
                f"The network's output has {out.shape[1]} channels for pictures of {like.shape[1]}: a learned variance "
                "is not followed. Use a network without one."
            )
        return out

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        sample = pipe.unet.config.sample_size
        return (sample, sample) if isinstance(sample, int) else tuple(sample)

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        return x0
