"""A linear layer with a quantized weight, in the place of an ``nn.Linear``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffaccel.kernels.codes import Codes
from diffaccel.kernels.fp8_linear import fp8_linear
from diffaccel.kernels.int8_linear import int8_linear
from diffaccel.kernels.quantize_rows import quantize_rows
from diffaccel.kernels.weight_linear import weight_linear
from diffaccel.quant.formats import Clip, LayerFormat, quantize_weight
from diffaccel.quant.layer import QuantizedLinear


class QLinear(QuantizedLinear):
    """``y = x W^T + b`` with ``W`` in one of the formats of :class:`diffaccel.quant.formats.LayerFormat`.

    Activations of "w8a8", "w8a8_fp8" and "w4a8" are quantized row by row, by the largest magnitude of each row at each
    call. The result has the dtype of the input. Gradients go to the input, as if the weight were dequantized, so that
    adapters on it can be trained.

    Attributes:
        weight: the codes; :meth:`dequantize` returns floats.
        weight_scale: fp32 ``(N, 1)``, or ``(N, K / group)`` for "w4a16".
        weight_multiplier: uint8 ``(N, K / group)``, of "w4a8" only.
    """

    def __init__(
        self, in_features: int, out_features: int, form: LayerFormat, tensors: dict[str, Tensor],
        bias: nn.Parameter | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.hold(form, tensors, bias, dtype)

    @classmethod
    def of(cls, linear: nn.Linear, form: LayerFormat, clip: Clip = "mse") -> QLinear:
        """Quantize a linear layer; its bias is shared."""
        tensors = quantize_weight(linear.weight, form, clip)
        return cls(linear.in_features, linear.out_features, form, tensors, linear.bias, linear.weight.dtype)

    @classmethod
    def empty(cls, linear: nn.Linear, form: LayerFormat, dtype: torch.dtype) -> QLinear:
        """Return a layer whose stored tensors are to be loaded, on the device of ``linear``."""
        shapes = form.shapes(linear.out_features, linear.in_features)
        tensors = {
            name: torch.empty(shape, dtype=kind, device=linear.weight.device) for name, (shape, kind) in shapes.items()
        }
        return cls(linear.in_features, linear.out_features, form, tensors, linear.bias, dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` for rows ``x (M, K)``."""
        codes, bias = self.form.activations, None if self.bias is None else self.bias.detach()
        if codes is None:
            return weight_linear(x, self.weight, self.weight_scale, bias, self.mode)
        return self.product_of_codes(*quantize_rows(x, codes, self.mode), x.dtype)

    @property
    def input_codes(self) -> Codes | None:
        """The codes that :meth:`product_of_codes` takes; None where the layer takes numbers, or is told how to run."""
        return self.form.activations if self.mode == "auto" else None

    def product_of_codes(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Return ``x W^T + b`` in ``dtype`` for rows ``x = q * scale`` of codes ``(M, K)`` and scales ``(M, 1)``."""
        bias = None if self.bias is None else self.bias.detach()
        if self.form.activations == "fp8":
            fast = self.fast_accumulation
            return fp8_linear(q, scale, self.weight, self.weight_scale, bias, dtype, self.mode, fast)
        return int8_linear(q, scale, self.int8_matrix(), self.weight_scale, bias, dtype, self.mode)
