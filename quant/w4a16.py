"""W4A16: weights of 4 bits in groups with a scale each, activations as they are: a quarter of the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from diffaccel.quant.base import Quantization
from diffaccel.quant.formats import Clip, LayerFormat
from diffaccel.quant.group_size import check_group_size


@dataclass(frozen=True, kw_only=True)
class W4A16(Quantization):
    """Linears as ``y = x (q s)^T + b`` with ``q`` in [-7, 7] and a scale ``s`` for each group along a row.

    A layer whose width no group of 16 or more divides has 8 bits instead. Nothing is calibrated. GPUs have no product
    of 4 with 16 bits: the weight is expanded at each call, so that time is that of 16 bits, and bytes are saved.

    Args:
        group_size: codes that share a scale; where it does not divide a row, the largest common divisor does.
        clip: choose each scale for the least squared error of its group ("mse"), or by its largest magnitude ("none").
    """

    name: ClassVar[str] = "w4a16"
    citation: ClassVar[str] = "ZeroQuant (group-wise rounding), arXiv 2206.01861"

    group_size: int = 128
    clip: Clip = "mse"

    @classmethod
    def paper(cls) -> Self:
        """Return plain rounding by the largest magnitude of each group."""
        return cls(clip="none")

    def validate(self) -> None:
        super().validate()
        check_group_size(self)

    def linear_format(self) -> LayerFormat:
        return LayerFormat("w4a16", self.group_size)
