"""A linear layer of mixed precision, in the place of an ``nn.Linear``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffaccel.kernels.int8_linear import int8_linear
from diffaccel.kernels.weight_linear import weight_linear
from diffaccel.quant.formats import Clip
from diffaccel.quant.layer import QuantizedLinear
from diffaccel.quant.mixed.activations import static_rows, token_rows
from diffaccel.quant.mixed.base import MixedLayer, empty_tensors, mixed_tensors
from diffaccel.quant.mixed.first_row import RowMemo
from diffaccel.quant.mixed.form import InputRange, MixedFormat


class MixedLinear(MixedLayer, QuantizedLinear):  # type: ignore[misc]
    """``y = x W^T + b`` with codes of 2, 4 or 8 bits, and activations of 4, 8 or 16.

    Products of codes have exact int32 sums. Calibrated activations, codes q of scale D and zero point z:
    ``y = D s_w (sum q q_w - z sum q_w) + b``. A row of the text states that equals the stored one has the stored
    output, a row of zeros the bias, and another first row its own scale (arXiv 2405.17873).
    """

    def __init__(
        self, in_features: int, out_features: int, form: MixedFormat, tensors: dict[str, Tensor],
        bias: nn.Parameter | None, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.hold(form, tensors, bias, dtype)
        if form.first_row:
            self.row_memo = RowMemo()

    @classmethod
    def of(
        cls, linear: nn.Linear, form: MixedFormat, known: InputRange | None = None, clip: Clip = "mse"
    ) -> MixedLinear:
        """Quantize a linear layer; its bias is shared."""
        tensors = mixed_tensors(linear.weight, form, known, clip)
        return cls(linear.in_features, linear.out_features, form, tensors, linear.bias, linear.weight.dtype)

    @classmethod
    def empty(cls, linear: nn.Linear, form: MixedFormat, dtype: torch.dtype) -> MixedLinear:
        """Return a layer whose stored tensors are to be loaded, on the device of ``linear``."""
        tensors = empty_tensors(linear.weight, form)
        return cls(linear.in_features, linear.out_features, form, tensors, linear.bias, dtype)

    @property
    def columns(self) -> tuple[int, ...]:
        return (self.in_features,)

    def _on_rows(self, input: Tensor) -> Tensor:  # noqa: A002
        y = super()._on_rows(input)
        return self._with_first_rows(input, y) if self.form.first_row and input.ndim == 3 else y

    def product(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` for rows ``x (M, K)``."""
        form, bias = self.form, None if self.bias is None else self.bias.detach()
        if form.activation_bits == 16:
            return weight_linear(x, self.int8_matrix(), self.weight_scale, bias, self.mode)
        if form.scale == "token":
            return self._by_token(x)
        codes, scale, zero = static_rows(x, self.input_scale, self.input_zero, form.activation_bits)
        shift = self.input_scale * self.weight_scale[:, 0] * (zero * self.weight_sum[:, 0]).float()
        shifted = -shift if bias is None else bias.float() - shift
        return int8_linear(codes, scale, self.int8_matrix(), self.weight_scale, shifted, x.dtype, self.mode)

    def _by_token(self, x: Tensor) -> Tensor:
        codes, scale = token_rows(x, min(self.form.activation_bits, 8), self.mode)
        bias = None if self.bias is None else self.bias.detach()
        return int8_linear(codes, scale, self.int8_matrix(), self.weight_scale, bias, x.dtype, self.mode)

    def _with_first_rows(self, states: Tensor, y: Tensor) -> Tensor:
        """Put the outputs of special rows of text states ``(B, T, K)`` into ``y (B, T, N)``."""
        kinds = self.row_memo(states, self.first_row)
        zero = y.new_zeros(()) if self.bias is None else self.bias.detach().to(y.dtype)
        y = torch.where(kinds.zero, zero, y)
        stored = self.first_output if self.bias is None else self.first_output + self.bias.detach().float()
        y = torch.where(kinds.constant, stored.to(y.dtype), y)
        if not self.form.is_static:
            return y
        own = torch.where(kinds.other, self._by_token(states[:, 0].detach()), y[:, 0])
        return torch.cat([own.unsqueeze(1), y[:, 1:]], dim=1)
