"""Triton kernel of :mod:`diffaccel.kernels.activate_rows`: activation and quantization of a row, read once."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels.codes import DTYPES, LARGEST, SMALLEST
from diffaccel.kernels.dispatch import power_above
from diffaccel.kernels.triton_rows import round_to_codes
from diffaccel.kernels.triton_streams import rounded


@triton.jit
def gelu(x, IS_TANH: tl.constexpr):
    """Return GELU in fp32: ``x Phi(x)``, or its tanh formula, by the logistic function that equals it."""
    if IS_TANH:
        inner = 1.5957691216057308 * (x + 0.044715 * (x * x * x))
        return x * tl.div_rn(1.0, 1.0 + tl.exp(-inner))
    return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_codes_kernel(
    beside_ptr, x_ptr, q_ptr, scale_ptr, K0, K, stride_beside, stride_x,
    IS_TANH: tl.constexpr, HAS_BESIDE: tl.constexpr, LARGEST: tl.constexpr, INVERSE: tl.constexpr,
    SMALLEST: tl.constexpr, IS_INT8: tl.constexpr, BLOCK0: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize row ``program_id(0)`` of ``[beside, gelu(x)]`` by its largest magnitude."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    x = tl.load(x_ptr + row * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    y = rounded(gelu(x, IS_TANH), x_ptr)
    amax, nans = tl.max(tl.abs(y), axis=0), tl.sum((y != y).to(tl.int32), axis=0)
    q_row = q_ptr + row * (K0 + K)
    if HAS_BESIDE:
        first = tl.arange(0, BLOCK0)
        within = first < K0
        z = tl.load(beside_ptr + row * stride_beside + first, mask=within, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(z), axis=0))
        nans += tl.sum((z != z).to(tl.int32), axis=0)
    bad = (nans > 0) | (amax == float("inf"))
    amax = tl.where(bad, 1.0, tl.maximum(amax, SMALLEST))
    tl.store(scale_ptr + row, tl.where(bad, float("nan"), amax * INVERSE))
    if HAS_BESIDE:
        codes = round_to_codes(z, amax, bad, LARGEST, IS_INT8)
        tl.store(q_row + first, codes.to(q_ptr.dtype.element_ty), mask=within)
    codes = round_to_codes(y, amax, bad, LARGEST, IS_INT8)
    tl.store(q_row + K0 + columns, codes.to(q_ptr.dtype.element_ty), mask=inside)


def launch_gelu_codes(beside: Tensor | None, x: Tensor, codes: str, is_tanh: bool) -> tuple[Tensor, Tensor]:
    """Run the kernel on rows ``beside (M, K0)`` or None, and ``x (M, K)``; return codes and scales."""
    x = x if x.stride(1) == 1 else x.contiguous()
    beside = beside if beside is None or beside.stride(1) == 1 else beside.contiguous()
    m, k = x.shape
    k0 = 0 if beside is None else beside.shape[1]
    q = torch.empty((m, k0 + k), dtype=DTYPES[codes], device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m == 0:
        return q, scale
    first = x if beside is None else beside
    block = max(16, power_above(k))
    gelu_codes_kernel[(m,)](
        first, x, q, scale, k0, k, first.stride(0), x.stride(0),
        IS_TANH=is_tanh, HAS_BESIDE=beside is not None,
        LARGEST=LARGEST[codes], INVERSE=1 / LARGEST[codes], SMALLEST=SMALLEST, IS_INT8=codes == "int8",
        BLOCK0=max(16, power_above(max(k0, 1))), BLOCK=block,
        num_warps=4 if block <= 4096 else 8 if block <= 8192 else 16,
        enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale
