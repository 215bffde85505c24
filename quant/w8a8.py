"""W8A8: weights and activations of 8 bits, as integers or float8, with a scale for each row and each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from diffaccel.config import Level, Machine
from diffaccel.quant.base import Quantization
from diffaccel.quant.formats import LayerFormat

Codes8 = Literal["int8", "fp8"]


@dataclass(frozen=True, kw_only=True)
class W8A8(Quantization):
    """Linears as ``y = (q_x q_w^T) * (s_x s_w^T) + b`` with 8-bit codes: half the memory, and the 8-bit tensor cores.

    Each row of a weight has the scale ``max|w| / L``, each token of the activations ``max|x| / L`` at each call, with
    L = 127 for int8, whose sums are exact, and 448 for float8 (e4m3fn). Nothing is calibrated.

    Args:
        dtype: of the codes: "fp8" is the fastest on GPUs of capability 8.9 and more, "int8" also runs on 8.0.
        fast_accumulation: of float8 products: faster sums with fewer bits.
    """

    name: ClassVar[str] = "w8a8"
    citation: ClassVar[str] = "ZeroQuant, arXiv 2206.01861; FP8 formats, arXiv 2209.05433"

    dtype: Codes8 = "int8"
    fast_accumulation: bool = True

    @classmethod
    def support(cls, machine: Machine) -> tuple[Level, str]:
        """Return what the kernels need; float8 needs capability 8.9."""
        level, why = super().support(machine)
        if level == "fast" and (machine.capability or (0, 0)) < (8, 9):
            return level, "int8 kernels for this device; dtype='fp8' needs capability 8.9"
        return level, why

    @classmethod
    def paper(cls) -> Self:
        """Return token-wise int8 activations and int8 weights, as published, with the modulation left alone."""
        return cls(dtype="int8", modulation="keep", convs="keep")

    def linear_format(self) -> LayerFormat:
        return LayerFormat("w8a8_fp8" if self.dtype == "fp8" else "w8a8")

    def finish(self, layer: Any) -> None:
        super().finish(layer)
        layer.fast_accumulation = self.fast_accumulation
