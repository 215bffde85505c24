"""A linear layer with weights and activations of few bits, in the place of an ``nn.Linear``."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.low_bit_linear import best_codes, low_bit_linear
from diffaccel.kernels.packed_codes import expand_codes, pack_codes
from diffaccel.kernels.quantize_tokens import quantize_tokens
from diffaccel.quant.formats import Clip, LayerFormat
from diffaccel.quant.linear import QLinear
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.start import INITIAL_CLIP, best_of_rank, codes_of, search_scales
from diffaccel.quant.low_bit.timesteps import TimeGroups, attach, factors

_STORED = ("weight", "weight_scale", "weight_zero", "weight_sum", "act_clip", "side_left", "side_right")


class LowBitLinear(QLinear):
    """``y = x_q W^T + b`` with ``W = s (q - z) + L R`` and activations quantized between each token's own ends.

    Products of codes are exact: on float8 tensor cores where both have up to 4 bits and the device has them, else on
    int8 ones, and by a formula on other devices. The matrix ``L R`` is there for a kept rank only.

    Attributes:
        time: where the groups of the samples are looked up; None for one group.
    """

    form: LowBit
    weight_zero: nn.Parameter
    weight_sum: nn.Parameter
    act_clip: nn.Parameter
    side_left: nn.Parameter
    side_right: nn.Parameter
    time: TimeGroups | None = None

    @classmethod
    def of(cls, linear: nn.Linear, form: LayerFormat, clip: Clip = "mse") -> QLinear:
        """Quantize a linear layer by the search of its scales, without training; its bias is shared.

        Raises:
            DiffAccelError: for a weight that holds an infinity or not-a-number.
        """
        low_bit = _low_bit(form)
        scale, zero = search_scales(linear.weight, low_bit.weight_bits, low_bit.symmetric)
        tensors = stored_tensors(linear.weight, scale, zero, low_bit)
        if low_bit.rank:
            codes = codes_of(linear.weight, scale, zero, low_bit.weight_bits)
            error = linear.weight.detach().float() - (codes - zero) * scale
            tensors["side_left"], tensors["side_right"] = best_of_rank(error, low_bit.rank)
        return cls(linear.in_features, linear.out_features, form, tensors, linear.bias, linear.weight.dtype)

    @property
    def stored(self) -> tuple[str, ...]:
        return tuple(name for name in _STORED if name in self._parameters)

    def centred_codes(self, codes: str = "int8") -> Tensor:
        """Return the centred codes ``(N, K)`` of the weight."""
        form = self.form
        return expand_codes(self.weight, form.bits, form.center, self.in_features, codes, self.mode)  # type: ignore

    def int8_matrix(self) -> Tensor:
        return self.centred_codes()

    def dequantized_matrix(self, dtype: torch.dtype) -> Tensor:
        weight = (self.centred_codes().float() - self.weight_zero) * self.weight_scale
        if self.form.rank:
            weight = weight + self.side_left @ self.side_right
        return weight.to(dtype)

    def product(self, x: Tensor) -> Tensor:
        form, bias = self.form, None if self.bias is None else self.bias.detach()
        codes = best_codes(x.device, form.weight_bits, form.act_bits, self.mode)
        clip = factors(self.act_clip, self.time, len(x))
        a, stats = quantize_tokens(x, clip, form.act_bits, form.symmetric, codes, self.mode)
        rows = (self.weight_scale, self.weight_zero, self.weight_sum)
        y = low_bit_linear(a, stats, self.centred_codes(codes), *rows, bias, x.dtype, self.mode)
        if form.rank:
            seen = ((a.float() - stats[:, 1:2]) * stats[:, :1]).to(x.dtype)
            y = y + F.linear(F.linear(seen, self.side_right.to(x.dtype)), self.side_left.to(x.dtype))
        return y


def stored_tensors(weight: Tensor, scale: Tensor, zero: Tensor, form: LowBit) -> dict[str, Tensor]:
    """Return the stored tensors of a weight with its scales and (uncentred) zeros, and full groups of equal factors."""
    codes = codes_of(weight.detach(), scale, zero, form.weight_bits)
    clip = torch.full((form.act_groups, 2), INITIAL_CLIP, dtype=torch.float32, device=weight.device)
    finite = math.isfinite(float(scale.sum())) and math.isfinite(float(zero.sum())) and not bool(codes.isnan().any())
    if not finite:
        raise DiffAccelError(
            f"A weight of shape {tuple(weight.shape)} or its scales hold infinities or not-a-numbers. Repair the "
            "checkpoint, or name the layer in skip."
        )
    return {
        "weight_scale": scale.detach().float().clone(),
        "weight": pack_codes(codes.to(torch.uint8), form.bits),
        "weight_zero": zero.detach().float() - form.center,
        "weight_sum": (codes - form.center).sum(dim=1, keepdim=True),
        "act_clip": clip,
    }


def attach_time(network: nn.Module, largest: float | None = None) -> None:
    """Let a network's layers of few bits know the noise level of each call, where they have groups of them."""
    layers = [m for m in network.modules() if isinstance(m, LowBitLinear) and m.form.act_groups > 1]
    attach(network, layers, max((layer.form.act_groups for layer in layers), default=1), largest)


def _low_bit(form: LayerFormat) -> LowBit:
    if not isinstance(form, LowBit):
        raise DiffAccelError(f"'{form}' is no format of few bits.")
    return form
