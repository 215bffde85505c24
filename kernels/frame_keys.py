"""Queries, keys and values of a video's new frames, to where attention reads them, in one pass.

A layer's product gives all three in one row a token. The RMS norm of queries and keys (arXiv 1910.07467), their
rotation (arXiv 2104.09864), the kept copy of keys before rotation and the places in the ring of frames are a dozen
small operations; here they are one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.dispatch import capability, on_device_of

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference computes
    triton = None

EPSILON = 1e-6
HEAD_DIMS = (16, 32, 64, 128)
ROWS = 16  # tokens of a block


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def frame_keys_reference(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, written: int,
    keys: Tensor, rotated: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Write keys and values into their places and return rotated queries ``(B, heads, T n, d)``.

    Args:
        qkv: ``(B, T, n, 3, heads, d)``, of each token its query, key and value.
        query_norm: ``(d,)``, weight of the RMS norm of queries.
        key_norm: ``(d,)``, that of keys.
        cos: ``(T, n, d / 2)``, of the rotation by each token's frame, row and column.
        sin: of the shape of ``cos``.
        slots: ``(T,)`` int64, the place of each frame.
        written: number of frames, the first ones, whose keys are kept before rotation, too.
        keys: ``(B, heads, P n, d)``, changed in place.
        rotated: ``(B, heads, S n, d)``, S at least P, changed in place.
        values: of the shape of ``rotated``, changed in place.
    """
    tokens, dim = qkv.shape[2], qkv.shape[-1]
    query, key, value = qkv.permute(3, 0, 4, 1, 2, 5)  # (B, heads, T, n, d)
    query = torch.nn.functional.rms_norm(query, (dim,), query_norm, EPSILON).to(value.dtype)
    key = torch.nn.functional.rms_norm(key, (dim,), key_norm, EPSILON).to(value.dtype)
    rotated.unflatten(2, (-1, tokens)).index_copy_(2, slots, _rotated(key, cos, sin).contiguous())
    values.unflatten(2, (-1, tokens)).index_copy_(2, slots, value.contiguous())
    if written:
        keys.unflatten(2, (-1, tokens)).index_copy_(2, slots[:written], key[:, :, :written].contiguous())
    return _rotated(query, cos, sin).flatten(2, 3)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _normed(first, second, weight, channel, HALF: tl.constexpr, EPSILON: tl.constexpr):  # type: ignore[no-untyped-def]
        """Return both halves of rows after their RMS norm, rounded as they are stored, in fp32."""
        dtype = first.dtype
        first, second = first.to(tl.float32), second.to(tl.float32)
        power = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        scale = tl.rsqrt(power / (2 * HALF) + EPSILON)[:, None]
        first = first * scale * tl.load(weight + channel)[None, :].to(tl.float32)
        second = second * scale * tl.load(weight + HALF + channel)[None, :].to(tl.float32)
        return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)

    @triton.jit  # type: ignore[untyped-decorator]
    def _frame_keys_kernel(  # type: ignore[no-untyped-def]
        qkv, query_norm, key_norm, cos, sin, slots, keys, rotated, values, out, rows, key_rows, value_rows,
        TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WRITTEN: tl.constexpr,
        EPSILON: tl.constexpr,
    ):  # fmt: skip
        """Norm, rotate and store one head of a block of tokens."""
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        channel = tl.arange(0, HALF)
        inside = row < rows
        mask = inside[:, None]
        frame = row // TOKENS
        source = qkv + ((batch * rows + row) * (3 * HEADS) + head)[:, None] * (2 * HALF) + channel[None, :]
        step = HEADS * 2 * HALF
        turn = row[:, None] * HALF + channel[None, :]
        c, s = tl.load(cos + turn, mask=mask, other=1.0), tl.load(sin + turn, mask=mask, other=0.0)
        stack = batch * HEADS + head
        first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
        a, b = _normed(first, second, query_norm, channel, HALF, EPSILON)
        target = out + (stack * rows + row)[:, None] * (2 * HALF) + channel[None, :]
        tl.store(target, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
        tl.store(target + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=mask)
        place = tl.load(slots + frame, mask=inside, other=0) * TOKENS + row % TOKENS
        source += step
        first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
        a, b = _normed(first, second, key_norm, channel, HALF, EPSILON)
        if WRITTEN > 0:
            kept = (inside & (frame < WRITTEN))[:, None]
            target = keys + (stack * key_rows + place)[:, None] * (2 * HALF) + channel[None, :]
            tl.store(target, a.to(keys.dtype.element_ty), mask=kept)
            tl.store(target + HALF, b.to(keys.dtype.element_ty), mask=kept)
        offset = (stack * value_rows + place)[:, None] * (2 * HALF) + channel[None, :]
        tl.store(rotated + offset, (a * c - b * s).to(rotated.dtype.element_ty), mask=mask)
        tl.store(rotated + offset + HALF, (b * c + a * s).to(rotated.dtype.element_ty), mask=mask)
        source += step
        first, second = tl.load(source, mask=mask, other=0.0), tl.load(source + HALF, mask=mask, other=0.0)
        tl.store(values + offset, first, mask=mask)
        tl.store(values + offset + HALF, second, mask=mask)


def frame_keys_triton(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, written: int,
    keys: Tensor, rotated: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Do what :func:`frame_keys_reference` does, by one kernel; arithmetic is in fp32, and rounded at the same places.

    The three rings must lie in memory without gaps.
    """
    batch, frames, tokens, _, heads, dim = qkv.shape
    rows = frames * tokens
    out = torch.empty(batch, heads, rows, dim, dtype=qkv.dtype, device=qkv.device)
    with on_device_of(qkv):
        _frame_keys_kernel[(-(-rows // ROWS), heads, batch)](
            qkv.contiguous(), query_norm, key_norm, cos.contiguous(), sin.contiguous(), slots, keys, rotated, values,
            out, rows, keys.shape[2], values.shape[2], TOKENS=tokens, HEADS=heads, HALF=dim // 2, ROWS=ROWS,
            WRITTEN=written, EPSILON=EPSILON,
        )  # fmt: skip
    return out


@torch.library.custom_op("diffaccel::frame_keys", mutates_args=("keys", "rotated", "values"))
def _frame_keys(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, written: int,
    keys: Tensor, rotated: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    return frame_keys_reference(qkv, query_norm, key_norm, cos, sin, slots, written, keys, rotated, values).contiguous()


@_frame_keys.register_kernel("cuda")
def _(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, written: int,
    keys: Tensor, rotated: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    fits = triton is not None and qkv.shape[-1] in HEAD_DIMS and qkv.dtype != torch.float64
    fits = fits and capability(qkv.device) >= (8, 0) and keys.is_contiguous() and rotated.is_contiguous()
    compute = frame_keys_triton if fits and values.is_contiguous() else frame_keys_reference
    return compute(qkv, query_norm, key_norm, cos, sin, slots, written, keys, rotated, values).contiguous()


@_frame_keys.register_fake
def _(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, written: int,
    keys: Tensor, rotated: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    batch, frames, tokens, _, heads, dim = qkv.shape
    return qkv.new_empty((batch, heads, frames * tokens, dim))


def frame_keys(
    qkv: Tensor, query_norm: Tensor, key_norm: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, written: int,
    keys: Tensor, rotated: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Write keys and values into their places and return rotated queries; see :func:`frame_keys_reference`.

    On CUDA devices of compute capability 8.0 and more one Triton kernel does it, for heads of 16, 32, 64 or 128
    channels and at most fp32; the reference does the rest, and everything elsewhere.
    """
    result: Any = _frame_keys(qkv, query_norm, key_norm, cos, sin, slots, written, keys, rotated, values)
    return result
