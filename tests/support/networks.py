"""Denoisers of every class with known facts, tiny or of real size, and random arguments for one forward pass."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.utils import logging
from torch import Tensor, nn

ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 12}
# Every depth and width differs from the others where the config allows, so that no two can be confused.
TINY: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": dict(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    ),
    "SD3Transformer2DModel": dict(
        sample_size=16, in_channels=4, out_channels=4, num_layers=3, **ATTENTION, joint_attention_dim=20,
        caption_projection_dim=24, pooled_projection_dim=28, pos_embed_max_size=16, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ),
    "UNet2DConditionModel": dict(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, attention_head_dim=2, norm_num_groups=4,
        cross_attention_dim=20, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=28 + 6 * 8,
        use_linear_projection=True,
    ),
    "WanTransformer3DModel": dict(
        **ATTENTION, in_channels=4, out_channels=4, text_dim=20, freq_dim=16, ffn_dim=56, num_layers=3,
    ),
    "HunyuanVideoTransformer3DModel": dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=3,
        num_refiner_layers=1, mlp_ratio=3.0, text_embed_dim=20, pooled_projection_dim=28, rope_axes_dim=(4, 4, 8),
    ),
    "CogVideoXTransformer3DModel": dict(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=12,
        text_embed_dim=20, num_layers=3, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=7,
        use_rotary_positional_embeddings=False,
    ),
    "PixArtTransformer2DModel": dict(
        **ATTENTION, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=24, caption_channels=20,
        sample_size=16, norm_num_groups=4, use_additional_conditions=True,
    ),
    "DiTTransformer2DModel": dict(**ATTENTION, out_channels=8, num_layers=3, sample_size=8, norm_num_groups=4),
    "UNet2DModel": dict(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ),
}  # fmt: skip


def make(cls: str, device: str = "cpu", **config: Any) -> nn.Module:
    """Make a network with random weights; on the meta device one of any size needs no memory."""
    torch.manual_seed(0)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # about norms kept in float32, which does not matter here
    with torch.device(device):
        network = getattr(diffusers, cls)(**(config or TINY[cls]))
    logging.set_verbosity(verbosity)
    return network.eval().requires_grad_(False)


def arguments(
    network: Any, *, batch: int = 1, height: int = 8, width: int = 12, frames: int = 1, text: int = 7
) -> dict[str, Any]:
    """Return arguments of a forward pass on latents of this size, on the network's device."""
    c, device = network.config, network.device
    draw = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.empty(shape, device=device) if device.type == "meta" else torch.randn(shape, generator=draw)

    time = torch.full((batch,), 500.0, device=device)
    widths = ("joint_attention_dim", "text_embed_dim", "text_dim", "caption_channels", "cross_attention_dim")
    words = next((c[name] for name in widths if c.get(name)), 1)
    prompt = noise(batch, text, words if isinstance(words, int) else words[0])
    pooled = noise(batch, c.get("pooled_projection_dim") or 1)
    picture, video = (batch, c.in_channels, height, width), (batch, c.in_channels, frames, height, width)
    match type(network).__name__:
        case "FluxTransformer2DModel":
            n = (height // 2) * (width // 2)
            return dict(
                hidden_states=noise(batch, n, c.in_channels), encoder_hidden_states=prompt, pooled_projections=pooled,
                timestep=time / 1000, img_ids=noise(n, 3), txt_ids=noise(text, 3),
                guidance=time if c.guidance_embeds else None,
            )  # fmt: skip
        case "SD3Transformer2DModel":
            return dict(
                hidden_states=noise(*picture), encoder_hidden_states=prompt, pooled_projections=pooled, timestep=time
            )
        case "WanTransformer3DModel":
            images = (c.pos_embed_seq_len or 257) // 257 * batch
            return dict(
                hidden_states=noise(*video), encoder_hidden_states=prompt, timestep=time,
                encoder_hidden_states_image=noise(images, 257, c.image_dim) if c.image_dim else None,
            )  # fmt: skip
        case "HunyuanVideoTransformer3DModel":
            return dict(
                hidden_states=noise(*video), encoder_hidden_states=prompt, pooled_projections=pooled, timestep=time,
                encoder_attention_mask=torch.ones(batch, text, dtype=torch.bool, device=device), guidance=time,
            )  # fmt: skip
        case "CogVideoXTransformer3DModel":
            clip = noise(batch, frames, c.in_channels, height, width)
            return dict(
                hidden_states=clip, encoder_hidden_states=prompt, timestep=time,
                ofs=torch.full_like(time, 2.0) if c.ofs_embed_dim else None,
            )  # fmt: skip
        case "PixArtTransformer2DModel":
            sizes = {"resolution": noise(batch, 2), "aspect_ratio": noise(batch, 1)}
            return dict(
                hidden_states=noise(*picture), encoder_hidden_states=prompt, timestep=time, added_cond_kwargs=sizes
            )
        case "DiTTransformer2DModel":
            return dict(hidden_states=noise(*picture), timestep=time.long(), class_labels=torch.zeros_like(time).long())
        case "UNet2DConditionModel":
            pooled = noise(batch, (c.projection_class_embeddings_input_dim or 0) - 6 * (c.addition_time_embed_dim or 0))
            added = {"text_embeds": pooled, "time_ids": torch.ones(batch, 6, device=device)}
            return dict(
                sample=noise(*picture), timestep=time, encoder_hidden_states=prompt,
                added_cond_kwargs=added if c.addition_embed_type else None,
            )  # fmt: skip
        case "UNet2DModel":
            labels = time if c.class_embed_type == "timestep" else None
            return dict(sample=noise(*picture), timestep=time, class_labels=labels)
    raise NotImplementedError(type(network).__name__)
