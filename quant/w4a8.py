"""W4A8: weights of 4 bits in memory and products of 8 bits: groups whose scales are whole multiples of the row's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from diffaccel.quant.base import Quantization
from diffaccel.quant.formats import Clip, LayerFormat
from diffaccel.quant.group_size import check_group_size


@dataclass(frozen=True, kw_only=True)
class W4A8(Quantization):
    """Linears as ``y = (q_x (q u)^T) * (s_x s_w^T) + b`` with ``q`` in [-7, 7] and whole multiples ``u`` in 1..18.

    The codes ``q u`` are exact int8, so that the product is that of int8 with exact sums, and a weight takes a quarter
    of the memory. A layer whose width no group of 16 or more divides has 8 bits instead. Nothing is calibrated.

    Args:
        group_size: codes that share a multiple; where it does not divide a row, the largest common divisor does.
        clip: choose each multiple for the least squared error of its group ("mse"), or so that nothing is clipped
            ("none").
    """

    name: ClassVar[str] = "w4a8"
    citation: ClassVar[str] = "QServe (two-level groups), arXiv 2405.04532"

    group_size: int = 128
    clip: Clip = "mse"

    @classmethod
    def paper(cls) -> Self:
        """Return groups of 128 without a search for the scale, as published; the published codes are not symmetric."""
        return cls(group_size=128, clip="none")

    def validate(self) -> None:
        super().validate()
        check_group_size(self)

    def linear_format(self) -> LayerFormat:
        return LayerFormat("w4a8", self.group_size)
