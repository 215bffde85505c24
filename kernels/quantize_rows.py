"""Quantization of each row by its own largest magnitude, read once: 8-bit integers or float8 codes.

For a row x, ``s = max(max|x|, 1e-12) / L`` with L = 127 for int8 and 448 for float8 (e4m3fn), and ``q = x / s``
rounded to the nearest code, ties to even, within [-L, L]. A row that holds an infinity or not-a-number has the scale
NaN and the codes 0, so that every product with it is NaN. A row of zeros has codes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.codes import DTYPES, LARGEST, SMALLEST, Codes
from diffaccel.kernels.dispatch import Mode, is_direct, is_fused, on_device_of


def quantize_rows_reference(x: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Return the codes ``(M, K)`` and the scales ``(M, 1)``, fp32, of the rows of ``x``, on any device."""
    largest = LARGEST[codes]
    x = x.float()
    amax = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros((x.shape[0], 1))
    amax = amax.clamp_min(SMALLEST)  # keeps NaN
    is_finite = torch.isfinite(amax)
    scale = torch.where(is_finite, amax * (1 / largest), float("nan"))
    scaled = torch.where(is_finite, x * (amax.reciprocal() * largest), 0.0)
    if codes == "int8":
        scaled = scaled.round()
    return scaled.clamp(-largest, largest).to(DTYPES[codes]), scale


def quantize_rows(x: Tensor, codes: Codes, mode: Mode = "auto") -> tuple[Tensor, Tensor]:
    """Quantize each row of ``x`` by its own scale.

    Args:
        x: ``(M, K)``, floating, at most 64 bits wide; its last dimension contiguous for the kernel.
        codes: "int8" or "fp8".
        mode: "auto" is the kernel on a CUDA device, and the formula elsewhere and inside ``torch.compile``, which then
            fuses it with what computes ``x``.

    Returns:
        Codes ``(M, K)`` and scales ``(M, 1)`` in fp32: ``x ~ codes * scales``.

    Raises:
        ValueError: for another shape, kind of codes or mode.
        TypeError: for a dtype that is no floating one.
    """
    if codes not in LARGEST:
        raise ValueError(f"codes is {codes!r}; it must be 'int8' or 'fp8'.")
    if x.ndim != 2:
        raise ValueError(f"quantize_rows needs a matrix (M, K); got the shape {tuple(x.shape)}.")
    if not x.is_floating_point():
        raise TypeError(f"quantize_rows needs floating numbers; got {x.dtype}.")
    if torch.compiler.is_compiling() and mode == "auto":
        return quantize_rows_reference(x, codes)
    if is_fused(mode, x.device, "quantize_rows", (8, 9) if codes == "fp8" else (8, 0)):
        return _launch(x, codes) if is_direct(x) else torch.ops.diffaccel.quantize_rows(x, codes)
    return quantize_rows_reference(x, codes)


def _launch(x: Tensor, codes: str) -> tuple[Tensor, Tensor]:
    from diffaccel.kernels.triton_rows import launch_quantize_rows

    with on_device_of(x):
        return launch_quantize_rows(x, codes)


@torch.library.custom_op("diffaccel::quantize_rows", mutates_args=(), device_types="cuda")
def _quantize_rows(x: Tensor, codes: str) -> tuple[Tensor, Tensor]:
    return _launch(x, codes)


@_quantize_rows.register_kernel("cpu")
def _(x: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    return quantize_rows_reference(x, codes)


@_quantize_rows.register_fake
def _(x: Tensor, codes: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=DTYPES[codes]), x.new_empty((x.shape[0], 1), dtype=torch.float32)
