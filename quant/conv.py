"""A convolution with a quantized weight, in the place of an ``nn.Conv2d``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffaccel.kernels.int8_conv import int8_conv2d
from diffaccel.kernels.quantize_pictures import quantize_pictures
from diffaccel.quant.formats import LayerFormat, quantize_weight
from diffaccel.quant.layer import QuantizedConv


class QConv2d(QuantizedConv):
    """A convolution whose weight has int8 codes and one scale an output channel.

    "w8a16" dequantizes the weight and convolves activations as they are. "w8a8" quantizes each picture by its largest
    magnitude and convolves the codes with exact int32 sums; padding with zeros is exact, since codes are symmetric.
    Its codes lie with channels last in memory, as the kernel reads them; files hold them as those of other layers.
    """

    def __init__(self, conv: nn.Conv2d, form: LayerFormat, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "transposed", "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(conv, name))
        if form.activations is not None:
            tensors = {**tensors, "weight": tensors["weight"].contiguous(memory_format=torch.channels_last)}
        self.hold(form, tensors, conv._parameters["bias"], dtype)

    @classmethod
    def of(cls, conv: nn.Conv2d, form: LayerFormat) -> QConv2d:
        """Quantize a convolution; its bias is shared."""
        tensors = quantize_weight(conv.weight.flatten(1), form)
        return cls(conv, form, {**tensors, "weight": tensors["weight"].reshape(conv.weight.shape)}, conv.weight.dtype)

    @classmethod
    def empty(cls, conv: nn.Conv2d, form: LayerFormat, dtype: torch.dtype) -> QConv2d:
        """Return a layer whose stored tensors are to be loaded, on the device of ``conv``."""
        device, channels = conv.weight.device, conv.out_channels
        weight = torch.empty(conv.weight.shape, dtype=form.dtype, device=device)
        scale = torch.empty((channels, 1), dtype=torch.float32, device=device)
        return cls(conv, form, {"weight": weight, "weight_scale": scale}, dtype)

    @staticmethod
    def multiplies_codes(conv: nn.Conv2d) -> bool:
        """Return whether a convolution has a form with int8 activations: one group, no dilation, zeros around."""
        is_plain = conv.groups == 1 and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        return is_plain and conv.dilation == (1, 1)

    def dequantize(self) -> Tensor:
        """Return the weight in the dtype of the layer that this one stands for."""
        return self.dequantized_matrix(self.compute_dtype).reshape(self.weight.shape)

    def _convolve(self, x: Tensor) -> Tensor:
        is_trained = torch.is_grad_enabled() and x.requires_grad
        if self.form.activations is None or is_trained or x.ndim != 4:
            weight = self.dequantized_matrix(x.dtype).reshape(self.weight.shape)
            return self._conv_forward(x, weight, None if self.bias is None else self.bias.to(x.dtype))
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        """Return the convolution of codes, in the memory format of the pictures."""
        is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        codes, scale = quantize_pictures(x, self.mode)  # one scale a picture
        (step_y, step_x), (top, left) = self.stride, (int(side) for side in self.padding)
        bias = None if self.bias is None else self.bias.detach()
        stride, padding = (step_y, step_x), (top, left)
        return int8_conv2d(
            codes, scale, self.weight, self.weight_scale, bias, stride, padding, x.dtype, is_last, self.mode
        )
