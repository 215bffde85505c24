"""PixArt-alpha and PixArt-Sigma: a transformer that predicts noise and its variance, both branches in one call."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from diffaccel.families.base import Family


class LearnedVariance(Family):
    """A family whose network also outputs a variance, in further channels, which samplers do not use."""

    def output_shape(self, network: Any, like: Tensor) -> tuple[int, ...]:
        return (len(like), network.config.out_channels, *like.shape[2:])

    def prediction(self, out: Tensor, like: Tensor) -> Tensor:
        return out[:, : like.shape[1]]


class PixArt(LearnedVariance):
    """PixArt; with ``use_resolution_binning`` the pipeline draws at the nearest trained size and resizes."""

    name = "pixart"
    pipelines = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
    row_args: ClassVar[tuple[str, ...]] = (
        "encoder_hidden_states", "encoder_attention_mask", "added_cond_kwargs.resolution",
        "added_cond_kwargs.aspect_ratio",
    )  # fmt: skip
    shared_args = ("added_cond_kwargs",)
    checked_multiple = 8

    def guidance_scale(self, pipe: Any, arguments: dict[str, Any], timestep: Tensor | None = None) -> float | None:
        scale = float(arguments["guidance_scale"])
        return scale if scale > 1 else None

    def asked_size(self, pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
        default = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        return int(arguments.get("height") or default), int(arguments.get("width") or default)

    def check_call_size(self, pipe: Any, arguments: dict[str, Any]) -> None:
        if not arguments.get("use_resolution_binning"):
            super().check_call_size(pipe, arguments)

    def decode(self, pipe: Any, x0: Tensor, arguments: dict[str, Any]) -> Tensor:
        return pipe.vae.decode(x0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor, return_dict=False)[0]
