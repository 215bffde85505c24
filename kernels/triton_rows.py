"""Triton kernel of :mod:`diffaccel.kernels.quantize_rows`: one program a row, one read of it."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels.codes import DTYPES, LARGEST, SMALLEST
from diffaccel.kernels.dispatch import power_above

_ONE_BLOCK = 16384  # elements of a row that one program holds in registers; longer rows are read twice
_LONG_BLOCK = 8192


@triton.jit
def round_to_codes(x, amax, bad, LARGEST: tl.constexpr, IS_INT8: tl.constexpr):
    """Round to codes; adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even."""
    scaled = tl.where(bad, 0.0, x * (tl.div_rn(1.0, amax) * LARGEST))
    if IS_INT8:
        scaled = (scaled + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)


@triton.jit
def quantize_rows_kernel(
    x_ptr, q_ptr, scale_ptr, K, stride_x,
    LARGEST: tl.constexpr, INVERSE: tl.constexpr, SMALLEST: tl.constexpr, IS_INT8: tl.constexpr,
    BLOCK: tl.constexpr, IS_LONG: tl.constexpr,
):  # fmt: skip
    """Quantize row ``program_id(0)``: codes to ``q_ptr`` (rows of K), the scale to ``scale_ptr``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x_row, q_row = x_ptr + row * stride_x, q_ptr + row * K
    if IS_LONG:
        largest = tl.zeros((BLOCK,), tl.float32)
        nans = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, K, BLOCK):
            part = tl.load(x_row + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(part))
            nans += (part != part).to(tl.int32)
        amax, nan_count = tl.max(largest, axis=0), tl.sum(nans, axis=0)
    else:
        x = tl.load(x_row + columns, mask=columns < K, other=0.0).to(tl.float32)
        amax, nan_count = tl.max(tl.abs(x), axis=0), tl.sum((x != x).to(tl.int32), axis=0)
    bad = (nan_count > 0) | (amax == float("inf"))
    amax = tl.where(bad, 1.0, tl.maximum(amax, SMALLEST))
    tl.store(scale_ptr + row, tl.where(bad, float("nan"), amax * INVERSE))
    if IS_LONG:
        for start in range(0, K, BLOCK):
            inside = start + columns < K
            part = tl.load(x_row + start + columns, mask=inside, other=0.0).to(tl.float32)
            codes = round_to_codes(part, amax, bad, LARGEST, IS_INT8)
            tl.store(q_row + start + columns, codes.to(q_ptr.dtype.element_ty), mask=inside)
    else:
        codes = round_to_codes(x, amax, bad, LARGEST, IS_INT8)
        tl.store(q_row + columns, codes.to(q_ptr.dtype.element_ty), mask=columns < K)


def launch_quantize_rows(x: Tensor, codes: str) -> tuple[Tensor, Tensor]:
    """Run the kernel on ``x (M, K)`` and return codes and scales."""
    m, k = x.shape
    x = x if x.stride(-1) == 1 or k <= 1 else x.contiguous()
    x = x.float() if x.dtype == torch.float64 else x
    q = torch.empty((m, k), dtype=DTYPES[codes], device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m == 0:
        return q, scale
    is_long = k > _ONE_BLOCK
    block = _LONG_BLOCK if is_long else max(16, power_above(k))
    quantize_rows_kernel[(m,)](
        x, q, scale, k, x.stride(0),
        LARGEST=LARGEST[codes], INVERSE=1 / LARGEST[codes], SMALLEST=SMALLEST, IS_INT8=codes == "int8",
        BLOCK=block, IS_LONG=is_long,
        num_warps=4 if block <= 4096 else 8 if block <= 8192 else 16,
        enable_fp_fusion=False,  # a fused multiply and add would round ties by what was rounded away before
    )  # fmt: skip
    return q, scale
