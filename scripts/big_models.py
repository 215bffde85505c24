"""Large pipelines with random weights, made where they run: only their seconds and bytes have a meaning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)

IMAGE, VIDEO = {"height": 1024, "width": 1024}, {"height": 480, "width": 832, "num_frames": 81}
FLUX = {"num_attention_heads": 24}  # FLUX.1-dev's 12 billion weights are the class's defaults
SMALL = {
    "num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64,
    "axes_dims_rope": (16, 24, 24), "joint_attention_dim": 64, "pooled_projection_dim": 32,
}  # fmt: skip
WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30, "text_dim": 4096}
# name: arguments of size, steps, config of the transformer
MODELS: dict[str, tuple[dict[str, int], int, dict[str, Any]]] = {
    "flux": (IMAGE, 50, {**FLUX, "guidance_embeds": True}),
    "flux-8-steps": (IMAGE, 8, {**FLUX, "guidance_embeds": False}),
    "wan": (VIDEO, 50, WAN),
    "small": ({"height": 256, "width": 256}, 12, SMALL),
    "small-8-steps": ({"height": 256, "width": 256}, 8, SMALL),
}


@contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make weights at once where they belong."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def make(model: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """Return a pipeline without text encoders, and the arguments of a call: latents, one network call a step."""
    size, steps, config = MODELS[model]
    with made_on(device, dtype):
        pipe, arguments = _wan(config) if model == "wan" else _flux(config, small=model.startswith("small"))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**arguments, **size, "num_inference_steps": steps, "output_type": "latent"}


def _wan(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    transformer = WanTransformer3DModel(**config).eval().requires_grad_(False)
    vae = AutoencoderKLWan().eval().requires_grad_(False)
    pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=5.0), transformer)
    return pipe, {"prompt_embeds": torch.randn(1, 512, config["text_dim"]), "guidance_scale": 1.0}


def _flux(config: dict[str, Any], small: bool) -> tuple[Any, dict[str, Any]]:
    network = FluxTransformer2DModel(**config).eval().requires_grad_(False)
    vae = AutoencoderKL(
        latent_channels=16, layers_per_block=2, use_quant_conv=False, use_post_quant_conv=False,
        block_out_channels=(32, 32, 32, 32) if small else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae.eval().requires_grad_(False), None, None, None, None, network)
    text = 16 if small else 512
    arguments = {
        "prompt_embeds": torch.randn(1, text, network.config.joint_attention_dim),
        "pooled_prompt_embeds": torch.randn(1, network.config.pooled_projection_dim),
        "max_sequence_length": text, "guidance_scale": 3.5,
    }  # fmt: skip
    return pipe, arguments


def decode(pipe: Any, latents: torch.Tensor, size: dict[str, int]) -> torch.Tensor:
    """Return what the autoencoder makes of the latents that a call returned; their scale is of no account."""
    if isinstance(pipe, FluxPipeline):
        latents = pipe._unpack_latents(latents, size["height"], size["width"], pipe.vae_scale_factor)
    with torch.no_grad():
        return pipe.vae.decode(latents.to(pipe.vae.dtype), return_dict=False)[0]
