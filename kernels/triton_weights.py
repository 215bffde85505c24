"""Triton kernels of weights of 8 and 4 bits: their expansion, and a product with few rows that reads each code once."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels.dispatch import count_of

_ROWS = 16  # the least that a tensor core product takes
_BYTES = 128  # of packed codes that one program expands in a row of the weight


@triton.jit
def _signed(nibbles):
    """Extend the sign of 4-bit codes in two's complement."""
    return (nibbles ^ 8).to(tl.int8) - 8


@triton.jit
def int4_kernel(packed_ptr, group_ptr, out_ptr, N, HALF, GROUPS, BN: tl.constexpr, BYTES: tl.constexpr):
    """Expand ``packed (N, HALF)`` times its group's number ``(N, GROUPS)`` to ``out (N, 2 HALF)``."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    columns = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    inside = (rows[:, None] < N) & (columns[None, :] < HALF)
    base = rows[:, None].to(tl.int64)
    packed = tl.load(packed_ptr + base * HALF + columns[None, :], mask=inside, other=0)
    group = tl.load(group_ptr + base * GROUPS + columns[None, :] // (HALF // GROUPS), mask=inside, other=0)
    low, high = _signed(packed & 15).to(tl.float32), _signed(packed >> 4).to(tl.float32)
    scale = group.to(tl.float32)
    both = tl.interleave(low * scale, high * scale)
    places = tl.program_id(1) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    keep = (rows[:, None] < N) & (places[None, :] < 2 * HALF)
    tl.store(out_ptr + base * (2 * HALF) + places[None, :], both.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def int8_kernel(w_ptr, scale_ptr, out_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr):
    """Multiply the codes ``w (N, K)`` by the scales of their rows ``(N, 1)``."""
    rows, columns = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    places = rows[:, None].to(tl.int64) * K + columns[None, :]
    w = tl.load(w_ptr + places, mask=inside, other=0).to(tl.float32)
    y = w * tl.load(scale_ptr + rows, mask=rows < N, other=0.0)[:, None]
    tl.store(out_ptr + places, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def int8_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, M, N, K, stride_x,
    BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Compute ``BN`` columns of ``x (w s)^T + b`` for up to ``ROWS`` rows."""
    rows, columns, depth = tl.arange(0, ROWS), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((ROWS, BN), dtype=tl.float32)
    for step in range(tl.cdiv(K, BK)):
        k = step * BK + depth[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + k, mask=(rows[:, None] < M) & (k < K), other=0.0)
        places = w_ptr + columns[:, None].to(tl.int64) * K + k
        w = tl.load(places, mask=(columns[:, None] < N) & (k < K), other=0)
        total = tl.dot(x, tl.trans(w.to(x.dtype)), total)
    y = total * tl.load(scale_ptr + columns, mask=columns < N, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    keep = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=keep)


@triton.jit
def int4_gemv_kernel(
    x_ptr, w_ptr, scale_ptr, bias_ptr, y_ptr, M, N, HALF, GROUPS, stride_x,
    BN: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Compute ``BN`` columns of ``x (q s)^T + b``; each step of ``BYTES`` lies within one group."""
    rows, columns, depth = tl.arange(0, ROWS), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BYTES)
    total = tl.zeros((ROWS, BN), dtype=tl.float32)
    base = columns[:, None].to(tl.int64)
    for step in range(HALF // BYTES):
        byte = step * BYTES + depth[None, :]
        packed = tl.load(w_ptr + base * HALF + byte, mask=columns[:, None] < N, other=0)
        x_row = x_ptr + rows[:, None] * stride_x + 2 * byte
        even = tl.load(x_row, mask=rows[:, None] < M, other=0.0)
        odd = tl.load(x_row + 1, mask=rows[:, None] < M, other=0.0)
        part = tl.dot(even, tl.trans(_signed(packed & 15).to(even.dtype)))
        part = tl.dot(odd, tl.trans(_signed(packed >> 4).to(even.dtype)), part)
        group = (step * BYTES) // (HALF // GROUPS)
        total += part * tl.load(scale_ptr + columns * GROUPS + group, mask=columns < N, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    keep = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], total.to(y_ptr.dtype.element_ty), mask=keep)


def launch_int4(packed: Tensor, groups: Tensor, dtype: torch.dtype) -> Tensor:
    """Expand packed codes ``(N, K / 2)`` times their groups' numbers ``(N, G)`` to ``(N, K)`` in ``dtype``."""
    n, half = packed.shape
    out = torch.empty((n, 2 * half), dtype=dtype, device=packed.device)
    if n:
        int4_kernel[(count_of(n, 32), count_of(half, _BYTES))](
            packed.contiguous(), groups.contiguous(), out, n, half, groups.shape[1], BN=32, BYTES=_BYTES, num_warps=4
        )
    return out


def launch_int8(w: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply int8 codes ``(N, K)`` by the scales of their rows ``(N, 1)``, in ``dtype``."""
    n, k = w.shape
    out = torch.empty((n, k), dtype=dtype, device=w.device)
    if n and k:
        int8_kernel[(count_of(n, 16), count_of(k, 256))](
            w.contiguous(), w_scale.contiguous(), out, n, k, BN=16, BK=256, num_warps=4
        )
    return out


def launch_gemv(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``x (q s)^T + b`` for up to 16 rows of 16-bit activations.

    Groups of 4-bit codes hold a multiple of 32 of them.
    """
    m, n = x.shape[0], w.shape[0]
    x, w, w_scale = x.contiguous(), w.contiguous(), w_scale.contiguous()
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    shift = w_scale if bias is None else bias.contiguous()
    if w.dtype == torch.uint8:
        half, groups = w.shape[1], w_scale.shape[1]
        size = next(size for size in (64, 32, 16) if (half // groups) % size == 0)
        int4_gemv_kernel[(count_of(n, 64),)](
            x, w, w_scale, shift, y, m, n, half, groups, x.stride(0),
            BN=64, BYTES=size, ROWS=_ROWS, HAS_BIAS=bias is not None, num_warps=4, num_stages=4,
        )  # fmt: skip
        return y
    int8_gemv_kernel[(count_of(n, 64),)](
        x, w, w_scale, shift, y, m, n, w.shape[1], x.stride(0),
        BN=64, BK=128, ROWS=_ROWS, HAS_BIAS=bias is not None, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y
