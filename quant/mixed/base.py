"""What linears and convolutions of mixed precision share: their tensors, their codes and the weight as floats."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant.formats import Clip
from diffaccel.quant.layer import QuantizedLayer
from diffaccel.quant.mixed.activations import grid_of
from diffaccel.quant.mixed.form import InputRange, MixedFormat
from diffaccel.quant.mixed.weights import expanded, quantize_mixed


class MixedLayer(QuantizedLayer):
    """A layer with a :class:`MixedFormat`.

    Attributes:
        weight: int8 codes ``(N, K)``, or uint8 with two or four codes a byte; K counts the weights of an output.
        weight_scale: fp32 ``(N, 1)``, or ``(N, 2)`` for two ranges of channels.
        weight_multiplier: uint8 ``(N, G)``, below 8 bits.
        weight_sum: int32 sums of the codes, as ``weight_scale``, for calibrated activations.
        input_scale: fp32 ``(1,)`` or ``(2,)``, with ``input_zero`` int32, for calibrated activations.
        first_row: fp32 ``(K,)``, with its product ``first_output`` fp32 ``(N,)``, without the bias.
    """

    form: MixedFormat
    weight_sum: nn.Parameter
    input_scale: nn.Parameter
    input_zero: nn.Parameter
    first_row: nn.Parameter
    first_output: nn.Parameter

    @property
    def columns(self) -> tuple[int, ...]:
        """Number of weights of an output, in each range of channels."""
        raise NotImplementedError

    def int8_matrix(self) -> Tensor:
        """Return the int8 codes ``(N, K)``."""
        if self.form.weight_bits == 8:
            return self.weight.detach()
        return expanded(self.weight, self.weight_multiplier, self.form.weight_bits, sum(self.columns), self.mode)

    def dequantized_matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a matrix ``(N, K)`` in ``dtype``, rounded once."""
        parts = self.int8_matrix().split(self.columns, dim=1)
        scales = self.weight_scale.split(1, dim=1)
        return torch.cat([(part.float() * scale).to(dtype) for part, scale in zip(parts, scales, strict=True)], dim=1)


def mixed_tensors(weight: Tensor, form: MixedFormat, known: InputRange | None, clip: Clip) -> dict[str, Tensor]:
    """Return the stored tensors of a layer with the weight ``(N, C, ...)``."""
    matrix, inner = weight.detach().flatten(1), math.prod(weight.shape[2:])
    tensors = quantize_mixed(matrix, form, clip, split=form.split * inner)
    if form.is_static:
        if known is None or len(known.low) != form.ranges:
            raise DiffAccelError(f"A layer of the format '{form}' needs {form.ranges} calibrated ranges. Calibrate it.")
        scale, zero = grid_of(known.low, known.high, form.activation_bits)
        tensors["input_scale"], tensors["input_zero"] = scale.to(weight.device), zero.to(weight.device)
        tensors["weight_sum"] = _sums(tensors, form, matrix.shape[1], form.split * inner)
    if form.first_row:
        if known is None or known.first_row is None:
            raise DiffAccelError(f"A layer of the format '{form}' needs its constant first row. Calibrate it.")
        row = known.first_row.to(weight.device, torch.float32, copy=True)  # files hold it once a layer
        tensors["first_row"] = row
        tensors["first_output"] = (matrix.double() @ row.double()).float()
    return tensors


def _sums(tensors: dict[str, Tensor], form: MixedFormat, columns: int, split: int) -> Tensor:
    codes = tensors["weight"]
    if form.weight_bits < 8:
        codes = expanded(codes, tensors["weight_multiplier"], form.weight_bits, columns, "reference")
    parts = codes.split([split, columns - split], dim=1) if split else (codes,)
    return torch.stack([part.to(torch.int32).sum(dim=1, dtype=torch.int32) for part in parts], dim=1)


def empty_tensors(weight: Tensor, form: MixedFormat) -> dict[str, Tensor]:
    """Return stored tensors that are to be loaded, on the device of a weight ``(N, C, ...)``."""
    shapes = form.shapes(weight.shape[0], math.prod(weight.shape[1:]))
    made: dict[str, Any] = {
        name: torch.empty(shape, dtype=kind, device=weight.device) for name, (shape, kind) in shapes.items()
    }
    return made
