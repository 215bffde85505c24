"""Inner products of the predictions of one step, all of them in one pass over memory.

Superposition of models (arXiv 2412.17762) needs, of every row, the Gram matrix of a few vectors that are as long as the
latents: differences of predictions to one of them, the noise and the state. A difference is formed before it is
multiplied, since the products of two predictions would lose it in rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: the reference computes
    triton = None

MAX_VECTORS = 16
BLOCK = 256


def gram_reference(vectors: Tensor, differences: int, weights: Tensor | None = None) -> Tensor:
    """Return the Gram matrices ``G[r, b, i, j] = sum_p m[r, p] u[i, b, p] u[j, b, p]`` in at least fp32.

    ``u[i] = vectors[i] - vectors[-1]`` for the first ``differences`` vectors, and ``vectors[i]`` for the others.

    Args:
        vectors: ``(n, B, d)``.
        differences: how many of the first vectors are taken relative to the last.
        weights: ``(R, d)``, one weight a place and region; None for one region of weight 1.

    Returns:
        ``(R, B, n, n)``, fp64 for fp64 vectors and fp32 else.
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    u = torch.cat([wide[:differences] - wide[-1], wide[differences:]]).transpose(0, 1)  # (B, n, d)
    if weights is None:
        return (u @ u.transpose(1, 2))[None]
    m = weights.to(wide)
    return torch.stack([(u * region) @ u.transpose(1, 2) for region in m])


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _gram_kernel(  # type: ignore[no-untyped-def]
        vectors, weights, out, rows, size, differences,
        COUNT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr, CHUNKS: tl.constexpr,
    ):  # fmt: skip
        """Add the products of one row's chunk, for one region, into a partial sum of its own."""
        row, region, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        index = tl.arange(0, PADDED)
        sums = tl.zeros((PADDED, PADDED), dtype=tl.float32)
        per_chunk = tl.cdiv(tl.cdiv(size, BLOCK), CHUNKS) * BLOCK
        for begin in range(chunk * per_chunk, (chunk + 1) * per_chunk, BLOCK):
            place = begin + tl.arange(0, BLOCK)
            inside = place < size
            base = tl.load(vectors + ((COUNT - 1) * rows + row).to(tl.int64) * size + place, mask=inside, other=0.0)
            offsets = (index[:, None].to(tl.int64) * rows + row) * size + place[None, :]
            u = tl.load(vectors + offsets, mask=(index[:, None] < COUNT) & inside[None, :], other=0.0).to(tl.float32)
            u = tl.where(index[:, None] < differences, u - base[None, :].to(tl.float32), u)
            scaled = u
            if WEIGHTED:
                m = tl.load(weights + region.to(tl.int64) * size + place, mask=inside, other=0.0).to(tl.float32)
                scaled = u * m[None, :]
            sums += tl.sum(scaled[:, None, :] * u[None, :, :], axis=2)
        target = ((region * rows + row).to(tl.int64) * CHUNKS + chunk) * PADDED * PADDED
        tl.store(out + target + index[:, None] * PADDED + index[None, :], sums)


def gram_triton(vectors: Tensor, differences: int, weights: Tensor | None = None) -> Tensor:
    """Return what :func:`gram_reference` does, by one Triton kernel with fp32 sums.

    The chunks of a row are summed in a fixed order, so that the result does not vary from call to call.
    """
    count, rows, size = vectors.shape
    regions = 1 if weights is None else len(weights)
    padded = 1 << max(count - 1, 1).bit_length()
    chunks = max(1, min(32, -(-size // (8 * BLOCK)), -(-512 // max(rows * regions, 1))))
    block = max(16, min(BLOCK, 16384 // (padded * padded)))
    out = torch.empty(regions, rows, chunks, padded, padded, dtype=torch.float32, device=vectors.device)
    vectors = vectors.contiguous()
    given = vectors if weights is None else weights.contiguous()
    _gram_kernel[(rows, regions, chunks)](
        vectors, given, out, rows, size, differences,
        COUNT=count, PADDED=padded, BLOCK=block, WEIGHTED=weights is not None, CHUNKS=chunks,
    )  # fmt: skip
    return out.sum(2)[:, :, :count, :count]


@torch.library.custom_op("diffaccel::gram", mutates_args=())
def _gram(vectors: Tensor, differences: int, weights: Tensor | None) -> Tensor:
    return gram_reference(vectors, differences, weights).contiguous()


@_gram.register_kernel("cuda")
def _(vectors: Tensor, differences: int, weights: Tensor | None) -> Tensor:
    fits = triton is not None and len(vectors) <= MAX_VECTORS and vectors.dtype != torch.float64
    return (gram_triton if fits else gram_reference)(vectors, differences, weights).contiguous()


@_gram.register_fake
def _(vectors: Tensor, differences: int, weights: Tensor | None) -> Tensor:
    regions = 1 if weights is None else weights.shape[0]
    count, rows = vectors.shape[:2]
    return vectors.new_empty(
        (regions, rows, count, count), dtype=torch.promote_types(vectors.dtype, torch.float32), device=vectors.device
    )


def gram(vectors: Tensor, differences: int, weights: Tensor | None = None) -> Tensor:
    """Return the Gram matrices ``(R, B, n, n)`` of ``(n, B, d)`` vectors; see :func:`gram_reference`.

    On CUDA one Triton kernel reads every vector once, for up to 16 vectors of at most fp32; the reference computes the
    rest, and everything elsewhere.
    """
    result: Any = _gram(vectors, differences, weights)
    return result
