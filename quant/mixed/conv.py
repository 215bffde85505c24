"""A convolution of mixed precision, in the place of an ``nn.Conv2d``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffaccel.quant.formats import Clip
from diffaccel.quant.layer import QuantizedConv
from diffaccel.quant.mixed.activations import picture_levels, static_levels
from diffaccel.quant.mixed.base import MixedLayer, empty_tensors, mixed_tensors
from diffaccel.quant.mixed.form import InputRange, MixedFormat


class MixedConv2d(MixedLayer, QuantizedConv):  # type: ignore[misc]
    """A convolution with weight codes of 2, 4 or 8 bits, and activations of 4, 8 or 16.

    Activations become whole levels, of at most 255, which bfloat16 and float32 hold exactly, and are convolved with
    whole codes by the library; the sum is scaled once. Zero is level 0, so that padding is exact. Two ranges of
    channels (a skip connection beside what it is joined to) have scales of their own and are convolved apart.
    """

    def __init__(self, conv: nn.Conv2d, form: MixedFormat, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))
        self.hold(form, tensors, conv._parameters["bias"], dtype)

    @classmethod
    def of(cls, conv: nn.Conv2d, form: MixedFormat, known: InputRange | None = None, clip: Clip = "mse") -> MixedConv2d:
        """Quantize a convolution; its bias is shared."""
        return cls(conv, form, mixed_tensors(conv.weight, form, known, clip), conv.weight.dtype)

    @classmethod
    def empty(cls, conv: nn.Conv2d, form: MixedFormat, dtype: torch.dtype) -> MixedConv2d:
        """Return a layer whose stored tensors are to be loaded, on the device of ``conv``."""
        return cls(conv, form, empty_tensors(conv.weight, form), dtype)

    @property
    def columns(self) -> tuple[int, ...]:
        whole = self.in_channels // self.groups * math.prod(self.kernel_size)
        first = self.form.split * math.prod(self.kernel_size)
        return (first, whole - first) if first else (whole,)

    def _shaped(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def dequantize(self) -> Tensor:
        """Return the weight in the dtype of the layer that this one stands for."""
        return self._shaped(self.dequantized_matrix(self.compute_dtype))

    def _convolve(self, x: Tensor) -> Tensor:
        is_trained = torch.is_grad_enabled() and x.requires_grad
        if self.form.activation_bits == 16 or is_trained or x.ndim != 4:
            weight = self._shaped(self.dequantized_matrix(x.dtype))
            return self._conv_forward(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        # whole numbers up to 256 are exact in bfloat16, whose products GPUs sum in float32
        dtype = torch.bfloat16 if x.is_cuda and x.dtype != torch.float32 else torch.float32
        weight, first = self._shaped(self.int8_matrix()).to(dtype), self.form.split
        parts = [(x[:, :first], weight[:, :first]), (x[:, first:], weight[:, first:])] if first else [(x, weight)]
        products = []
        for number, (channels, codes) in enumerate(parts):
            levels, scale = self._levels(channels, number)
            sums = self._conv_forward(levels.to(dtype), codes, None).float()
            products.append(sums * (scale * self.weight_scale[:, number].reshape(1, -1, 1, 1)))
        y = products[0] if len(products) == 1 else products[0] + products[1]
        return (y if self.bias is None else y + self.bias.detach().float().reshape(1, -1, 1, 1)).to(x.dtype)

    def _levels(self, x: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return whole levels of a range of channels, and their scale."""
        bits = self.form.activation_bits
        if not self.form.is_static:
            return picture_levels(x, bits)
        scale, zero = self.input_scale[number], self.input_zero[number]
        return static_levels(x, scale, zero, bits), scale
