"""Triton kernels of :mod:`diffaccel.kernels.int8_linear`: int8 tensor cores, and the scales in the epilogue.

On Hopper both operands come through tensor descriptors, K-major as the tensor cores need them, and one persistent
program a multiprocessor walks over the tiles. Other devices and unaligned shapes take pointers and masks.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diffaccel.kernels.dispatch import capability, count_of
from diffaccel.kernels.winners import winner

_GROUP_M = 8  # tiles of rows that are walked together, so that the operands stay in the second-level cache


@dataclass(frozen=True)
class Tile:
    """Shape of a tile and how a program computes it."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    specialized: bool = False  # ask for loads by warps of their own, which the compiler may decline


# Tiles of the descriptor kernel, with the share of the tensor cores' rate that they reach on large products, for the
# choice where no measured winner is known.
TILES: tuple[tuple[Tile, float], ...] = (
    (Tile(256, 128, 128, 8, 3), 1.0),
    (Tile(128, 256, 128, 8, 3, True), 1.0),
    (Tile(128, 128, 128, 8, 4), 0.85),
    (Tile(64, 256, 128, 4, 4), 0.9),
    (Tile(64, 128, 128, 4, 4), 0.65),
    (Tile(64, 64, 128, 4, 4), 0.4),
)
POINTER_TILE = Tile(128, 128, 64, 8, 3)
SMALL_POINTER_TILE = Tile(16, 64, 128, 4, 4)


@triton.jit
def tile_of(number, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the row and column of a tile by its number: down ``GROUP_M`` rows, then to the next column."""
    per_group = GROUP_M * tiles_n
    first = (number // per_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = number % per_group
    return first + within % rows, within // rows


@triton.jit
def _store_scaled(
    total, c_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, tile_m, tile_n, M, N,
    BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write ``total * (s_a s_w^T) + b`` of one tile, in the dtype of ``c_ptr``."""
    rows, columns = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    a_scale = tl.load(a_scale_ptr + rows, mask=rows < M, other=0.0)
    w_scale = tl.load(w_scale_ptr + columns, mask=columns < N, other=0.0)
    y = total.to(tl.float32) * (a_scale[:, None] * w_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    places = c_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(places, y.to(c_ptr.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def int8_linear_descriptors_kernel(
    a_desc, w_desc, c_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr,
    PROGRAMS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Compute every ``PROGRAMS``-th tile of ``(M, N)``, from descriptors of ``a (M, K)`` and ``w (N, K)``."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for number in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=False, warp_specialize=SPECIALIZED):
        tile_m, tile_n = tile_of(number, tiles_m, tiles_n, GROUP_M)
        total = tl.zeros((BM, BN), dtype=tl.int32)
        for step in range(tl.cdiv(K, BK)):
            a = a_desc.load([tile_m * BM, step * BK])
            w = w_desc.load([tile_n * BN, step * BK])
            total = tl.dot(a, w.T, total, out_dtype=tl.int32)
        _store_scaled(total, c_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, tile_m, tile_n, M, N, BM, BN, HAS_BIAS)


@triton.jit
def int8_linear_pointers_kernel(
    a_ptr, w_ptr, c_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, M, N, K, stride_a, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Compute tile ``program_id(0)`` of ``(M, N)``; any shape and alignment."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rows, columns, depth = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_rows, w_rows = a_ptr + rows[:, None].to(tl.int64) * stride_a, w_ptr + columns[:, None].to(tl.int64) * stride_w
    total = tl.zeros((BM, BN), dtype=tl.int32)
    for step in range(tl.cdiv(K, BK)):
        k = step * BK + depth[None, :]
        a = tl.load(a_rows + k, mask=(rows[:, None] < M) & (k < K), other=0)
        w = tl.load(w_rows + k, mask=(columns[:, None] < N) & (k < K), other=0)
        total = tl.dot(a, tl.trans(w), total, out_dtype=tl.int32)
    _store_scaled(total, c_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, tile_m, tile_n, M, N, BM, BN, HAS_BIAS)


@functools.cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; 4 for one that only stands in for a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.lru_cache(maxsize=4096)
def choose_tile(m: int, n: int, k: int, device: torch.device) -> Tile:
    """Return the measured winner of a shape, or the tile of the least estimated time."""
    if (measured := winner("int8_linear", capability(device), m, n, k)) is not None:
        return Tile(**measured)

    def time(entry: tuple[Tile, float]) -> float:
        tile, rate = entry
        waves = -(-count_of(m, tile.m) * count_of(n, tile.n) // processors(device))
        return waves * tile.m * tile.n / rate

    return min(TILES, key=time)[0]


def launch_int8_linear(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    tile: Tile | None = None,
    descriptors: bool | None = None,
) -> Tensor:
    """Run a kernel on codes ``a (M, K)`` and ``w (N, K)``; ``tile`` and ``descriptors`` are chosen unless given."""
    (m, k), n = a.shape, w.shape[0]
    a, w = a.contiguous(), w.contiguous()
    y = torch.empty((m, n), dtype=dtype, device=a.device)
    if m == 0 or n == 0:
        return y
    scales = (a_scale.contiguous(), w_scale.contiguous(), a_scale if bias is None else bias.contiguous())
    if descriptors is None:
        is_aligned = k % 16 == 0 and a.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0
        descriptors = is_aligned and capability(a.device) >= (9, 0)
    if descriptors:
        return _with_descriptors(a, w, y, scales, bias is not None, tile or choose_tile(m, n, k, a.device))
    tile = tile or (SMALL_POINTER_TILE if m <= 32 else POINTER_TILE)
    int8_linear_pointers_kernel[(count_of(m, tile.m) * count_of(n, tile.n),)](
        a, w, y, *scales, m, n, k, a.stride(0), w.stride(0),
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP_M=_GROUP_M, HAS_BIAS=bias is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _with_descriptors(
    a: Tensor, w: Tensor, y: Tensor, scales: tuple[Tensor, ...], has_bias: bool, tile: Tile
) -> Tensor:
    (m, k), n = a.shape, w.shape[0]
    tiles = count_of(m, tile.m) * count_of(n, tile.n)
    programs = min(processors(a.device), tiles)
    int8_linear_descriptors_kernel[(programs,)](
        TensorDescriptor(a, [m, k], [k, 1], [tile.m, tile.k]),
        TensorDescriptor(w, [n, k], [k, 1], [tile.n, tile.k]),
        y, *scales, m, n, k,
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP_M=_GROUP_M, HAS_BIAS=has_bias,
        PROGRAMS=processors(a.device), SPECIALIZED=tile.specialized, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
