"""A linear layer whose rounding is being learned: codes of the activations, and soft codes of the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.kernels.int4_weight import pack_int4
from diffaccel.kernels.quantize_rows import quantize_rows_reference
from diffaccel.quant.learned_rounding import SoftRounding
from diffaccel.quant.linear import QLinear

LEARNED = ("w8a8", "w4a8", "w8a16", "w4a16")  # formats of whole symmetric codes


def grid_of(layer: QLinear) -> Tensor:
    """Return the distance of neighbouring codes of each weight, fp32 ``(N, 1)`` or ``(N, K)``."""
    scale: Tensor = layer.weight_scale
    if layer.form.name == "w4a8":
        scale = scale * layer.weight_multiplier.float()
    return scale.repeat_interleave(layer.in_features // scale.shape[1], dim=1) if scale.shape[1] > 1 else scale


class LearnedLinear(nn.Linear):
    """``y = x_q W(V)^T + b``: codes of the activations as the quantized layer makes them, passed straight through.

    Attributes:
        rounding: of the weight.
        is_hard: whether the weight is rounded to codes.
        seen: a list to which rounded inputs are added as rows; None to keep none.
    """

    def __init__(self, layer: QLinear, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.layer = (layer,)  # in a tuple: no submodule
        self.bias = layer.bias
        self.rounding = SoftRounding(weight.detach().float().clone(), layer.form.bits, grid_of(layer))
        self.is_hard = False
        self.seen: list[Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        weight = self.rounding.hard() if self.is_hard else self.rounding.soft()
        x = input
        if self.layer[0].form.activations is not None:
            with torch.no_grad():
                rows = input.reshape(-1, self.in_features)
                codes, scale = quantize_rows_reference(rows, "int8")
                rounded = (codes.float() * scale).to(input.dtype).reshape(input.shape)
            x = input + (rounded - input).detach()
        if self.seen is not None:
            self.seen.append(x.detach().reshape(-1, self.in_features))
        bias = None if self.bias is None else self.bias.detach().to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    @torch.no_grad()
    def finished(self) -> QLinear:
        """Return the quantized layer, with the codes that were learned."""
        layer, codes = self.layer[0], self.rounding.codes()
        layer.weight.copy_(pack_int4(codes) if layer.form.bits == 4 else codes)
        return layer
