"""Triton kernels of codes of 2 to 8 bits: their expansion, the quantization of tokens, and the exact product.

See :mod:`diffaccel.kernels.low_bit_linear` for the product. On Hopper both operands come through tensor descriptors;
other devices and unaligned shapes take pointers and masks. float8 sums leave the tensor cores every 128 products.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels.codes import DTYPES, LEAST_SCALE
from diffaccel.kernels.dispatch import capability
from diffaccel.kernels.triton_int8 import POINTER_TILE, SMALL_POINTER_TILE, Tile
from diffaccel.kernels.winners import winner

_ONE_BLOCK = 16384  # elements of a row that one program holds in registers; longer rows are read twice
_LONG_BLOCK = 8192
_GROUP_M = 8
# float8 keeps two accumulators, and the zeros take registers at the end: tiles are half of those of plain int8, whose
# rates these are
LOW_BIT_TILES: tuple[tuple[Tile, float], ...] = (
    (Tile(128, 128, 128, 8, 4), 1.0),
    (Tile(64, 256, 128, 8, 4), 0.9),
    (Tile(64, 128, 128, 4, 4), 0.7),
    (Tile(64, 64, 128, 4, 4), 0.4),
)
FLOAT8_POINTER_TILE = Tile(128, 128, 128, 8, 3)
_POINTER_TILES = {  # for few rows and for many; 64 rows are the least whose float8 sums leave the tensor cores
    "int8": (SMALL_POINTER_TILE, POINTER_TILE),
    "fp8": (Tile(64, 64, 128, 4, 4), FLOAT8_POINTER_TILE),
}


@triton.jit
def expand_codes_kernel(
    packed_ptr, out_ptr, N, K, WIDTH, CENTER: tl.constexpr, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Unpack ``packed (N, WIDTH)`` to ``q - CENTER``, ``out (N, K)``."""
    rows, columns = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK + tl.arange(0, BK)
    inside = (rows[:, None] < N) & (columns[None, :] < K)
    place = columns * BITS
    source = packed_ptr + rows[:, None].to(tl.int64) * WIDTH + (place // 8)[None, :]
    word = tl.load(source, mask=inside, other=0).to(tl.int32)
    if 8 % BITS != 0:  # a code may reach into the next byte
        reaches = (place % 8 + BITS > 8)[None, :]
        word |= tl.load(source + 1, mask=inside & reaches, other=0).to(tl.int32) << 8
    codes = ((word >> (place % 8)[None, :]) & ((1 << BITS) - 1)) - CENTER
    target = out_ptr + rows[:, None].to(tl.int64) * K + columns[None, :]
    tl.store(target, codes.to(tl.float32).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _whole(x):
    """Round to the nearest integer, ties to even, by adding and subtracting 1.5 * 2^23."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _range(x, inside, lo, hi, bad):
    """Widen a range by the numbers of a block, and count what is no number."""
    lo = tl.minimum(lo, tl.min(tl.where(inside, x, float("inf")), axis=0))
    hi = tl.maximum(hi, tl.max(tl.where(inside, x, -float("inf")), axis=0))
    odd = inside & ((x != x) | (tl.abs(x) == float("inf")))
    return lo, hi, bad + tl.sum(odd.to(tl.int32), axis=0)


@triton.jit
def _centred(x, inverse, zero, bad, LARGEST: tl.constexpr, HALF: tl.constexpr):
    """Return centred codes of numbers; codes of very large quotients are cut before they are rounded."""
    quotient = tl.minimum(tl.maximum(x * inverse, -2.0 * LARGEST), 2.0 * LARGEST)
    codes = tl.minimum(tl.maximum(_whole(quotient) + zero, 0.0), LARGEST) - HALF
    return tl.where(bad, 0.0, codes)


@triton.jit
def quantize_tokens_kernel(
    x_ptr, clip_ptr, q_ptr, stats_ptr, K, stride_x, ROWS,
    LARGEST: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr, LEAST: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr, IS_LONG: tl.constexpr,
):  # fmt: skip
    """Quantize row ``program_id(0)``, one of ``ROWS`` of a sample: its codes, and its three numbers."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x_row, q_row = x_ptr + row * stride_x, q_ptr + row * K
    lo, hi, odd = float("inf"), -float("inf"), 0
    if IS_LONG:
        for start in range(0, K, BLOCK):
            inside = start + columns < K
            part = tl.load(x_row + start + columns, mask=inside, other=0.0).to(tl.float32)
            lo, hi, odd = _range(part, inside, lo, hi, odd)
    else:
        inside = columns < K
        x = tl.load(x_row + columns, mask=inside, other=0.0).to(tl.float32)
        lo, hi, odd = _range(x, inside, lo, hi, odd)
    bad = odd > 0
    sample = row // ROWS
    lo = tl.minimum(tl.where(bad, 0.0, lo) * tl.load(clip_ptr + 2 * sample), 0.0)
    hi = tl.maximum(tl.where(bad, 0.0, hi) * tl.load(clip_ptr + 2 * sample + 1), 0.0)
    if SYMMETRIC:
        scale = tl.maximum(tl.maximum(-lo, hi) * INVERSE, LEAST)
        zero = scale * 0.0 + HALF
        inverse = tl.div_rn(1.0, scale)
    else:
        scale = tl.maximum((hi - lo) * INVERSE, LEAST)
        inverse = tl.div_rn(1.0, scale)
        zero = tl.minimum(tl.maximum(-_whole(lo * inverse), 0.0), LARGEST)
    if IS_LONG:
        total = 0.0
        for start in range(0, K, BLOCK):
            inside = start + columns < K
            part = tl.load(x_row + start + columns, mask=inside, other=0.0).to(tl.float32)
            codes = _centred(part, inverse, zero, bad, LARGEST, HALF)
            tl.store(q_row + start + columns, codes.to(q_ptr.dtype.element_ty), mask=inside)
            total += tl.sum(tl.where(inside, codes, 0.0), axis=0)
    else:
        codes = _centred(x, inverse, zero, bad, LARGEST, HALF)
        tl.store(q_row + columns, codes.to(q_ptr.dtype.element_ty), mask=inside)
        total = tl.sum(tl.where(inside, codes, 0.0), axis=0)
    tl.store(stats_ptr + 3 * row, tl.where(bad, float("nan"), scale))
    tl.store(stats_ptr + 3 * row + 1, zero - HALF)
    tl.store(stats_ptr + 3 * row + 2, total)


@triton.jit
def _tile_place(number, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Return the row and column of a tile by its number: down ``GROUP_M`` rows, then to the next column."""
    per_group = GROUP_M * tiles_n
    first = (number // per_group) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    within = number % per_group
    return first + within % rows, within // rows


@triton.jit
def _store_finished(
    total, c_ptr, a_stats_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr, bias_ptr, tile_m, tile_n, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write ``s_a s_w [total - z_a sum w + z_w (K z_a - sum a)] + b`` of one tile."""
    rows, columns = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    here, there = rows < M, columns < N
    a_scale = tl.load(a_stats_ptr + 3 * rows, mask=here, other=0.0)[:, None]
    a_zero = tl.load(a_stats_ptr + 3 * rows + 1, mask=here, other=0.0)
    a_sum = tl.load(a_stats_ptr + 3 * rows + 2, mask=here, other=0.0)
    w_scale = tl.load(w_scale_ptr + columns, mask=there, other=0.0)[None, :]
    w_zero = tl.load(w_zero_ptr + columns, mask=there, other=0.0)[None, :]
    w_sum = tl.load(w_sum_ptr + columns, mask=there, other=0.0)[None, :]
    rest = (K * a_zero - a_sum)[:, None]
    y = (total.to(tl.float32) - a_zero[:, None] * w_sum + w_zero * rest) * (a_scale * w_scale)
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    places = c_ptr + rows[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(places, y.to(c_ptr.dtype.element_ty), mask=here[:, None] & there[None, :])


@triton.jit
def low_bit_descriptors_kernel(
    a_desc, w_desc, c_ptr, a_stats_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr, bias_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr,
    PROGRAMS: tl.constexpr, IS_INT8: tl.constexpr,
):  # fmt: skip
    """Compute every ``PROGRAMS``-th tile of ``(M, N)``, from descriptors of ``a (M, K)`` and ``w (N, K)``."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for number in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=False):
        tile_m, tile_n = _tile_place(number, tiles_m, tiles_n, GROUP_M)
        total = tl.zeros((BM, BN), dtype=tl.int32 if IS_INT8 else tl.float32)
        for step in range(tl.cdiv(K, BK)):
            a = a_desc.load([tile_m * BM, step * BK])
            w = w_desc.load([tile_n * BN, step * BK])
            if IS_INT8:
                total = tl.dot(a, w.T, total, out_dtype=tl.int32)
            else:
                total = tl.dot(a, w.T, total, max_num_imprecise_acc=128)
        _store_finished(
            total, c_ptr, a_stats_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr, bias_ptr, tile_m, tile_n, M, N, K, BM, BN,
            HAS_BIAS,
        )  # fmt: skip


@triton.jit
def low_bit_pointers_kernel(
    a_ptr, w_ptr, c_ptr, a_stats_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr, bias_ptr, M, N, K, stride_a, stride_w,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_INT8: tl.constexpr,
):  # fmt: skip
    """Compute tile ``program_id(0)`` of ``(M, N)``; any shape and alignment."""
    tile_m, tile_n = _tile_place(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP_M)
    rows, columns, depth = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    a_rows, w_rows = a_ptr + rows[:, None].to(tl.int64) * stride_a, w_ptr + columns[:, None].to(tl.int64) * stride_w
    total = tl.zeros((BM, BN), dtype=tl.int32 if IS_INT8 else tl.float32)
    for step in range(tl.cdiv(K, BK)):
        k = step * BK + depth[None, :]
        a = tl.load(a_rows + k, mask=(rows[:, None] < M) & (k < K), other=0.0)
        w = tl.load(w_rows + k, mask=(columns[:, None] < N) & (k < K), other=0.0)
        if IS_INT8:
            total = tl.dot(a, tl.trans(w), total, out_dtype=tl.int32)
        else:
            total = tl.dot(a, tl.trans(w), total, max_num_imprecise_acc=BK)
    _store_finished(
        total, c_ptr, a_stats_ptr, w_scale_ptr, w_zero_ptr, w_sum_ptr, bias_ptr, tile_m, tile_n, M, N, K, BM, BN,
        HAS_BIAS,
    )  # fmt: skip


def launch_expand_codes(packed: Tensor, bits: int, center: int, k: int, codes: str) -> Tensor:
    """Unpack codes ``(N, K bits / 8)`` to centred ones ``(N, K)``."""
    n, width = packed.shape
    out = torch.empty((n, k), dtype=DTYPES[codes], device=packed.device)
    if n and k:
        expand_codes_kernel[(triton.cdiv(n, 16), triton.cdiv(k, 256))](
            packed.contiguous(), out, n, k, width, CENTER=center, BITS=bits, BN=16, BK=256, num_warps=4
        )
    return out


def launch_quantize_tokens(x: Tensor, clip: Tensor, bits: int, symmetric: bool, codes: str) -> tuple[Tensor, Tensor]:
    """Run the kernel on ``x (M, K)`` and return centred codes and stats."""
    m, k = x.shape
    x = x if x.stride(-1) == 1 or k <= 1 else x.contiguous()
    x = x.float() if x.dtype == torch.float64 else x
    q = torch.empty((m, k), dtype=DTYPES[codes], device=x.device)
    stats = torch.empty((m, 3), dtype=torch.float32, device=x.device)
    if m == 0:
        return q, stats
    is_long = k > _ONE_BLOCK
    block = _LONG_BLOCK if is_long else max(16, triton.next_power_of_2(k))
    largest, half = 2**bits - 1, 2 ** (bits - 1)
    quantize_tokens_kernel[(m,)](
        x, clip.contiguous(), q, stats, k, x.stride(0), m // len(clip),
        LARGEST=float(largest), HALF=float(half), INVERSE=1 / ((half - 1 or 1) if symmetric else largest),
        LEAST=LEAST_SCALE, SYMMETRIC=symmetric, BLOCK=block, IS_LONG=is_long,
        num_warps=4 if block <= 4096 else 8 if block <= 8192 else 16,
        enable_fp_fusion=False,  # a fused multiply and add would round ties by what was rounded away before
    )  # fmt: skip
    return q, stats


def choose_low_bit_tile(m: int, n: int, k: int, device: torch.device, is_int8: bool) -> Tile:
    """Return the measured winner of a shape, or the tile of the least estimated time."""
    name = "low_bit_int8" if is_int8 else "low_bit_fp8"
    if (measured := winner(name, capability(device), m, n, k)) is not None:
        return Tile(**measured)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

    def time(entry: tuple[Tile, float]) -> float:
        tile, rate = entry
        return -(-triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n) // processors) * tile.m * tile.n / rate

    return min(LOW_BIT_TILES, key=time)[0]


def launch_low_bit_linear(
    a: Tensor, a_stats: Tensor, w: Tensor, w_stats: tuple[Tensor, Tensor, Tensor], bias: Tensor | None,
    dtype: torch.dtype, tile: Tile | None = None, descriptors: bool | None = None,
) -> Tensor:  # fmt: skip
    """Run a kernel on codes ``a (M, K)`` and ``w (N, K)``; ``tile`` and ``descriptors`` are chosen unless given.

    Args:
        w_stats: scales, zeros and sums of the weight's rows.
    """
    (m, k), n = a.shape, w.shape[0]
    a, w, is_int8 = a.contiguous(), w.contiguous(), a.dtype == torch.int8
    y = torch.empty((m, n), dtype=dtype, device=a.device)
    if m == 0 or n == 0:
        return y
    others = (
        a_stats.contiguous(),
        *(tensor.contiguous() for tensor in w_stats),
        a_stats if bias is None else bias.contiguous(),
    )
    if descriptors is None:
        is_aligned = k % 16 == 0 and a.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0
        descriptors = is_aligned and capability(a.device) >= (9, 0)
    has_bias = bias is not None
    if descriptors:
        return _with_low_bit_descriptors(
            a, w, y, others, has_bias, tile or choose_low_bit_tile(m, n, k, a.device, is_int8)
        )
    small, large = _POINTER_TILES["int8" if is_int8 else "fp8"]
    tile = tile or (small if m <= 32 else large)
    low_bit_pointers_kernel[(triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)](
        a, w, y, *others, m, n, k, a.stride(0), w.stride(0),
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP_M=_GROUP_M, HAS_BIAS=has_bias, IS_INT8=is_int8,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def _with_low_bit_descriptors(
    a: Tensor, w: Tensor, y: Tensor, others: tuple[Tensor, ...], has_bias: bool, tile: Tile
) -> Tensor:
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, k), n = a.shape, w.shape[0]
    tiles = triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n)
    on_cuda = a.device.type == "cuda"
    processors = torch.cuda.get_device_properties(a.device).multi_processor_count if on_cuda else 4
    low_bit_descriptors_kernel[(min(processors, tiles),)](
        TensorDescriptor(a, [m, k], [k, 1], [tile.m, tile.k]),
        TensorDescriptor(w, [n, k], [k, 1], [tile.n, tile.k]),
        y, *others, m, n, k,
        BM=tile.m, BN=tile.n, BK=tile.k, GROUP_M=_GROUP_M, HAS_BIAS=has_bias, PROGRAMS=processors,
        IS_INT8=a.dtype == torch.int8, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y
