"""What quantized layers share: stored tensors that casts leave alone, their making, and their way back to floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.dispatch import Mode
from diffaccel.kernels.int4_weight import expand_int4
from diffaccel.kernels.weight_linear import dequantize
from diffaccel.quant.formats import LayerFormat

STORED = (
    "weight", "weight_multiplier", "weight_scale", "weight_sum", "input_scale", "input_zero", "first_row",
    "first_output",
)  # fmt: skip


class PackedParameter(nn.Parameter):
    """Two codes a byte. The loader of adapters asks a parameter of this class name for the shape of its weight."""

    bits = 4

    @property
    def quant_shape(self) -> torch.Size:
        """The shape ``(N, K)`` of the codes."""
        return torch.Size((self.shape[0], self.shape[1] * 8 // self.bits))


PackedParameter.__name__ = "GGUFParameter"  # diffusers compares names: another shape than a LoRA's would be "expanded"
_PACKED = {bits: type("GGUFParameter", (PackedParameter,), {"bits": bits}) for bits in (2, 3, 5, 6, 7)}
_PACKED[4] = PackedParameter


def stored_parameter(name: str, tensor: Tensor, form: LayerFormat) -> nn.Parameter:
    """Return a stored tensor as the parameter that a layer of this format has."""
    cls = _PACKED.get(form.bits, nn.Parameter) if name == "weight" else nn.Parameter
    return cls(tensor, requires_grad=False)


class QuantizedLayer(nn.Module):
    """A layer with codes and scales in the place of its weight.

    Casts (``.to(dtype)``, ``.half()``) change the dtype of the bias and leave codes and scales as they are.

    Attributes:
        form: how it is stored and computed.
        compute_dtype: dtype of the layer that it stands for; adapters that are loaded onto it get this dtype.
        casts: the dtypes that the network was cast to since, in order; each rounds the weights of other layers.
        mode: form of its operations, see :mod:`diffaccel.kernels.dispatch`.
        fast_accumulation: of float8 products.
    """

    form: LayerFormat
    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_multiplier: nn.Parameter
    compute_dtype: torch.dtype
    casts: tuple[torch.dtype, ...] = ()
    mode: Mode
    fast_accumulation: bool

    def hold(
        self, form: LayerFormat, tensors: dict[str, Tensor], bias: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        """Take stored tensors as the layer's own."""
        self.form, self.compute_dtype, self.mode, self.fast_accumulation = form, dtype, "auto", True
        for name, tensor in tensors.items():
            self.register_parameter(name, stored_parameter(name, tensor, form))
        self.register_parameter("bias", bias)

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the stored tensors."""
        return tuple(name for name in STORED if name in self._parameters)

    def plain(self) -> nn.Module:
        """Return a layer with the dequantized weight."""
        raise NotImplementedError

    def int8_matrix(self) -> Tensor:
        """Return the int8 codes ``(N, K)`` of a weight whose activations are int8 too."""
        if self.form.bits == 4:
            return expand_int4(self.weight, self.weight_multiplier, self.mode)
        return self.weight.flatten(1)

    def dequantized_matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as a matrix ``(N, K)`` in ``dtype``."""
        if self.form.name == "w4a8":
            return dequantize(self.int8_matrix(), self.weight_scale, dtype, self.mode)
        return dequantize(self.weight.flatten(1), self.weight_scale, dtype, self.mode)

    def weight_bytes(self) -> int:
        """Return the bytes of codes, scales and bias."""
        return sum(p.numel() * p.element_size() for p in self.parameters(recurse=False))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.form}"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state with float8 codes as bytes: pickle cannot read tensors of float8."""
        state = dict(self.__dict__)
        if self.form.dtype == torch.float8_e4m3fn:
            weight = nn.Parameter(self.weight.detach().view(torch.uint8), requires_grad=False)
            state["_parameters"] = {**self._parameters, "weight": weight}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        weight = self.weight.detach().view(self.form.dtype)
        self._parameters["weight"] = stored_parameter("weight", weight, self.form)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move codes and scales as whole numbers, which no cast changes; the bias and the adapters' dtype follow."""
        views = {torch.float8_e4m3fn: torch.uint8, torch.float32: torch.int32}
        plain = {name: self._parameters[name] for name in self.stored}
        for name, parameter in plain.items():
            if parameter is not None and parameter.dtype in views:
                whole = parameter.detach().view(views[parameter.dtype])
                self._parameters[name] = nn.Parameter(whole, requires_grad=False)
        try:
            super()._apply(fn, recurse)
        finally:
            for name, parameter in plain.items():
                moved = self._parameters[name]
                if parameter is None or moved is None or moved is parameter:
                    continue
                data = moved.detach().view(parameter.dtype)
                if data.is_meta == parameter.is_meta:  # the same parameter, which others may hold
                    parameter.data, self._parameters[name] = data, parameter
                else:
                    self._parameters[name] = stored_parameter(name, data, self.form)
        dtype = fn(torch.empty((), dtype=self.compute_dtype, device="cpu")).dtype
        if dtype != self.compute_dtype:
            self.compute_dtype, self.casts = dtype, (*self.casts, dtype)
        return self


def check_stored(layer: str, name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise for a stored tensor of a file that does not fit its layer.

    Raises:
        DiffAccelError: for another shape or dtype, and for scales that are not finite.
    """
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise DiffAccelError(
            f"'{layer}.{name}' is {tensor.dtype} {tuple(tensor.shape)} in the checkpoint; its format asks for {dtype} "
            f"{shape}. The file is damaged, or its config.json belongs to another one."
        )
    if tensor.dtype == torch.float32 and not bool(torch.isfinite(tensor).all()):
        raise DiffAccelError(f"'{layer}.{name}' holds numbers that are not finite. Quantize the model again.")


class StraightThrough(torch.autograd.Function):
    """The quantized product forwards, and the gradient of the product with the dequantized weight backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        """Return the layer's product."""
        ctx.layer = layer
        result: Tensor = layer.product(x)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return ``g W``."""
        gradient = gradients[0]
        return gradient @ ctx.layer.dequantized_matrix(gradient.dtype), None


class QuantizedLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """A quantized layer in the place of an ``nn.Linear``, by its product of rows."""

    def dequantize(self) -> Tensor:
        """Return the weight ``(N, K)`` in the dtype of the layer that this one stands for."""
        return self.dequantized_matrix(self.compute_dtype)

    def plain(self) -> nn.Linear:
        """Return an ``nn.Linear`` with the dequantized weight."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.compute_dtype)
        linear.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        linear.bias = self.bias
        return linear

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if input.shape[-1] != self.in_features:
            raise DiffAccelError(
                f"A quantized linear layer of {self.in_features} features got {tuple(input.shape)}; the last dimension "
                f"must be {self.in_features}."
            )
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return self._on_rows(input)
        with torch.autocast(kind, enabled=False):  # which would round sums
            return self._on_rows(input.to(torch.get_autocast_dtype(kind)))

    def _on_rows(self, input: Tensor) -> Tensor:  # noqa: A002
        x = input.reshape(math.prod(input.shape[:-1]), self.in_features)
        is_trained = torch.is_grad_enabled() and x.requires_grad
        y: Tensor = StraightThrough.apply(x, self) if is_trained else self.product(x)
        return y.reshape(*input.shape[:-1], self.out_features)

    def product(self, x: Tensor) -> Tensor:
        """Return ``x W^T + b`` for rows ``x (M, K)``."""
        raise NotImplementedError


class QuantizedConv(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """A quantized layer in the place of an ``nn.Conv2d``."""

    def dequantize(self) -> Tensor:
        """Return the weight in the dtype of the layer that this one stands for."""
        raise NotImplementedError

    def plain(self) -> nn.Conv2d:
        """Return an ``nn.Conv2d`` with the dequantized weight."""
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        conv = nn.Conv2d(**options, bias=False, padding_mode=self.padding_mode, device="meta", dtype=self.compute_dtype)
        conv.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        conv.bias = self.bias
        return conv

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        kind = input.device.type
        if not torch.is_autocast_enabled(kind):
            return self._convolve(input)
        with torch.autocast(kind, enabled=False):  # which would round sums
            return self._convolve(input.to(torch.get_autocast_dtype(kind)))

    def _convolve(self, x: Tensor) -> Tensor:
        raise NotImplementedError
