"""Attention of frames to frames, where a mask of frames tells who sees whom and their tokens follow it.

The few queries of a video's next frame meet the many keys of the frames before it (arXiv 2506.01380): too few blocks of
queries to fill a GPU. So keys are split over blocks as well, and the parts are joined by their sums of exponentials.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffaccel.kernels.dispatch import capability, on_device_of

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference computes
    triton = None


class Tiling(NamedTuple):
    """Sizes of the kernel's blocks; ``splits`` is the number of parts of the keys, 0 for one that fills the device."""

    queries: int = 128
    keys: int = 64
    warps: int = 8
    stages: int = 3
    splits: int = 0


HEAD_DIMS = (16, 32, 64, 128)
MOST_SPLITS = 16


def frame_attention_reference(query: Tensor, key: Tensor, value: Tensor, frames: Tensor, tokens: int) -> Tensor:
    """Return ``softmax(q k^T / sqrt(d) + mask) v`` by PyTorch's own attention.

    Args:
        query: ``(B, heads, Tq * tokens, d)``.
        key: ``(B, heads, Tk * tokens, d)``.
        value: of the shape of ``key``.
        frames: ``(Tq, Tk)``, true where the tokens of a frame see those of another; each sees one at least.
        tokens: number of tokens of a frame.
    """
    mask = frames[:, None, :, None].expand(-1, tokens, -1, tokens).reshape(query.shape[2], key.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _attention_kernel(  # type: ignore[no-untyped-def]
        query, key, value, frames, out, sums, scale, heads, key_frames, rows,
        q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
        TOKENS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
        PRECISION: tl.constexpr,
    ):  # fmt: skip
        """Attend from one block of one frame's tokens to one part of the keys; sums: maximum and sum of each row."""
        TILES: tl.constexpr = (TOKENS + QUERIES - 1) // QUERIES
        frame, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
        stack, split = tl.program_id(1), tl.program_id(2)
        batch, head = (stack // heads).to(tl.int64), (stack % heads).to(tl.int64)
        local = tile * QUERIES + tl.arange(0, QUERIES)
        row, channel = frame * TOKENS + local, tl.arange(0, DIM)
        inside = local < TOKENS
        source = query + batch * q_batch + head * q_head + row[:, None].to(tl.int64) * q_token + channel[None, :]
        q = tl.load(source, mask=inside[:, None], other=0.0)
        top = tl.full((QUERIES,), -1.0e30, dtype=tl.float32)
        total = tl.zeros((QUERIES,), dtype=tl.float32)
        result = tl.zeros((QUERIES, DIM), dtype=tl.float32)
        keys = key_frames * TOKENS
        length = tl.cdiv(tl.cdiv(keys, KEYS), SPLITS) * KEYS
        key += batch * k_batch + head * k_head
        value += batch * v_batch + head * v_head
        for begin in range(split * length, tl.minimum((split + 1) * length, keys), KEYS):
            place = begin + tl.arange(0, KEYS)
            there = place < keys
            sees = tl.load(frames + frame * key_frames + place // TOKENS, mask=there, other=0)
            k = tl.load(key + place[None, :].to(tl.int64) * k_token + channel[:, None], mask=there[None, :], other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
            scores += tl.where(sees != 0, 0.0, float("-inf"))[None, :]
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            v = tl.load(
                value + place[:, None].to(tl.int64) * v_token + channel[None, :], mask=there[:, None], other=0.0
            )
            result = result * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            top = higher
        target = (split * tl.num_programs(1) + stack).to(tl.int64) * rows + row
        if SPLITS == 1:
            result = result / total[:, None]
        else:
            tl.store(sums + target * 2, top, mask=inside)
            tl.store(sums + target * 2 + 1, total, mask=inside)
        tl.store(out + target[:, None] * DIM + channel[None, :], result.to(out.dtype.element_ty), mask=inside[:, None])

    @triton.jit  # type: ignore[untyped-decorator]
    def _join_kernel(  # type: ignore[no-untyped-def]
        parts, sums, out, count, DIM: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr
    ):  # fmt: skip
        """Join the parts of a block of rows: weighted by their sums, relative to the greatest maximum."""
        row, channel = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
        inside = row < count
        top = tl.full((ROWS,), -1.0e30, dtype=tl.float32)
        for split in range(SPLITS):
            place = (split * count + row).to(tl.int64)
            top = tl.maximum(top, tl.load(sums + place * 2, mask=inside, other=-1.0e30))
        total = tl.zeros((ROWS,), dtype=tl.float32)
        result = tl.zeros((ROWS, DIM), dtype=tl.float32)
        for split in range(SPLITS):
            place = (split * count + row).to(tl.int64)
            weight = tl.exp2(tl.load(sums + place * 2, mask=inside, other=-1.0e30) - top)
            total += weight * tl.load(sums + place * 2 + 1, mask=inside, other=1.0)
            part = tl.load(parts + place[:, None] * DIM + channel[None, :], mask=inside[:, None], other=0.0)
            result += weight[:, None] * part
        result = result / total[:, None]
        target = out + row[:, None].to(tl.int64) * DIM + channel[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=inside[:, None])


def splits_of(blocks: int, processors: int, key_blocks: int) -> int:
    """Return into how many parts keys are split so that two blocks lie on each multiprocessor."""
    return max(1, min(MOST_SPLITS, 2 * processors // max(blocks, 1), key_blocks))


def frame_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, frames: Tensor, tokens: int, tiling: Tiling | None = None
) -> Tensor:
    """Return what :func:`frame_attention_reference` does, by a kernel over parts of the keys, and one that joins them.

    Sums are in fp32, and the order of sums depends on shapes and the device only.
    """
    tiling = tiling or Tiling()
    batch, heads, rows, dim = query.shape
    blocks = len(frames) * -(-tokens // tiling.queries)
    splits = tiling.splits
    if not splits:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 1
        splits = splits_of(blocks * batch * heads, processors, -(-key.shape[2] // tiling.keys))
    stacks = batch * heads
    out = torch.empty(stacks, rows, dim, dtype=query.dtype, device=query.device)
    parts, sums = out, out
    if splits > 1:
        parts = torch.empty(splits, stacks, rows, dim, dtype=torch.float32, device=query.device)
        sums = torch.empty(splits, stacks, rows, 2, dtype=torch.float32, device=query.device)
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
    with on_device_of(query):
        _attention_kernel[(blocks, stacks, splits)](
            query, key, value, frames.to(torch.int8), parts, sums, math.log2(math.e) / math.sqrt(dim), heads,
            frames.shape[1], rows, *strides, TOKENS=tokens, DIM=dim, QUERIES=tiling.queries, KEYS=tiling.keys,
            SPLITS=splits, PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        if splits > 1:
            count = stacks * rows
            _join_kernel[(-(-count // 32),)](parts, sums, out, count, DIM=dim, ROWS=32, SPLITS=splits)
    return out.view(batch, heads, rows, dim)


@torch.library.custom_op("diffaccel::frame_attention", mutates_args=())
def _frame_attention(query: Tensor, key: Tensor, value: Tensor, frames: Tensor, tokens: int) -> Tensor:
    return frame_attention_reference(query, key, value, frames, tokens).contiguous()


@_frame_attention.register_kernel("cuda")
def _(query: Tensor, key: Tensor, value: Tensor, frames: Tensor, tokens: int) -> Tensor:
    fits = triton is not None and query.shape[-1] in HEAD_DIMS and query.dtype in (torch.bfloat16, torch.float16)
    fits = fits and capability(query.device) >= (8, 0)
    return (frame_attention_triton if fits else frame_attention_reference)(
        query, key, value, frames, tokens
    ).contiguous()


@_frame_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, frames: Tensor, tokens: int) -> Tensor:
    return query.new_empty(query.shape)


def frame_attention(query: Tensor, key: Tensor, value: Tensor, frames: Tensor, tokens: int) -> Tensor:
    """Return the attention of frames to frames, ``(B, heads, Tq * tokens, d)``; see :func:`frame_attention_reference`.

    On CUDA devices of compute capability 8.0 and more a Triton kernel computes it in bf16 and fp16, for heads of 16,
    32, 64 or 128 channels; PyTorch's attention computes the rest, and everything elsewhere.
    """
    result: Any = _frame_attention(query, key, value, frames, tokens)
    return result
