"""The format of a linear layer with codes of 2 to 8 bits and zeros, for weights and for activations."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.packed_codes import packed_width
from diffaccel.quant.formats import LayerFormat, Name

_TEXT = re.compile(r"low_bit:w(\d)a(\d):g(\d+):r(\d+)(:symmetric)?(:dense)?")


@dataclass(frozen=True)
class LowBit(LayerFormat):
    """Weights ``s (q - z)`` with one scale and one real zero an output row, activations the same for each token.

    Attributes:
        weight_bits, act_bits: 2..8.
        act_groups: groups of noise levels, each with its own clipping factors of the activations.
        symmetric: zeros in the middle of the codes.
        rank: of the matrix that stands beside the codes; 0 for none.
        dense: store 3 bits in 3, and 5 to 7 in as many; else 2 to 4 take 4, and 5 to 8 take 8.
    """

    name: Name = "low_bit"
    weight_bits: int = 4
    act_bits: int = 4
    act_groups: int = 1
    symmetric: bool = False
    rank: int = 0
    dense: bool = False

    @property
    def bits(self) -> int:
        """Bits in which a weight code is stored."""
        if self.dense:
            return self.weight_bits
        return 4 if self.weight_bits <= 4 else 8

    @property
    def center(self) -> int:
        """What is subtracted from codes before they are multiplied."""
        return int(2 ** (self.weight_bits - 1))

    @property
    def activations(self) -> None:
        """Nothing that :class:`QLinear` could quantize: activations have zeros, and codes by the device."""
        return None

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def check(self, in_features: int) -> None:
        """Raise for a width whose codes end inside of a byte."""
        if in_features * self.bits % 8:
            raise DiffAccelError(
                f"Its width of {in_features} is no multiple of {8 // (self.bits & -self.bits)}, as codes of "
                f"{self.bits} bits need. Name it in skip."
            )

    def within(self, out_features: int, in_features: int) -> LowBit:
        """Return the format with no larger a rank than a matrix of that size has."""
        return replace(self, rank=min(self.rank, out_features, in_features))

    def shapes(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows = ((out_features, 1), torch.float32)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_scale": rows,  # first: networks take the dtype of their embedders' first parameter
            "weight": ((out_features, packed_width(in_features, self.bits)), torch.uint8),
            "weight_zero": rows,
            "weight_sum": rows,
            "act_clip": ((self.act_groups, 2), torch.float32),
        }
        if self.rank:
            shapes["side_left"] = ((out_features, self.rank), torch.float32)
            shapes["side_right"] = ((self.rank, in_features), torch.float32)
        return shapes

    def __str__(self) -> str:
        words = [f"w{self.weight_bits}a{self.act_bits}", f"g{self.act_groups}", f"r{self.rank}"]
        flags = [name for name in ("symmetric", "dense") if getattr(self, name)]
        return ":".join([self.name, *words, *flags])

    @classmethod
    def read(cls, text: str) -> LayerFormat:
        """Invert ``str``; other formats are read as :class:`LayerFormat` does."""
        if not text.startswith("low_bit"):
            return LayerFormat.read(text)
        found = _TEXT.fullmatch(text)
        numbers = [int(number) for number in found.groups()[:4]] if found else []
        if found is None or not all(2 <= bits <= 8 for bits in numbers[:2]) or numbers[2] < 1:
            raise DiffAccelError(
                f"'{text}' is no format of a layer of few bits, such as 'low_bit:w4a4:g50:r0'. The file is damaged, or "
                "of a newer version of diffaccel."
            )
        weight_bits, act_bits, groups, rank = numbers
        return cls(
            weight_bits=weight_bits, act_bits=act_bits, act_groups=groups, rank=rank,
            symmetric=found[5] is not None, dense=found[6] is not None,
        )  # fmt: skip
