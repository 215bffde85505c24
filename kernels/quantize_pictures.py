"""Quantization of each picture by its own largest magnitude, to int8 codes with channels last.

For a picture x of ``(C, H, W)``, ``s = max(max|x|, 1e-12) / 127`` and ``q = x / s`` rounded to the nearest code, ties
to even: the row of :mod:`diffaccel.kernels.quantize_rows` that the picture is. Zero has the code 0, so that a padding
with zeros is exact. A picture that holds an infinity or not-a-number has the scale NaN and the codes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.dispatch import Mode, is_direct, is_fused, on_device_of
from diffaccel.kernels.quantize_rows import quantize_rows_reference


def quantize_pictures_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes ``(B, C, H, W)``, channels last, and the scales ``(B, 1)``, fp32, of pictures, on any device."""
    rows, scale = quantize_rows_reference(x.permute(0, 2, 3, 1).flatten(1), "int8")
    batch, channels, height, width = x.shape
    return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2), scale


def quantize_pictures(x: Tensor, mode: Mode = "auto") -> tuple[Tensor, Tensor]:
    """Quantize each picture of ``x`` by its own scale.

    Args:
        x: ``(B, C, H, W)``, floating, in any memory format; the kernels read contiguous and channels-last ones as they
            lie.
        mode: "auto" is the kernels on a CUDA device, and the formula elsewhere and inside ``torch.compile``, which then
            fuses it with what computes ``x``.

    Returns:
        Codes ``(B, C, H, W)`` with channels last in memory, and scales ``(B, 1)`` in fp32.

    Raises:
        ValueError: for another shape or mode.
        TypeError: for a dtype that is no floating one.
    """
    if x.ndim != 4:
        raise ValueError(f"quantize_pictures needs pictures (B, C, H, W); got the shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"quantize_pictures needs floating numbers; got {x.dtype}.")
    if torch.compiler.is_compiling() and mode == "auto":
        return quantize_pictures_reference(x)
    if is_fused(mode, x.device, "quantize_pictures"):
        return _launch(x) if is_direct(x) else torch.ops.diffaccel.quantize_pictures(x)
    return quantize_pictures_reference(x)


def _launch(x: Tensor) -> tuple[Tensor, Tensor]:
    from diffaccel.kernels.triton_pictures import launch_quantize_pictures

    with on_device_of(x):
        return launch_quantize_pictures(x)


@torch.library.custom_op("diffaccel::quantize_pictures", mutates_args=(), device_types="cuda")
def _quantize_pictures(x: Tensor) -> tuple[Tensor, Tensor]:
    return _launch(x)


@_quantize_pictures.register_kernel("cpu")
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_pictures_reference(x)


@_quantize_pictures.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = x.shape
    codes = x.new_empty((batch, height, width, channels), dtype=torch.int8).permute(0, 3, 1, 2)
    return codes, x.new_empty((batch, 1), dtype=torch.float32)
