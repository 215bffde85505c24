"""Triton kernels of token streams: elementwise steps of a block as one pass, with torch's roundings in between.

A block computes on one or two streams of tokens (text first, then images). One launch takes both: its programs walk the
rows of the first, then those of the second, and write into one buffer in that order. What torch would round to the
dtype of the tokens between two operations is rounded so here too; the kernels are launched without fused multiplies
and adds.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels.codes import DTYPES, LARGEST, SMALLEST
from diffaccel.kernels.dispatch import count_of, power_above
from diffaccel.kernels.triton_rows import round_to_codes

_TILE_ROWS, _TILE_COLUMNS = 4, 1024
_ALIGNMENT = 256  # bytes
Part = tuple[Tensor, Tensor, Tensor]


@triton.jit
def rounded(x, pointer):
    """Round to the dtype that ``pointer`` points to, and return fp32."""
    return x.to(pointer.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["T_A", "T_B"])
def affine_kernel(
    x_a, x_b, factor_a, factor_b, term_a, term_b, out_ptr, T_A, T_B, D,
    stride_x_a, stride_x_b, stride_factor_a, stride_factor_b, stride_term_a, stride_term_b,
    IS_GATE: tl.constexpr, ROUNDS: tl.constexpr, IS_TWO: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute ``x * (1 + factor) + term``, or ``x * factor + term`` with a term for each row, of one tile.

    Without ``ROUNDS`` the sum alone is rounded.
    """
    number, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    x_ptr, factor_ptr, term_ptr, length, first = x_b, factor_b, term_b, T_B, tl.num_programs(2).to(tl.int64) * T_A
    stride_x, stride_factor, stride_term = stride_x_b, stride_factor_b, stride_term_b
    tile = number
    if IS_TWO:
        tiles_a = tl.cdiv(T_A, ROWS)
        tile = number - tiles_a
        if number < tiles_a:
            x_ptr, factor_ptr, term_ptr, length, first = x_a, factor_a, term_a, T_A, first * 0
            stride_x, stride_factor, stride_term = stride_x_a, stride_factor_a, stride_term_a
            tile = number
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    places = rows[:, None].to(tl.int64) * D + columns[None, :]
    inside = (rows[:, None] < length) & (columns[None, :] < D)
    x = tl.load(x_ptr + batch * stride_x + places, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + batch * stride_factor + columns, mask=columns < D, other=0.0).to(tl.float32)
    if IS_GATE:
        term = tl.load(term_ptr + batch * stride_term + places, mask=inside, other=0.0).to(tl.float32)
    else:
        factor = rounded(1.0 + factor, out_ptr) if ROUNDS else 1.0 + factor
        term = tl.load(term_ptr + batch * stride_term + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    y = x * factor[None, :]
    if ROUNDS:
        y = rounded(y, out_ptr)
    y += term
    tl.store(out_ptr + (first + batch * length) * D + places, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T_A", "T_B", "ROWS_A"])
def norm_kernel(
    x_a, x_b, y_a, y_b, gate_a, gate_b, scale_a, scale_b, shift_a, shift_b, sum_ptr, out_ptr, row_scale_ptr,
    T_A, T_B, ROWS_A, D, stride_x_a, stride_x_b, stride_y_a, stride_y_b, stride_gate_a, stride_gate_b,
    stride_scale_a, stride_scale_b, stride_shift_a, stride_shift_b, epsilon,
    HAS_SUM: tl.constexpr, IS_TWO: tl.constexpr, ROUNDS: tl.constexpr, CODES: tl.constexpr, IS_INT8: tl.constexpr,
    LARGEST: tl.constexpr, INVERSE: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute row ``program_id(0)`` of ``norm(x) * (1 + scale) + shift``, as codes where ``CODES``.

    With ``HAS_SUM``, x is ``x + gate * y``, which is written to ``sum_ptr`` too. Without ``ROUNDS`` nothing between is
    rounded.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, length, local = x_b, y_b, gate_b, scale_b, shift_b, T_B, row
    stride_x, stride_y, stride_gate = stride_x_b, stride_y_b, stride_gate_b
    stride_scale, stride_shift = stride_scale_b, stride_shift_b
    if IS_TWO:
        local = row - ROWS_A
        if row < ROWS_A:
            x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, length, local = x_a, y_a, gate_a, scale_a, shift_a, T_A, row
            stride_x, stride_y, stride_gate = stride_x_a, stride_y_a, stride_gate_a
            stride_scale, stride_shift = stride_scale_a, stride_shift_a
    batch, token = local // length, local % length
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + batch * stride_x + token * D + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SUM:
        y = tl.load(y_ptr + batch * stride_y + token * D + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + batch * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
        x = rounded(x + rounded(gate * y, sum_ptr), sum_ptr)
        tl.store(sum_ptr + row * D + columns, x.to(sum_ptr.dtype.element_ty), mask=inside)
    centered = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
    y = centered * tl.rsqrt(tl.sum(centered * centered, axis=0) / D + epsilon)
    scale = tl.load(scale_ptr + batch * stride_scale + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * stride_shift + columns, mask=inside, other=0.0).to(tl.float32)
    if ROUNDS:
        y = rounded(rounded(rounded(y, x_ptr) * rounded(1.0 + scale, x_ptr), x_ptr) + shift, x_ptr)
    else:
        y = y * (1.0 + scale) + shift
    if CODES:
        y = tl.where(inside, y, 0.0)
        amax, nans = tl.max(tl.abs(y), axis=0), tl.sum((y != y).to(tl.int32), axis=0)
        bad = (nans > 0) | (amax == float("inf"))
        amax = tl.where(bad, 1.0, tl.maximum(amax, SMALLEST))
        tl.store(row_scale_ptr + row, tl.where(bad, float("nan"), amax * INVERSE))
        y = round_to_codes(y, amax, bad, LARGEST, IS_INT8)
    tl.store(out_ptr + row * D + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


def by_rows(x: Tensor) -> Tensor:
    """Return ``x (B, T, D)`` with rows that follow each other within a sample; copied where they do not."""
    return x if x.stride(2) == 1 and (x.stride(1) == x.shape[2] or x.shape[1] == 1) else x.contiguous()


def by_samples(x: Tensor) -> Tensor:
    """Return ``x (B, D)`` with a contiguous last dimension."""
    return x if x.stride(1) == 1 else x.contiguous()


def strides_of(*tensors: Tensor) -> list[int]:
    """Return how far the samples of each tensor lie apart; 0 for a single one, whose stride may be any number."""
    return [x.stride(0) if x.shape[0] > 1 else 0 for x in tensors]


def split_streams(rows: Tensor, streams: Sequence[Tensor]) -> list[Tensor]:
    """Return the rows of each stream ``(B, T, D)`` as ``(B, T, ...)``, views of one buffer in their order.

    Libraries choose a product by the alignment of its operands, as memory of its own has it: a view that has less is
    copied.
    """
    if len(streams) == 1:
        return [rows.view(*streams[0].shape[:2], *rows.shape[1:])]
    counts = [stream.shape[0] * stream.shape[1] for stream in streams]
    views = rows.split_with_sizes(counts)
    parts = [part if not part.storage_offset() * part.element_size() % _ALIGNMENT else part.clone() for part in views]
    return [part.view(*x.shape[:2], *rows.shape[1:]) for part, x in zip(parts, streams, strict=True)]


def launch_affine(parts: Sequence[Part], is_gate: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Run :func:`affine_kernel` on one or two streams ``(x, factor, term)``.

    Args:
        dtype: to which the sum is rounded, and nothing before; None for the dtype of all, to which all is rounded.
    """
    parts = [(by_rows(x), by_samples(f), by_rows(t) if is_gate else by_samples(t)) for x, f, t in parts]
    (x_a, f_a, t_a), (x_b, f_b, t_b) = parts[0], parts[-1]
    (batch, length, width), is_two = x_b.shape, len(parts) == 2
    before = x_a.shape[1] if is_two else 0
    out = torch.empty((batch * (before + length), width), dtype=dtype or x_b.dtype, device=x_b.device)
    if out.numel():
        block = min(_TILE_COLUMNS, power_above(width))
        tiles = count_of(before, _TILE_ROWS) + count_of(length, _TILE_ROWS)
        affine_kernel[(tiles, count_of(width, block), batch)](
            x_a, x_b, f_a, f_b, t_a, t_b, out, before, length, width,
            *strides_of(x_a, x_b, f_a, f_b, t_a, t_b),
            IS_GATE=is_gate, ROUNDS=dtype is None, IS_TWO=is_two, ROWS=_TILE_ROWS, BLOCK=block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return split_streams(out, [x for x, _, _ in parts])


def launch_norm(
    parts: Sequence[Part], gated: Sequence[tuple[Tensor, Tensor]] | None, epsilon: float, codes: str | None,
    rounds: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """Run :func:`norm_kernel` on one or two streams ``(x, scale, shift)``, with ``(y, gate)`` of each where given.

    Returns:
        Sums, outputs or codes, and fp32 scales of rows, for each stream; empty lists for what was not asked for.
    """
    parts = [(by_rows(x), by_samples(scale), by_samples(shift)) for x, scale, shift in parts]
    gated = gated and [(by_rows(y), by_samples(gate)) for y, gate in gated]
    (x_a, scale_a, shift_a), (x_b, scale_b, shift_b) = parts[0], parts[-1]
    (y_a, gate_a), (y_b, gate_b) = (gated[0], gated[-1]) if gated else ((x_a, scale_a), (x_b, scale_b))
    (batch, length, width), is_two, device = x_b.shape, len(parts) == 2, x_b.device
    before = x_a.shape[1] if is_two else 0
    rows = batch * (before + length)
    out = torch.empty((rows, width), dtype=DTYPES[codes] if codes else x_b.dtype, device=device)
    sums = torch.empty((rows, width), dtype=x_b.dtype, device=device) if gated else out
    scales = torch.empty((rows, 1), dtype=torch.float32, device=device) if codes else out
    if out.numel():
        block = power_above(width)
        largest = LARGEST[codes or "int8"]
        norm_kernel[(rows,)](
            x_a, x_b, y_a, y_b, gate_a, gate_b, scale_a, scale_b, shift_a, shift_b, sums, out, scales,
            before, length, batch * before, width,
            *strides_of(x_a, x_b, y_a, y_b, gate_a, gate_b, scale_a, scale_b, shift_a, shift_b), epsilon,
            HAS_SUM=bool(gated), IS_TWO=is_two, ROUNDS=rounds, CODES=codes is not None, IS_INT8=codes == "int8",
            LARGEST=largest, INVERSE=1 / largest, SMALLEST=SMALLEST, BLOCK=block,
            num_warps=4 if block <= 4096 else 8 if block <= 8192 else 16, enable_fp_fusion=False,
        )  # fmt: skip
    streams = [x for x, _, _ in parts]
    return (
        split_streams(sums, streams) if gated else [],
        split_streams(out, streams),
        split_streams(scales, streams) if codes else [],
    )
