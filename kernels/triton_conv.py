"""Triton kernels of :mod:`diffaccel.kernels.int8_conv`: a convolution of codes as a product, without its patches.

The rows of the product are output pixels, its depth is the window's taps times the input channels: taps outside,
channels inside, both K-major as the tensor cores need them. On Hopper, with a step of 1, a tile of rows is a box of
output pixels, and the same box of input pixels, moved by the tap, comes through a tensor descriptor, which fills in
zeros outside of the picture: no masks. Other devices and steps take pointers, with masks of the pixels of a tap.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diffaccel.kernels.dispatch import capability, count_of
from diffaccel.kernels.triton_int8 import Tile, processors, tile_of
from diffaccel.kernels.winners import winner

_GROUP_M = 8


@dataclass(frozen=True)
class ConvTile(Tile):
    """A tile of output pixels and channels.

    Attributes:
        programs: that walk over the tiles at the same time, of each multiprocessor.
        descriptors: whether input comes through tensor descriptors.
    """

    programs: int = 1
    descriptors: bool = True


# Tiles of the descriptor kernel, with the share of the tensor cores' rate that they are taken to reach, for the choice
# where no measured winner is known.
TILES: tuple[tuple[ConvTile, float], ...] = (
    (ConvTile(256, 128, 128, 8, 3), 1.0),
    (ConvTile(128, 256, 128, 8, 3), 1.0),
    (ConvTile(256, 64, 128, 4, 4), 0.9),
    (ConvTile(128, 128, 128, 8, 4), 0.85),
    (ConvTile(128, 64, 128, 4, 4), 0.65),
    (ConvTile(64, 128, 128, 4, 4), 0.6),
    (ConvTile(64, 64, 128, 4, 4), 0.4),
)
POINTER_TILE = ConvTile(128, 128, 64, 8, 3, descriptors=False)
SMALL_POINTER_TILE = ConvTile(32, 64, 64, 4, 4, descriptors=False)


@dataclass(frozen=True)
class ConvSizes:
    """Sizes of a convolution: pictures, input and output pixels, channels, window, steps and zeros around."""

    images: int
    height: int
    width: int
    out_height: int
    out_width: int
    channels: int
    out_channels: int
    rows: int
    columns: int
    stride: tuple[int, int]
    padding: tuple[int, int]

    @property
    def product(self) -> tuple[int, int, int]:
        """M, N and K of the product."""
        m = self.images * self.out_height * self.out_width
        return m, self.out_channels, self.rows * self.columns * self.channels


@triton.jit
def _store_pixels(
    total, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, image, pixel, inside, tile_n, pixels, CO,
    BN: tl.constexpr, HAS_BIAS: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Write ``total * (s_x s_w^T) + b`` of one tile, in the dtype of ``y_ptr``; ``IS_LAST``: channels last."""
    columns = tile_n * BN + tl.arange(0, BN)
    x_scale = tl.load(x_scale_ptr + image, mask=inside, other=0.0)
    w_scale = tl.load(w_scale_ptr + columns, mask=columns < CO, other=0.0)
    y = total.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    if HAS_BIAS:
        y += tl.load(bias_ptr + columns, mask=columns < CO, other=0.0).to(tl.float32)[None, :]
    image = image.to(tl.int64)
    if IS_LAST:
        places = y_ptr + ((image * pixels + pixel) * CO)[:, None] + columns[None, :]
    else:
        places = y_ptr + (image * CO * pixels + pixel)[:, None] + columns[None, :].to(tl.int64) * pixels
    tl.store(places, y.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (columns[None, :] < CO))


@triton.jit
def int8_conv_descriptors_kernel(
    x_desc, w_desc, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, images, out_height, out_width, CI, CO,
    tiles_y, tiles_x, tiles_m, tiles_n, pad_y, pad_x,
    BI: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr, IS_LAST: tl.constexpr,
    PROGRAMS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Compute every ``PROGRAMS``-th tile from descriptors of ``x (B, H, W, CI)`` and ``w (CO, ROWS * COLUMNS * CI)``.

    A tile of rows is a box of ``BI`` pictures, ``BH`` lines and ``BW`` columns. Beyond the last channel x is 0,
    whatever w has there. The product is turned, channels by pixels: only a second operand is read from shared memory as
    it lies there when its shape changes.
    """
    parts = tl.cdiv(CI, BK)
    for number in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=False, warp_specialize=SPECIALIZED):
        tile_m, tile_n = tile_of(number, tiles_m, tiles_n, GROUP_M)
        first_x = (tile_m % tiles_x) * BW
        first_y = ((tile_m // tiles_x) % tiles_y) * BH
        first_image = (tile_m // (tiles_x * tiles_y)) * BI
        total = tl.zeros((BN, BI * BH * BW), dtype=tl.int32)
        for step in range(ROWS * COLUMNS * parts):
            tap, channel = step // parts, (step % parts) * BK
            line, column = first_y + tap // COLUMNS - pad_y, first_x + tap % COLUMNS - pad_x
            x = tl.reshape(x_desc.load([first_image, line, column, channel]), (BI * BH * BW, BK))
            w = w_desc.load([tile_n * BN, tap * CI + channel])
            total = tl.dot(w, x.T, total, out_dtype=tl.int32)
        rows = tl.arange(0, BI * BH * BW)
        image = first_image + rows // (BH * BW)
        y, x = first_y + (rows // BW) % BH, first_x + rows % BW
        inside = (image < images) & (y < out_height) & (x < out_width)
        _store_pixels(
            total.T, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, image, y * out_width + x, inside, tile_n,
            out_height * out_width, CO, BN, HAS_BIAS, IS_LAST,
        )  # fmt: skip


@triton.jit
def int8_conv_pointers_kernel(
    x_ptr, w_ptr, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, images, height, width, out_height, out_width, CI, CO,
    step_y, step_x, pad_y, pad_x,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP_M: tl.constexpr, HAS_BIAS: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Compute tile ``program_id(0)``; any size and step. CI is a multiple of 16."""
    pixels = out_height * out_width
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(images * pixels, BM), tl.cdiv(CO, BN), GROUP_M)
    rows, columns, depth = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    image, pixel, inside = rows // pixels, rows % pixels, rows < images * pixels
    top, left = (pixel // out_width) * step_y - pad_y, (pixel % out_width) * step_x - pad_x
    corners = x_ptr + ((image.to(tl.int64) * height + top) * width + left) * CI
    w_rows = w_ptr + columns.to(tl.int64) * (ROWS * COLUMNS * CI)
    total = tl.zeros((BM, BN), dtype=tl.int32)
    parts = tl.cdiv(CI, BK)
    for step in range(ROWS * COLUMNS * parts):  # one loop, so that loads run ahead across taps
        tap, k = step // parts, (step % parts) * BK + depth[None, :]
        line, column = tap // COLUMNS, tap % COLUMNS
        y, x = top + line, left + column
        taken = inside & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        x_part = tl.load(
            (corners + (line * width + column).to(tl.int64) * CI)[:, None] + k, mask=taken[:, None] & (k < CI), other=0
        )
        w_part = tl.load((w_rows + tap * CI)[:, None] + k, mask=(columns[:, None] < CO) & (k < CI), other=0)
        total = tl.dot(x_part, tl.trans(w_part), total, out_dtype=tl.int32)
    _store_pixels(
        total, y_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, image, pixel, inside, tile_n, pixels, CO,
        BN, HAS_BIAS, IS_LAST,
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def box_of(m: int, images: int, height: int, width: int) -> tuple[int, int, int]:
    """Return pictures, lines and columns of the box of ``m`` output pixels, powers of two, of which fewest cover."""
    sides = [1 << i for i in range(m.bit_length())]
    boxes = [(i, m // (i * w), w) for i in sides for w in sides if i * w <= m]
    return min(boxes, key=lambda box: (boxes_in(box, images, height, width), box[0], -box[2]))


def boxes_in(box: tuple[int, int, int], images: int, height: int, width: int) -> int:
    """Return how many boxes cover all pixels of pictures."""
    return count_of(images, box[0]) * count_of(height, box[1]) * count_of(width, box[2])


@functools.lru_cache(maxsize=4096)
def choose_conv_tile(sizes: ConvSizes, device: torch.device) -> ConvTile:
    """Return the measured winner of a shape, or the tile of the least estimated time."""
    m, n, k = sizes.product
    if sizes.stride != (1, 1) or capability(device) < (9, 0):
        return SMALL_POINTER_TILE if m <= 256 else POINTER_TILE
    if (measured := winner("int8_conv2d", capability(device), m, n, k)) is not None:
        return ConvTile(**measured)

    def time(entry: tuple[ConvTile, float]) -> float:
        tile, rate = entry
        places = sizes.images, sizes.out_height, sizes.out_width
        tiles = boxes_in(box_of(tile.m, *places), *places) * count_of(n, tile.n)
        return count_of(tiles, processors(device)) * tile.m * tile.n / rate

    return fitting_depth(min(TILES, key=time)[0], sizes.channels)


def fitting_depth(tile: ConvTile, channels: int) -> ConvTile:
    """Return a tile with half the depth where that leaves less of the last part of the channels empty."""
    half = tile.k // 2
    return tile if count_of(channels, tile.k) * 2 == count_of(channels, half) else replace(tile, k=half)


def launch_int8_conv(
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    scales: tuple[Tensor, Tensor | None],
    y: Tensor,
    sizes: ConvSizes,
    channels_last: bool,
    tile: ConvTile | None = None,
) -> None:
    """Run a kernel on codes ``x (B, CI, H, W)`` and ``w (CO, CI, R, S)`` and write ``y (B, CO, OH, OW)``.

    Args:
        scales: of the weight, ``(CO, 1)``, and the bias or None.
        y: channels last, or contiguous, as ``channels_last`` says.
        tile: chosen unless given.
    """
    if y.numel() == 0:
        return
    w_scale, bias = scales
    x, w = (codes.contiguous(memory_format=torch.channels_last) for codes in (x, w))
    operands = (y, x_scale.contiguous(), w_scale.contiguous(), w_scale if bias is None else bias.contiguous())
    options = {
        "ROWS": sizes.rows, "COLUMNS": sizes.columns, "GROUP_M": _GROUP_M, "HAS_BIAS": bias is not None,
        "IS_LAST": channels_last,
    }  # fmt: skip
    tile = tile or choose_conv_tile(sizes, x.device)
    is_aligned = x.data_ptr() % 16 == 0 and w.data_ptr() % 16 == 0
    if tile.descriptors and is_aligned:
        _with_descriptors(x, w, operands, sizes, tile, options)
    else:
        _with_pointers(x, w, operands, sizes, POINTER_TILE if tile.descriptors else tile, options)


def _with_descriptors(
    x: Tensor, w: Tensor, operands: tuple[Tensor, ...], sizes: ConvSizes, tile: ConvTile, options: dict[str, int]
) -> None:
    places = sizes.images, sizes.out_height, sizes.out_width
    box = box_of(tile.m, *places)
    tiles_m, tiles_n = boxes_in(box, *places), count_of(sizes.out_channels, tile.n)
    ci, k = sizes.channels, sizes.product[2]
    shape = [sizes.images, sizes.height, sizes.width, ci]
    strides = [sizes.height * sizes.width * ci, sizes.width * ci, ci, 1]
    programs = processors(x.device) * tile.programs
    int8_conv_descriptors_kernel[(min(programs, tiles_m * tiles_n),)](
        TensorDescriptor(x, shape, strides, [*box, tile.k]),
        TensorDescriptor(w, [sizes.out_channels, k], [k, 1], [tile.n, tile.k]),
        *operands, *places, ci, sizes.out_channels,
        count_of(sizes.out_height, box[1]), count_of(sizes.out_width, box[2]), tiles_m, tiles_n, *sizes.padding,
        BI=box[0], BH=box[1], BW=box[2], BN=tile.n, BK=tile.k, **options,
        PROGRAMS=programs, SPECIALIZED=tile.specialized, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _with_pointers(
    x: Tensor, w: Tensor, operands: tuple[Tensor, ...], sizes: ConvSizes, tile: ConvTile, options: dict[str, int]
) -> None:
    tiles = count_of(sizes.product[0], tile.m) * count_of(sizes.out_channels, tile.n)
    int8_conv_pointers_kernel[(tiles,)](
        x, w, *operands, sizes.images, sizes.height, sizes.width, sizes.out_height, sizes.out_width,
        sizes.channels, sizes.out_channels, *sizes.stride, *sizes.padding,
        BM=tile.m, BN=tile.n, BK=tile.k, **options, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
