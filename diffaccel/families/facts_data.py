"""The facts of each class of denoisers, by the class name in diffusers; ``facts.py`` says what each field means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffaccel.families.facts import Facts

Patch = tuple[int, int, int]

# Kept everywhere: the embedders and the first and last layer, a small share of the work through which all of the signal
# goes (conv_out and conv_in are the most sensitive layers of SDXL-turbo, arXiv 2405.17873), and these:
#
# Norms have no product to quantize. The adaptive ones hold the modulation linears, which run at one row a sample, where
# a quantized product gains no time, and whose errors shift every feature of a timestep (arXiv 2311.16503).
NORMS = r"(?:.*\.)?(?:\w+_)?norm\w*"
TIME_IN_RESNETS = r".*\.time_emb_proj"  # a UNet's modulation linears


def _square(config: Mapping[str, Any]) -> Patch:
    return 1, config["patch_size"], config["patch_size"]


def _cube(config: Mapping[str, Any]) -> Patch:
    return config.get("patch_size_t") or 1, config["patch_size"], config["patch_size"]


def _as_listed(config: Mapping[str, Any]) -> Patch:
    t, h, w = config["patch_size"]
    return t, h, w


def _packed(config: Mapping[str, Any]) -> Patch:
    return 1, 2, 2  # the pipeline packs 2x2 latent pixels into a token; the network's own patch size is 1


def _pixels(config: Mapping[str, Any]) -> Patch:
    return 1, 1, 1


FACTS: dict[str, Facts] = {
    "FluxTransformer2DModel": Facts(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        attention=r"(?:single_)?transformer_blocks\.\d+\.attn",
        modulation=r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear|single_transformer_blocks\.\d+\.norm\.linear"
        r"|norm_out\.linear",
        never_quantize=("x_embedder", "context_embedder", "time_text_embed", NORMS, "proj_out"),
        patch=_packed,
        text_tokens=512,
        timestep_range=(0.0, 1.0),  # sigma itself: the network multiplies by 1000
    ),
    "SD3Transformer2DModel": Facts(
        blocks=("transformer_blocks",),
        attention=r"transformer_blocks\.\d+\.attn2?",  # attn2: the image-only attention of SD3.5-medium
        modulation=r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear|norm_out\.linear",
        never_quantize=("pos_embed", "context_embedder", "time_text_embed", NORMS, "proj_out"),
        patch=_square,
        text_tokens=333,  # 77 of CLIP, 256 of T5
    ),
    "UNet2DConditionModel": Facts(
        blocks=("down_blocks", "mid_block", "up_blocks"),
        attention=r".*\.transformer_blocks\.\d+\.attn[12]",
        modulation=TIME_IN_RESNETS,
        # add_embedding is SDXL's, of pooled text and picture sizes
        never_quantize=("conv_in", "(?:time|add|class)_embedding|encoder_hid_proj", TIME_IN_RESNETS, NORMS, "conv_out"),
        patch=_pixels,
        text_tokens=77,
    ),
    "WanTransformer3DModel": Facts(
        blocks=("blocks",),
        attention=r"blocks\.\d+\.attn[12]",
        modulation=r"condition_embedder\.time_proj",  # one for all blocks, which only add their own tables
        never_quantize=("patch_embedding", "condition_embedder", NORMS, "proj_out"),
        patch=_as_listed,
        vae_frames=4,
        text_tokens=512,
    ),
    "HunyuanVideoTransformer3DModel": Facts(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        attention=r"(?:single_)?transformer_blocks\.\d+\.attn",
        modulation=r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear|single_transformer_blocks\.\d+\.norm\.linear"
        r"|context_embedder\.token_refiner\.refiner_blocks\.\d+\.norm_out\.linear|norm_out\.linear",
        # context_embedder has two small attention blocks of its own over the text: an embedder all the same
        never_quantize=("x_embedder", "context_embedder", "time_text_embed", NORMS, "proj_out"),
        patch=_cube,
        vae_frames=4,
        text_tokens=256,
    ),
    "CogVideoXTransformer3DModel": Facts(
        blocks=("transformer_blocks",),
        attention=r"transformer_blocks\.\d+\.attn1",
        modulation=r"transformer_blocks\.\d+\.norm[12]\.linear|norm_out\.linear",
        never_quantize=("patch_embed", "(?:time|ofs)_embedding", NORMS, "proj_out"),  # ofs: 1.5, image to video
        patch=_cube,
        vae_frames=4,
        text_tokens=226,
    ),
    "PixArtTransformer2DModel": Facts(
        blocks=("transformer_blocks",),
        attention=r"transformer_blocks\.\d+\.attn[12]",
        modulation=r"adaln_single\.linear",  # one for all blocks, which only add their own tables
        never_quantize=("pos_embed", "adaln_single", "caption_projection", NORMS, "proj_out"),
        patch=_square,
        text_tokens=None,  # 120 for Alpha, 300 for Sigma
    ),
    "DiTTransformer2DModel": Facts(
        blocks=("transformer_blocks",),
        attention=r"transformer_blocks\.\d+\.attn1",
        modulation=r"transformer_blocks\.\d+\.norm1\.linear|proj_out_1",
        # every norm1 also holds a time and class embedder; proj_out_1 is the modulation before the last layer
        never_quantize=("pos_embed", NORMS, "proj_out_[12]"),
        patch=_square,
        text_tokens=0,
    ),
    "UNet2DModel": Facts(
        blocks=("down_blocks", "mid_block", "up_blocks"),
        attention=r".*\.attentions\.\d+",
        modulation=TIME_IN_RESNETS,
        never_quantize=("conv_in", "(?:time|class)_embedding", TIME_IN_RESNETS, NORMS, "conv_out"),
        patch=_pixels,
        vae_scale=1,  # works on pixels
        text_tokens=0,
    ),
}
