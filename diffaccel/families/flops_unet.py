"""Multiply-adds of one row through the UNets of diffusers, walked as the config builds them (arXiv 2006.11239).

Channels of the skip connections are kept on a stack, as in the network, so that the walk cannot go out of step with
it. Blocks that no common checkpoint uses are refused, not guessed; embedders that run at one row a sample, beyond
those of time, size and class, are left out as too small to matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from diffaccel.errors import DiffAccelError

Config = Mapping[str, Any]
# block type -> kind of attention after each residual block
ATTENTION = {"DownBlock2D": "", "UpBlock2D": ""}
ATTENTION |= {f"Attn{name}": "plain" for name in ("DownBlock2D", "UpBlock2D")}
ATTENTION |= {f"CrossAttn{name}": "cross" for name in ("DownBlock2D", "UpBlock2D")}
MIDDLES = (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")


def linears(*widths: int) -> int:
    """Multiply-adds of one row through linears of these widths."""
    return sum(a * b for a, b in pairwise(widths))


def unet_condition(config: Config, height: int, width: int, text: int) -> int:
    """``UNet2DConditionModel``: residual blocks, and transformers that see the text (arXiv 2112.10752, 2307.01952).

    Raises:
        DiffAccelError: a kind of block or attention without a formula.
    """
    _known(config, dual_cross_attention=(False, None), attention_type=("default", None))
    n = len(config["block_out_channels"])
    depths = _per_block(config["transformer_layers_per_block"], n)
    upward = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    contexts = _per_block(config["cross_attention_dim"], n)
    only_cross = _per_block(config.get("only_cross_attention") or False, n)

    def transformer(channels: int, depth: int, pixels: int, context: int, first_sees_text: bool) -> int:
        keys, key_width = (text, context) if first_sees_text else (pixels, channels)
        block = 2 * channels * channels * pixels + 2 * key_width * channels * keys + 2 * channels * pixels * keys
        block += 2 * channels * channels * pixels + 2 * context * channels * text + 2 * channels * pixels * text
        block += 12 * channels * channels * pixels  # GEGLU: three matrices, four times as wide
        return 2 * channels * channels * pixels + depth * block  # one projection before the blocks, one after

    def attend(side: str, i: int, layer: int, channels: int, pixels: int) -> int:
        if side == "mid":
            depth, context, alone = depths[-1], contexts[-1], False
        elif side == "down":
            depth, context, alone = depths[i], contexts[i], only_cross[i]
        else:
            depth, context, alone = upward[i], contexts[::-1][i], only_cross[::-1][i]
        depth = depth if isinstance(depth, int) else depth[layer]
        return transformer(channels, depth, pixels, context, alone)

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
    return head + _walk(config, height, width, emb, attend)


def unet(config: Config, height: int, width: int, text: int = 0) -> int:
    """``UNet2DModel``: residual blocks and plain self-attention on pixels (arXiv 2006.11239).

    Raises:
        DiffAccelError: a kind of block without a formula.
    """
    c0 = config["block_out_channels"][0]
    emb = config.get("time_embedding_dim") or 4 * c0
    width_in = c0 * (2 if config["time_embedding_type"] == "fourier" else 1)
    head = linears(width_in, emb, emb) * (2 if config.get("class_embed_type") == "timestep" else 1)
    return head + _walk(config, height, width, emb, None)


def _walk(config: Config, height: int, width: int, emb: int, attend: Callable[..., int] | None) -> int:
    channels, n = tuple(config["block_out_channels"]), len(config["block_out_channels"])
    layers = _per_block(config["layers_per_block"], n)
    shifts = 2 if config["resnet_time_scale_shift"] == "scale_shift" else 1
    down_types, up_types = config["down_block_types"], config["up_block_types"]
    middle = config.get("mid_block_type", MIDDLES[1])
    for kind in (*down_types, *up_types):
        if kind not in ATTENTION or (attend is None and ATTENTION[kind] == "cross"):
            raise _unsupported("block type", kind, ATTENTION)
    if middle not in MIDDLES:
        raise _unsupported("mid_block_type", middle, MIDDLES)

    def resnet(c_in: int, c_out: int, pixels: int) -> int:
        shortcut = c_in * c_out if c_in != c_out else 0
        return (9 * c_in * c_out + 9 * c_out * c_out + shortcut) * pixels + emb * c_out * shifts

    def attention(side: str, kind: str, i: int, layer: int, c: int, pixels: int) -> int:
        if kind == "cross" and attend is not None:
            return attend(side, i, layer, c, pixels)
        return 4 * c * c * pixels + 2 * c * pixels * pixels if kind == "plain" else 0

    def resample(kind: str, how: str, c: int, pixels: int) -> int:
        # a residual block that resamples exists beside plain attention only
        return resnet(c, c, pixels) if how == "resnet" and kind == "plain" else 9 * c * c * pixels

    sizes, skips, x = [(height, width)], [channels[0]], channels[0]
    pixels = height * width
    total = (config.get("conv_in_kernel") or 3) ** 2 * config["in_channels"] * x * pixels
    for i, c in enumerate(channels):
        kind = ATTENTION[down_types[i]]
        for layer in range(layers[i]):
            total += resnet(x, c, pixels) + attention("down", kind, i, layer, c, pixels)
            x = c
            skips.append(x)
        if i < n - 1:
            # a stride of two rounds up where the convolution pads both sides, down where only one
            odd = 1 if config["downsample_padding"] else 0
            sizes.append(((sizes[-1][0] + odd) // 2, (sizes[-1][1] + odd) // 2))
            pixels = sizes[-1][0] * sizes[-1][1]
            total += resample(kind, config.get("downsample_type", "conv"), x, pixels)
            skips.append(x)
    total += _middle(config, middle, x, pixels, resnet, attention)
    for i, c in enumerate(reversed(channels)):
        kind = ATTENTION[up_types[i]]
        for layer in range(layers[::-1][i] + 1):
            total += resnet(x + skips.pop(), c, pixels) + attention("up", kind, i, layer, c, pixels)
            x = c
        if i < n - 1:
            sizes.pop()
            pixels = sizes[-1][0] * sizes[-1][1]
            total += resample(kind, config.get("upsample_type", "conv"), x, pixels)
    return total + (config.get("conv_out_kernel") or 3) ** 2 * x * config["out_channels"] * pixels


def _middle(
    config: Config, kind: str | None, c: int, pixels: int, resnet: Callable[..., int], attention: Callable[..., int]
) -> int:
    if kind is None:
        return 0
    if kind == "UNetMidBlock2DCrossAttn":
        return 2 * resnet(c, c, pixels) + attention("mid", "cross", 0, 0, c, pixels)
    if "cross_attention_dim" in config:  # the conditional UNet makes this kind with a single residual block
        return resnet(c, c, pixels)
    return 2 * resnet(c, c, pixels) + attention("mid", "plain" if config["add_attention"] else "", 0, 0, c, pixels)


def _per_block(value: Any, n: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * n


def _known(config: Config, **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if config.get(key) not in values:
            raise _unsupported(key, config[key], values)


def _unsupported(what: str, got: Any, allowed: Any) -> DiffAccelError:
    return DiffAccelError(
        f"No FLOP formula for a UNet with {what} {got!r}. Known: {', '.join(repr(value) for value in allowed)}. "
        "Count it with torch.utils.flop_counter.FlopCounterMode on the meta device."
    )
