"""The format of a layer of mixed precision, and the calibrated range of its input."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.codes import Codes
from diffaccel.quant.formats import LayerFormat, Name

InputScale = Literal["tensor", "token"]
WEIGHT_BITS = (2, 4, 8)
ACTIVATION_BITS = (4, 8, 16)
_TEXT = re.compile(r"mixed:w([248])a(4|8|16)(:tensor)?(?::group=(\d+))?(?::split=(\d+))?(:first_row)?")


@dataclass(frozen=True)
class MixedFormat(LayerFormat):
    """How one layer of mixed precision is stored and computed.

    Attributes:
        weight_bits: 2, 4 or 8: symmetric codes in [-n, n] with n = 2^(bits - 1) - 1.
        activation_bits: 4, 8 or 16; 16 leaves activations as they are.
        scale: of activations: one calibrated scale and zero point ("tensor"), or the largest magnitude of each token or
            picture at each call ("token").
        group: codes along a row that share a whole multiple of the row's scale; 0 for a whole row.
        split: input channels of the first of two ranges with scales of their own; 0 for one range.
        first_row: whether a constant row of the input has its output stored.
    """

    name: Name = "mixed"
    weight_bits: int = 8
    activation_bits: int = 8
    scale: InputScale = "token"
    split: int = 0
    first_row: bool = False

    @property
    def bits(self) -> int:
        return self.weight_bits

    @property
    def activations(self) -> Codes | None:
        return None if self.activation_bits == 16 else "int8"

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.weight_bits == 8 else torch.uint8

    @property
    def ranges(self) -> int:
        """Number of ranges of input channels."""
        return 2 if self.split else 1

    @property
    def is_static(self) -> bool:
        """Whether activations have calibrated scales."""
        return self.activation_bits < 16 and self.scale == "tensor"

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of each stored tensor of a weight ``(out_features, in_features)``."""
        per_byte = 8 // self.weight_bits
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((out_features, -(-in_features // per_byte)), self.dtype),
            "weight_scale": ((out_features, self.ranges), torch.float32),
        }
        if self.weight_bits < 8:
            groups = in_features // self.group if self.group else 1
            shapes["weight_multiplier"] = ((out_features, groups), torch.uint8)
        if self.is_static:
            shapes["weight_sum"] = ((out_features, self.ranges), torch.int32)
            shapes["input_scale"] = ((self.ranges,), torch.float32)
            shapes["input_zero"] = ((self.ranges,), torch.int32)
        if self.first_row:
            shapes["first_row"] = ((in_features,), torch.float32)
            shapes["first_output"] = ((out_features,), torch.float32)
        return shapes

    def __str__(self) -> str:
        parts = [f"mixed:w{self.weight_bits}a{self.activation_bits}"]
        parts += ["tensor"] * (self.scale == "tensor")
        parts += [f"group={self.group}"] * bool(self.group) + [f"split={self.split}"] * bool(self.split)
        return ":".join([*parts, *["first_row"] * self.first_row])

    @classmethod
    def read(cls, text: str) -> MixedFormat:
        """Invert ``str``.

        Raises:
            DiffAccelError: for a text that names no format.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise DiffAccelError(
                f"'{text}' is no format of a layer of mixed precision, such as 'mixed:w4a8:tensor'. The file is "
                "damaged, or of a newer version of diffaccel."
            )
        weight, activation, tensor, group, split, first_row = match.groups()
        return cls(
            weight_bits=int(weight), activation_bits=int(activation), scale="tensor" if tensor else "token",
            group=int(group or 0), split=int(split or 0), first_row=first_row is not None,
        )  # fmt: skip


def read_format(text: str) -> LayerFormat:
    """Return the format of a layer from what a file says."""
    return MixedFormat.read(text) if text.startswith("mixed") else LayerFormat.read(text)


@dataclass(frozen=True)
class InputRange:
    """What calibration knows of a layer's input.

    Attributes:
        low: smallest value of each range of channels.
        high: largest value of each.
        first_row: the constant first row of the input, fp32 ``(K,)``; None where there is none.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    first_row: Tensor | None = None
