"""The walk through a UNet of diffusers as its config builds it, with multiply-adds of one row.

Channels of the skip connections are kept on a stack, as in the network, so that the walk cannot go out of step with
it. Blocks that no common checkpoint uses are refused, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.families.flops.shared import Config

# block type -> kind of attention after each residual block
ATTENTION = {"DownBlock2D": "", "UpBlock2D": ""}
ATTENTION |= {f"Attn{name}": "plain" for name in ("DownBlock2D", "UpBlock2D")}
ATTENTION |= {f"CrossAttn{name}": "cross" for name in ("DownBlock2D", "UpBlock2D")}
MIDDLES = (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")


def walk(config: Config, height: int, width: int, emb: int, attend: Callable[..., int] | None) -> int:
    channels, n = tuple(config["block_out_channels"]), len(config["block_out_channels"])
    layers = per_block(config["layers_per_block"], n)
    shifts = 2 if config["resnet_time_scale_shift"] == "scale_shift" else 1
    down_types, up_types = config["down_block_types"], config["up_block_types"]
    middle = config.get("mid_block_type", MIDDLES[1])
    for kind in (*down_types, *up_types):
        if kind not in ATTENTION or (attend is None and ATTENTION[kind] == "cross"):
            raise unsupported("block type", kind, ATTENTION)
    if middle not in MIDDLES:
        raise unsupported("mid_block_type", middle, MIDDLES)

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


def per_block(value: Any, n: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * n


def unsupported(what: str, got: Any, allowed: Any) -> DiffAccelError:
    return DiffAccelError(
        f"No FLOP formula for a UNet with {what} {got!r}. Known: {', '.join(repr(value) for value in allowed)}. "
        "Count it with torch.utils.flop_counter.FlopCounterMode on the meta device."
    )
