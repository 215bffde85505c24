"""Triton kernel of :mod:`diffaccel.kernels.rope`: norm of heads, rotation, and joining of streams, in one pass."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels.dispatch import count_of, power_above
from diffaccel.kernels.triton_streams import rounded, strides_of

_VECTOR = 4  # numbers that one thread of torch's norm reads at once; it sums their squares in order
_MOST_LANES = 32
_NUMBERS = 1024  # of one row that a program takes


@triton.jit
def quarters(x, LANES: tl.constexpr, HEADS: tl.constexpr):
    """Return the four numbers of each vector of ``x (HEADS, 4 LANES)``, each ``(HEADS, LANES)``."""
    even, odd = tl.split(tl.reshape(x, (HEADS, LANES, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def sum_of_lanes(x, LANES: tl.constexpr, HEADS: tl.constexpr):
    """Return the sums of the rows of ``x (HEADS, LANES)``, in the order of a warp that halves itself."""
    left: tl.constexpr = LANES
    if left == 32:
        low, high = tl.split(tl.trans(tl.reshape(x, (HEADS, 2, 16)), (0, 2, 1)))
        x = low + high
    if left >= 16:
        low, high = tl.split(tl.trans(tl.reshape(x, (HEADS, 2, 8)), (0, 2, 1)))
        x = low + high
    if left >= 8:
        low, high = tl.split(tl.trans(tl.reshape(x, (HEADS, 2, 4)), (0, 2, 1)))
        x = low + high
    if left >= 4:
        low, high = tl.split(tl.trans(tl.reshape(x, (HEADS, 2, 2)), (0, 2, 1)))
        x = low + high
    if left >= 2:
        low, high = tl.split(tl.reshape(x, (HEADS, 2)))
        x = low + high
    else:
        x = tl.reshape(x, (HEADS,))
    return x


@triton.jit
def rotated_heads(
    x_ptr, weight_ptr, out_ptr, columns, inside, c0, c1, c2, c3, s0, s1, s2, s3, epsilon,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Norm and rotate the heads ``(HEADS, 4 LANES)`` at ``x_ptr + columns``, and write them at ``out_ptr``."""
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x0, x1, x2, x3 = quarters(x, LANES, HEADS)
    if HAS_NORM:
        squares = tl.fma(x3, x3, tl.fma(x2, x2, tl.fma(x1, x1, x0 * x0)))
        rate = tl.rsqrt(sum_of_lanes(squares, LANES, HEADS) * (0.25 / LANES) + epsilon)[:, None]
        within = tl.arange(0, 4 * LANES)[None, :] + tl.zeros((HEADS, 1), tl.int32)
        w0, w1, w2, w3 = quarters(tl.load(weight_ptr + within).to(tl.float32), LANES, HEADS)
        x0, x1 = rounded(w0 * (rate * x0), x_ptr), rounded(w1 * (rate * x1), x_ptr)
        x2, x3 = rounded(w2 * (rate * x2), x_ptr), rounded(w3 * (rate * x3), x_ptr)
    if HAS_ROPE:
        x0, x1 = x0 * c0 + (-x1) * s0, x1 * c1 + x0 * s1
        x2, x3 = x2 * c2 + (-x3) * s2, x3 * c3 + x2 * s3
    y = tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), (HEADS, 4 * LANES))
    tl.store(out_ptr + columns, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T_A"])
def rope_kernel(
    q_a, q_b, k_a, k_b, v_a, v_b, norm_q_a, norm_q_b, norm_k_a, norm_k_b, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr,
    T_A, WIDTH, stride_batch_a, stride_batch_b, stride_row_a, stride_row_b, epsilon,
    HAS_NORM: tl.constexpr, HAS_ROPE: tl.constexpr, IS_TWO: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Compute ``HEADS`` heads of q and k of one token, and copy those of v where there are two streams."""
    token, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    q_in, k_in, v_in, norm_q, norm_k, local = q_b, k_b, v_b, norm_q_b, norm_k_b, token
    stride_batch, stride_row = stride_batch_b, stride_row_b
    if IS_TWO:
        local = token - T_A
        if token < T_A:
            q_in, k_in, v_in, norm_q, norm_k, local = q_a, k_a, v_a, norm_q_a, norm_k_a, token
            stride_batch, stride_row = stride_batch_a, stride_row_a
    start = tl.program_id(1) * (HEADS * 4 * LANES)
    within = tl.arange(0, HEADS * 4 * LANES)
    columns = tl.reshape(start + within, (HEADS, 4 * LANES))
    inside = columns < WIDTH
    source = batch * stride_batch + local.to(tl.int64) * stride_row
    target = (batch * tl.num_programs(0) + token) * WIDTH
    c0 = tl.zeros((HEADS, LANES), tl.float32)
    c1, c2, c3, s0, s1, s2, s3 = c0, c0, c0, c0, c0, c0, c0
    if HAS_ROPE:
        places = token.to(tl.int64) * (4 * LANES) + tl.arange(0, 4 * LANES)[None, :] + tl.zeros((HEADS, 1), tl.int32)
        c0, c1, c2, c3 = quarters(tl.load(cos_ptr + places), LANES, HEADS)
        s0, s1, s2, s3 = quarters(tl.load(sin_ptr + places), LANES, HEADS)
    rotated_heads(
        q_in + source, norm_q, q_ptr + target, columns, inside, c0, c1, c2, c3, s0, s1, s2, s3, epsilon,
        HAS_NORM, HAS_ROPE, LANES, HEADS,
    )  # fmt: skip
    rotated_heads(
        k_in + source, norm_k, k_ptr + target, columns, inside, c0, c1, c2, c3, s0, s1, s2, s3, epsilon,
        HAS_NORM, HAS_ROPE, LANES, HEADS,
    )  # fmt: skip
    if IS_TWO:
        tl.store(v_ptr + target + columns, tl.load(v_in + source + columns, mask=inside, other=0.0), mask=inside)


def is_rotatable(head: int) -> bool:
    """Return whether the kernel knows heads of this size: a power of two, from 8 to 128."""
    return head % _VECTOR == 0 and 8 <= head <= _VECTOR * _MOST_LANES and head & (head - 1) == 0


def launch_rope(
    streams: Sequence[tuple[Tensor, Tensor, Tensor]],
    norms: Sequence[tuple[Tensor, Tensor]] | None,
    rotary: tuple[Tensor, Tensor] | None,
    head: int,
    epsilon: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run :func:`rope_kernel` on one or two streams of q, k and v, see :func:`diffaccel.kernels.rope.joint_heads`."""
    (q_a, k_a, v_a), (q_b, k_b, v_b) = streams[0], streams[-1]
    batch, length, width = q_b.shape
    is_two = len(streams) == 2
    before = q_a.shape[1] if is_two else 0
    shape = (batch, before + length, width // head, head)
    q, k = (torch.empty(shape, dtype=q_b.dtype, device=q_b.device) for _ in range(2))
    v = torch.empty_like(q) if is_two else v_b.unflatten(2, (-1, head))
    (norm_q_a, norm_k_a), (norm_q_b, norm_k_b) = (norms[0], norms[-1]) if norms else ((q_b, k_b), (q_b, k_b))
    cos, sin = rotary or (q_b, k_b)
    heads = max(1, min(_NUMBERS // head, power_above(width // head)))
    if q.numel():
        rope_kernel[(before + length, count_of(width, heads * head), batch)](
            q_a, q_b, k_a, k_b, v_a, v_b, norm_q_a, norm_q_b, norm_k_a, norm_k_b, cos, sin, q, k, v,
            before, width, *strides_of(q_a, q_b), q_a.stride(1), q_b.stride(1), epsilon,
            HAS_NORM=norms is not None, HAS_ROPE=rotary is not None, IS_TWO=is_two,
            LANES=head // _VECTOR, HEADS=heads, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return q, k, v
