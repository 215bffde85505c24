"""Linear layers whose weight alone is quantized: ``y = x (q s)^T + b`` with the activations as they are.

Few rows (the modulation of a network, once a sample) read each code once in one kernel. Many rows expand the weight to
the activations' dtype first and use the library's product: on GPUs without 4-bit products the codes save bytes only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from torch import Tensor

from diffaccel.kernels.dispatch import Mode, is_direct, is_fused, on_device_of
from diffaccel.kernels.int4_weight import dequantize_int4

FEW_ROWS = 16


def dequantize(w: Tensor, w_scale: Tensor, dtype: torch.dtype, mode: Mode = "auto") -> Tensor:
    """Return the weight ``(N, K)`` of int8 or float8 codes ``(N, K)`` or packed 4-bit codes ``(N, K / 2)``.

    Args:
        w: int8 or float8_e4m3fn codes, or uint8 with two 4-bit codes a byte.
        w_scale: fp32 ``(N, 1)``, or ``(N, G)`` for 4 bits.
    """
    if w.dtype == torch.uint8:
        return dequantize_int4(w, w_scale, dtype, mode)
    is_compiled = torch.compiler.is_compiling() and mode == "auto"  # fused with its neighbours by the compiler
    if w.dtype == torch.int8 and not is_compiled and is_fused(mode, w.device, "dequantize"):
        return (_dequantized if is_direct(w) else torch.ops.diffaccel.dequantize_int8)(w, w_scale, dtype)
    return (w.float() * w_scale).to(dtype)


def weight_linear_reference(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x (q s)^T + b`` in the dtype of ``x``, on any device."""
    y = F.linear(x, dequantize(w, w_scale, x.dtype, "reference"))
    return y if bias is None else y + bias.to(x.dtype)


def weight_linear(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None = None, mode: Mode = "auto") -> Tensor:
    """Multiply activations by a quantized weight: ``x (q s)^T + b`` in the dtype of ``x``.

    Args:
        x: ``(M, K)``, floating.
        w: int8 ``(N, K)``, or uint8 ``(N, K / 2)`` with two 4-bit codes a byte.
        w_scale: fp32 ``(N, 1)``, or ``(N, G)`` for 4 bits.
        bias: ``(N,)`` or None.
        mode: "auto" on a CUDA device is one kernel for up to 16 rows of 16-bit activations, and for more rows an
            expansion of the weight and the library's product.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    k = w.shape[1] * (2 if w.dtype == torch.uint8 else 1)
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"The activations must be (M, {k}); got {tuple(x.shape)}.")
    if not is_fused(mode, x.device, "weight_linear"):
        return weight_linear_reference(x, w, w_scale, bias)
    groups = k // w_scale.shape[1]
    is_gemv = x.shape[0] <= FEW_ROWS and x.dtype in (torch.bfloat16, torch.float16) and groups % 32 == 0
    if is_gemv:
        return (_few_rows if is_direct(x) else torch.ops.diffaccel.weight_gemv)(x, w, w_scale, bias)
    return F.linear(x, dequantize(w, w_scale, x.dtype, mode), None if bias is None else bias.to(x.dtype))


def _dequantized(w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    if not is_fused("auto", w.device, "dequantize"):
        return (w.float() * w_scale).to(dtype)
    from diffaccel.kernels.triton_weights import launch_int8

    with on_device_of(w):
        return launch_int8(w, w_scale, dtype)


_dequantize_int8 = torch.library.custom_op("diffaccel::dequantize_int8", _dequantized, mutates_args=())


@_dequantize_int8.register_fake
def _(w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return w.new_empty(w.shape, dtype=dtype)


def _few_rows(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    if not is_fused("auto", x.device, "weight_gemv"):
        return weight_linear_reference(x, w, w_scale, bias)
    from diffaccel.kernels.triton_weights import launch_gemv

    with on_device_of(x):
        return launch_gemv(x, w, w_scale, bias)


_weight_gemv = torch.library.custom_op("diffaccel::weight_gemv", _few_rows, mutates_args=())


@_weight_gemv.register_fake
def _(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], w.shape[0]))


@torch.utils.flop_counter.register_flop_formula(torch.ops.diffaccel.weight_gemv)
def _flops(x_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * x_shape[0] * x_shape[1] * w_shape[0])
