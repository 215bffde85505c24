"""Multiply-adds of one row through a UNet of diffusers, block by block as its config builds it.

Channels of the skip connections are kept on a stack, as in the network. Blocks that no common checkpoint uses raise an
error.
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
    """Count the multiply-adds of one row, without the embedders.

    Args:
        emb: width of the time embedding.
        attend: multiply-adds of a transformer, ``attend(side, level, layer, channels, pixels)``; None where the network
            has none.

    Raises:
        DiffAccelError: for a kind of block without a formula.
    """
    for kind in (*config["down_block_types"], *config["up_block_types"]):
        if kind not in ATTENTION or (attend is None and ATTENTION[kind] == "cross"):
            raise unsupported("block type", kind, ATTENTION)
    middle = config.get("mid_block_type", MIDDLES[1])
    if middle not in MIDDLES:
        raise unsupported("mid_block_type", middle, MIDDLES)
    unet = _Walk(config, height, width, emb, attend)
    return unet.first_convolution() + unet.down() + unet.middle(middle) + unet.up() + unet.last_convolution()


class _Walk:
    """A walk through a UNet, stage after stage; every stage returns its multiply-adds.

    Attributes:
        channels: of the features where the walk stands.
        sizes: height and width of every level from the first to the one where the walk stands.
        skips: channels of the skip connections that are not consumed yet.
    """

    def __init__(self, config: Config, height: int, width: int, emb: int, attend: Callable[..., int] | None) -> None:
        self.config, self.emb, self.attend = config, emb, attend
        self.widths = tuple(config["block_out_channels"])
        self.layers = per_block(config["layers_per_block"], len(self.widths))
        self.shifts = 2 if config["resnet_time_scale_shift"] == "scale_shift" else 1
        self.channels = self.widths[0]
        self.sizes, self.skips = [(height, width)], [self.channels]

    @property
    def pixels(self) -> int:
        """Latent pixels of the level where the walk stands."""
        height, width = self.sizes[-1]
        return height * width

    def first_convolution(self) -> int:
        """Count the convolution before the first block."""
        return (self.config.get("conv_in_kernel") or 3) ** 2 * self.config["in_channels"] * self.channels * self.pixels

    def last_convolution(self) -> int:
        """Count the convolution after the last block."""
        kernel = self.config.get("conv_out_kernel") or 3
        return kernel**2 * self.channels * self.config["out_channels"] * self.pixels

    def down(self) -> int:
        """Count the blocks on the way down."""
        total = 0
        for level, width in enumerate(self.widths):
            kind = ATTENTION[self.config["down_block_types"][level]]
            for layer in range(self.layers[level]):
                total += self._resnet(self.channels, width) + self._attention("down", kind, level, layer, width)
                self.channels = width
                self.skips.append(width)
            if level < len(self.widths) - 1:
                # a stride of two rounds up where the convolution pads both sides, down where only one
                odd = 1 if self.config["downsample_padding"] else 0
                self.sizes.append(((self.sizes[-1][0] + odd) // 2, (self.sizes[-1][1] + odd) // 2))
                total += self._resample(kind, self.config.get("downsample_type", "conv"))
                self.skips.append(self.channels)
        return total

    def middle(self, kind: str | None) -> int:
        """Count the middle block."""
        width = self.channels
        if kind is None:
            return 0
        if kind == "UNetMidBlock2DCrossAttn":
            return 2 * self._resnet(width, width) + self._attention("mid", "cross", 0, 0, width)
        if "cross_attention_dim" in self.config:  # the conditional UNet makes this kind with a single residual block
            return self._resnet(width, width)
        attention = "plain" if self.config["add_attention"] else ""
        return 2 * self._resnet(width, width) + self._attention("mid", attention, 0, 0, width)

    def up(self) -> int:
        """Count the blocks on the way up."""
        total = 0
        for level, width in enumerate(reversed(self.widths)):
            kind = ATTENTION[self.config["up_block_types"][level]]
            for layer in range(self.layers[::-1][level] + 1):
                total += self._resnet(self.channels + self.skips.pop(), width)
                total += self._attention("up", kind, level, layer, width)
                self.channels = width
            if level < len(self.widths) - 1:
                self.sizes.pop()
                total += self._resample(kind, self.config.get("upsample_type", "conv"))
        return total

    def _resnet(self, c_in: int, c_out: int) -> int:
        shortcut = c_in * c_out if c_in != c_out else 0
        convolutions = (9 * c_in * c_out + 9 * c_out * c_out + shortcut) * self.pixels
        return convolutions + self.emb * c_out * self.shifts

    def _attention(self, side: str, kind: str, level: int, layer: int, c: int) -> int:
        if kind == "cross" and self.attend is not None:
            return self.attend(side, level, layer, c, self.pixels)
        return 4 * c * c * self.pixels + 2 * c * self.pixels * self.pixels if kind == "plain" else 0

    def _resample(self, kind: str, method: str) -> int:
        c = self.channels
        # a residual block that resamples exists beside plain attention only
        return self._resnet(c, c) if method == "resnet" and kind == "plain" else 9 * c * c * self.pixels


def per_block(value: Any, n: int) -> list[Any]:
    """Return the value of each of ``n`` blocks, from a config's list or its one value for all."""
    return list(value) if isinstance(value, list | tuple) else [value] * n


def unsupported(option: str, value: Any, allowed: Any) -> DiffAccelError:
    """Return the error for a config that no formula covers."""
    return DiffAccelError(
        f"No FLOP formula for a UNet with {option} {value!r}. Known: {', '.join(map(repr, allowed))}. "
        "Count it with torch.utils.flop_counter.FlopCounterMode on the meta device."
    )
