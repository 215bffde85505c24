"""Convolution of int8 codes with exact int32 sums, scaled by picture and output channel, with bias: one pass.

``y[b, o] = (x[b] * w[o]) s_x[b] s_w[o] + bias[o]`` for codes ``x (B, CI, H, W)`` and ``w (CO, CI, R, S)``, both with
channels last in memory, and scales ``s_x (B, 1)`` and ``s_w (CO, 1)`` in fp32. Codes are symmetric, so that zeros
around the picture are exact. The sum of products is an exact int32, converted to fp32, scaled and shifted there, and
rounded once to ``dtype``. The kernel makes no patches; it needs a CI that is a multiple of 16. Windows of one pixel are
a product of rows (:mod:`diffaccel.kernels.int8_linear`), and so is what the kernel cannot take, by patches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.flop_counter
from torch import Tensor

from diffaccel.kernels.dispatch import Mode, is_direct, is_fused, on_device_of
from diffaccel.kernels.int8_linear import LARGEST_K, int8_linear

LEAST_CHANNELS = 16  # bytes that one copy of the kernel moves


def int8_conv2d(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = True,
    mode: Mode = "auto",
) -> Tensor:
    """Convolve int8 codes: ``(x * w) s_x s_w + b``.

    Args:
        x: int8 ``(B, CI, H, W)``; channels last in memory, or they are copied so.
        x_scale: fp32 ``(B, 1)``; NaN makes the picture NaN.
        w: int8 ``(CO, CI, R, S)``, as ``nn.Conv2d`` has its weight; channels last in memory, or they are copied so.
        w_scale: fp32 ``(CO, 1)``.
        bias: ``(CO,)`` or None.
        padding: zeros at both sides of lines and columns.
        dtype: of the result.
        channels_last: memory format of the result.
        mode: "auto" is the kernel on a CUDA device, and patches elsewhere and where it does not fit.

    Raises:
        ValueError: for shapes that do not fit together, a window larger than the picture, a depth whose sums may
            overflow, and an unknown mode.
        TypeError: for codes that are not int8 or scales that are not fp32.
    """
    _check(x, x_scale, w, w_scale, bias)
    out = _out_pixels(x, w, stride, padding)
    if min(out) < 1:
        raise ValueError(
            f"A window of {tuple(w.shape[2:])} does not fit into pictures of {tuple(x.shape[2:])} with {padding} zeros "
            "around."
        )
    if (k := math.prod(w.shape[1:])) > LARGEST_K:
        raise ValueError(f"CI * R * S is {k}: int32 sums are exact up to {LARGEST_K}. Split the layer.")
    is_pixel = w.shape[2:] == (1, 1) and stride == (1, 1) and padding == (0, 0) and channels_last
    if is_pixel or x.shape[1] % LEAST_CHANNELS or not is_fused(mode, x.device, "int8_conv2d"):
        return by_patches(x, x_scale, w, w_scale, bias, stride, padding, dtype, channels_last, mode)
    if is_direct(x, x_scale, w, w_scale):
        return _launch(x, x_scale, w, w_scale, bias, stride, padding, dtype, channels_last)
    return torch.ops.diffaccel.int8_conv2d(
        x, x_scale, w, w_scale, bias, list(stride), list(padding), dtype, channels_last
    )


def by_patches(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dtype: torch.dtype,
    channels_last: bool,
    mode: Mode,
) -> Tensor:
    """Return the convolution as a product of patches ``(B OH OW, R S CI)``, on any device."""
    (rows, columns), out_channels, channels = w.shape[2:], w.shape[0], x.shape[1]
    lines = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    patches = lines.unfold(1, rows, stride[0]).unfold(2, columns, stride[1])  # (B, OH, OW, CI, R, S)
    batch, height, width = patches.shape[:3]
    matrix = patches.permute(0, 1, 2, 4, 5, 3).reshape(batch * height * width, rows * columns * channels)
    taps = w.permute(0, 2, 3, 1).reshape(out_channels, rows * columns * channels)
    scales = x_scale.expand(batch, height * width).reshape(-1, 1)
    y = int8_linear(matrix, scales, taps, w_scale, bias, dtype, mode)
    y = y.reshape(batch, height, width, out_channels).permute(0, 3, 1, 2)
    return y if channels_last else y.contiguous()


def _check(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> None:
    if x.ndim != 4 or w.ndim != 4 or x.shape[1] != w.shape[1]:
        raise ValueError(f"The codes must be (B, CI, H, W) and (CO, CI, R, S); got {tuple(x.shape)}, {tuple(w.shape)}.")
    if x.dtype != torch.int8 or w.dtype != torch.int8:
        raise TypeError(f"The codes must be torch.int8; got {x.dtype} and {w.dtype}.")
    batch, out_channels = x.shape[0], w.shape[0]
    if x_scale.shape != (batch, 1) or w_scale.shape != (out_channels, 1):
        raise ValueError(
            f"The scales must be ({batch}, 1) and ({out_channels}, 1); got {tuple(x_scale.shape)} and "
            f"{tuple(w_scale.shape)}."
        )
    if x_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise TypeError(f"The scales must be float32; got {x_scale.dtype} and {w_scale.dtype}.")
    if bias is not None and bias.shape != (out_channels,):
        raise ValueError(f"The bias must be ({out_channels},); got {tuple(bias.shape)}.")


def _out_pixels(x: Tensor, w: Tensor, stride: Any, padding: Any) -> tuple[int, int]:
    height, width = ((x.shape[2 + i] + 2 * padding[i] - w.shape[2 + i]) // stride[i] + 1 for i in (0, 1))
    return height, width


def _empty(x: Tensor, w: Tensor, stride: Any, padding: Any, dtype: torch.dtype, channels_last: bool) -> Tensor:
    height, width = _out_pixels(x, w, stride, padding)
    if channels_last:
        return x.new_empty((x.shape[0], height, width, w.shape[0]), dtype=dtype).permute(0, 3, 1, 2)
    return x.new_empty((x.shape[0], w.shape[0], height, width), dtype=dtype)


def _launch(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    from diffaccel.kernels.triton_conv import ConvSizes, launch_int8_conv

    y = _empty(x, w, stride, padding, dtype, channels_last)
    (batch, channels, height, width), (out_channels, _, rows, columns) = x.shape, w.shape
    steps, zeros = (stride[0], stride[1]), (padding[0], padding[1])
    sizes = ConvSizes(batch, height, width, y.shape[2], y.shape[3], channels, out_channels, rows, columns, steps, zeros)
    with on_device_of(x):
        launch_int8_conv(x, x_scale, w, (w_scale, bias), y, sizes, channels_last)
    return y


@torch.library.custom_op("diffaccel::int8_conv2d", mutates_args=())
def _int8_conv2d(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    if is_fused("auto", x.device, "int8_conv2d") and x.shape[1] % LEAST_CHANNELS == 0:
        return _launch(x, x_scale, w, w_scale, bias, stride, padding, dtype, channels_last)
    steps, zeros = (stride[0], stride[1]), (padding[0], padding[1])
    y = by_patches(x, x_scale, w, w_scale, bias, steps, zeros, dtype, channels_last, "reference")
    return _empty(x, w, stride, padding, dtype, channels_last).copy_(y)


@_int8_conv2d.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    return _empty(x, w, stride, padding, dtype, channels_last)


@torch.utils.flop_counter.register_flop_formula(torch.ops.diffaccel.int8_conv2d)
def _flops(x_shape: Any, x_scale_shape: Any, w_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * math.prod(out_shape) * math.prod(w_shape[1:]))
