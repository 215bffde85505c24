"""Closed-form FLOPs against ``torch.utils.flop_counter``, at real sizes.

The networks live on the meta device, where nothing is computed. The counter has no rule for the fused attention of the
CPU and would miss it without a word, so attention is taken apart into the two products that it counts.
"""

from __future__ import annotations

from typing import Any

import networks
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffaccel.errors import DiffAccelError
from diffaccel.families.facts_data import FACTS
from diffaccel.families.flops import flops

SDXL: dict[str, Any] = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816, use_linear_projection=True,
)  # fmt: skip
CIFAR: dict[str, Any] = dict(
    sample_size=32, block_out_channels=(128, 256, 256, 256), attention_head_dim=None, downsample_padding=0,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
SMALL: dict[str, Any] = dict(
    block_out_channels=(32, 64, 96), cross_attention_dim=40, sample_size=16,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip
WAN_IMAGE: dict[str, Any] = dict(num_layers=2, in_channels=36, image_dim=1280, added_kv_proj_dim=5120)

SHALLOW = {"num_layers": 3, "num_single_layers": 2}  # for another size, to be quick

# class, config, latent height, width, frames, text tokens
FULL: dict[str, tuple[str, dict[str, Any], int, int, int, int]] = {
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, 128, 128, 1, 512),
    "SD3.5-medium": (
        "SD3Transformer2DModel",
        dict(
            sample_size=128, in_channels=16, out_channels=16, num_layers=24, num_attention_heads=24,
            attention_head_dim=64, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)),
        ),
        128, 128, 1, 333,
    ),
    "SDXL": ("UNet2DConditionModel", SDXL, 128, 128, 1, 77),
    "SD1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768, "sample_size": 64}, 64, 64, 1, 77),
    "Wan2.1-1.3B": (
        "WanTransformer3DModel", dict(num_attention_heads=12, ffn_dim=8960, num_layers=30), 60, 104, 21, 512,
    ),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {"num_layers": 20}, 68, 120, 33, 256),
    "CogVideoX-2b": ("CogVideoXTransformer3DModel", {"num_layers": 30}, 60, 90, 13, 226),
    "CogVideoX-5b": (
        "CogVideoXTransformer3DModel",
        dict(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True), 60, 90, 13, 226,
    ),
    "PixArt-Sigma": (
        "PixArtTransformer2DModel",
        dict(sample_size=128, caption_channels=4096, cross_attention_dim=1152, use_additional_conditions=False),
        128, 128, 1, 300,
    ),
    "DiT-XL/2": ("DiTTransformer2DModel", {"out_channels": 8}, 64, 64, 1, 0),
    "ddpm-cifar10": ("UNet2DModel", CIFAR, 32, 32, 1, 0),
}  # fmt: skip
# branches of the formulas that the models above do not take
OTHER: dict[str, tuple[str, dict[str, Any], int, int, int, int]] = {
    "Wan, first frame": ("WanTransformer3DModel", WAN_IMAGE, 30, 52, 3, 512),
    "Wan, first and last frame": ("WanTransformer3DModel", WAN_IMAGE | {"pos_embed_seq_len": 514}, 30, 52, 3, 512),
    "Hunyuan, other MLP": ("HunyuanVideoTransformer3DModel", {}, 8, 12, 2, 9),
    "CogVideoX 1.5": (
        "CogVideoXTransformer3DModel",
        dict(num_layers=2, patch_size_t=2, ofs_embed_dim=512, use_rotary_positional_embeddings=True), 30, 46, 4, 226,
    ),
    "PixArt-Alpha": ("PixArtTransformer2DModel", {}, 16, 16, 1, 120),
    "PixArt, gated": (
        "PixArtTransformer2DModel", dict(num_layers=2, sample_size=64, activation_fn="geglu"), 64, 32, 1, 9,
    ),
    "UNet, odd sides": (
        "UNet2DConditionModel",
        SMALL | dict(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        ), 13, 27, 1, 9,
    ),
    "UNet, nested depths": (
        "UNet2DConditionModel",
        SMALL | dict(
            down_block_types=("CrossAttnDownBlock2D",) * 3, up_block_types=("CrossAttnUpBlock2D",) * 3,
            layers_per_block=(1, 2, 2), mid_block_type=None, transformer_layers_per_block=((1,), (2, 1), (1, 3)),
            reverse_transformer_layers_per_block=((3, 1, 1), (1, 2, 1), (2, 1)), time_embedding_type="fourier",
        ), 16, 16, 1, 9,
    ),
    "UNet, text in both": (
        "UNet2DConditionModel",
        SMALL | dict(
            only_cross_attention=(False, False, True), cross_attention_dim=(40, 40, 40), conv_in_kernel=1,
            resnet_time_scale_shift="scale_shift", mid_block_type="UNetMidBlock2D",
        ), 16, 8, 1, 9,
    ),
    "DDPM, residual steps": (
        "UNet2DModel",
        CIFAR | dict(
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            downsample_type="resnet", upsample_type="resnet", resnet_time_scale_shift="scale_shift",
            class_embed_type="timestep", time_embedding_type="fourier",
        ), 32, 16, 1, 0,
    ),
    "DDPM, no attention in the middle": ("UNet2DModel", CIFAR | {"add_attention": False}, 16, 16, 1, 0),
}  # fmt: skip


def counted(network: Any, **size: int) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        network(**networks.arguments(network, **size))
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_real_sizes(name: str):
    cls, config, height, width, frames, text = FULL[name]
    network = networks.make(cls, "meta", **config)
    size = dict(batch=1, height=height, width=width, frames=frames, text=text)
    assert flops(network, **size) == counted(network, **size)  # equal, not only close
    depths = {key: depth for key, depth in SHALLOW.items() if key in network.config}
    network = networks.make(cls, "meta", **config | depths)
    wide = width if cls != "DiTTransformer2DModel" else width // 2  # which makes squares only
    size = dict(batch=2, height=height // 2, width=wide, frames=(frames + 1) // 2, text=text)
    assert flops(network, **size) == counted(network, **size)


@pytest.mark.parametrize("name", OTHER)
def test_other_branches(name: str):
    cls, config, height, width, frames, text = OTHER[name]
    network = networks.make(cls, "meta", **config)
    size = dict(batch=3, height=height, width=width, frames=frames, text=text)
    assert flops(network, **size) == counted(network, **size)


def test_every_known_class_has_a_formula():
    assert {cls for cls, *_ in FULL.values()} == set(FACTS)


def test_text_defaults_to_what_the_pipeline_passes():
    network = networks.make("WanTransformer3DModel", "meta")
    size = dict(batch=1, height=8, width=8, frames=2)
    assert flops(network, **size) == flops(network, **size, text=512)


@pytest.mark.slow
def test_a_compiled_network_and_a_subclass_count_alike():
    network = networks.make("UNet2DModel")

    class Ours(type(network)):
        pass

    size = dict(batch=1, height=16, width=16)
    want = flops(network, **size)
    assert flops(torch.compile(network), **size) == want
    assert flops(Ours(**networks.TINY["UNet2DModel"]), **size) == want


@pytest.mark.parametrize(
    ("cls", "changes", "size", "message"),
    [
        ("PixArtTransformer2DModel", {}, {}, "text="),
        ("UNet2DModel", {}, {"batch": 0}, "batch=0"),
        ("SD3Transformer2DModel", {}, {"text": -1}, "text=-1"),
        ("SD3Transformer2DModel", {}, {"height": 1}, "at least 2x2"),
        (
            "UNet2DModel",
            {"down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D")},
            {},
            "block type 'ResnetDownsampleBlock2D'",
        ),
        ("UNet2DConditionModel", {"dual_cross_attention": True}, {}, "dual_cross_attention True"),
        (
            "UNet2DConditionModel",
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            {},
            "mid_block_type 'UNetMidBlock2DSimpleCrossAttn'",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(cls: str, changes: dict, size: dict, message: str):
    network = networks.make(cls, "meta", **networks.TINY[cls] | changes)
    with pytest.raises(DiffAccelError, match=message):
        flops(network, **{"batch": 1, "height": 16, "width": 16, **size})
