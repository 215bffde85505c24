"""Multiply-adds of one row through the UNets of diffusers (arXiv 2006.11239).

Embedders that run once per sample, except those of time, size and class, are left out as too small to matter.
"""

from __future__ import annotations

from typing import Any

from diffaccel.families.flops.shared import Config, linears
from diffaccel.families.flops.unet_walk import per_block, unsupported, walk


def unet_condition(config: Config, height: int, width: int, text: int) -> int:
    """Count ``UNet2DConditionModel``: residual blocks and transformers (arXiv 2112.10752, 2307.01952).

    Raises:
        DiffAccelError: for a kind of block or attention without a formula.
    """
    _check_options(config, dual_cross_attention=(False, None), attention_type=("default", None))
    n = len(config["block_out_channels"])
    depths = per_block(config["transformer_layers_per_block"], n)
    up_depths = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    contexts = per_block(config["cross_attention_dim"], n)
    only_crosses = per_block(config.get("only_cross_attention") or False, n)

    def transformer(channels: int, depth: int, pixels: int, context: int, only_cross: bool) -> int:
        keys, key_width = (text, context) if only_cross else (pixels, channels)
        block = 2 * channels * channels * pixels + 2 * key_width * channels * keys + 2 * channels * pixels * keys
        block += 2 * channels * channels * pixels + 2 * context * channels * text + 2 * channels * pixels * text
        block += 12 * channels * channels * pixels  # GEGLU: three matrices, four times as wide
        return 2 * channels * channels * pixels + depth * block  # one projection before the blocks, one after

    def attend(side: str, i: int, layer: int, channels: int, pixels: int) -> int:
        if side == "mid":
            depth, context, only_cross = depths[-1], contexts[-1], False
        elif side == "down":
            depth, context, only_cross = depths[i], contexts[i], only_crosses[i]
        else:
            depth, context, only_cross = up_depths[i], contexts[::-1][i], only_crosses[::-1][i]
        depth = depth if isinstance(depth, int) else depth[layer]
        return transformer(channels, depth, pixels, context, only_cross)

    c0 = config["block_out_channels"][0]
    fourier = config.get("time_embedding_type") == "fourier"
    emb = config.get("time_embedding_dim") or (2 if fourier else 4) * c0
    head = linears(emb if fourier else c0, emb, emb)
    projected = config.get("projection_class_embeddings_input_dim") or 0
    if config.get("addition_embed_type") == "text_time" or config.get("class_embed_type") == "projection":
        head += linears(projected, emb, emb)
    elif config.get("class_embed_type") == "timestep":
        head += linears(c0, emb, emb)
    if config.get("encoder_hid_dim_type") == "text_proj":
        head += linears(config["encoder_hid_dim"], contexts[0]) * text
    return head + walk(config, height, width, emb, attend)


def unet(config: Config, height: int, width: int, text: int = 0) -> int:
    """Count ``UNet2DModel``: residual blocks and plain self-attention on pixels (arXiv 2006.11239).

    Raises:
        DiffAccelError: for a kind of block without a formula.
    """
    c0 = config["block_out_channels"][0]
    emb = config.get("time_embedding_dim") or 4 * c0
    width_in = c0 * (2 if config["time_embedding_type"] == "fourier" else 1)
    head = linears(width_in, emb, emb) * (2 if config.get("class_embed_type") == "timestep" else 1)
    return head + walk(config, height, width, emb, None)


def _check_options(config: Config, **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise unsupported(key, config[key], values)
