"""Triton kernels of :mod:`diffaccel.kernels.quantize_pictures`: largest magnitudes of parts, then codes.

Two launches: many programs find the largest magnitude of a part of a picture each; then every program takes the largest
of its picture's parts and writes a tile of codes, channels last, whichever of the two formats the picture has.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffaccel.kernels.codes import LARGEST, SMALLEST
from diffaccel.kernels.dispatch import count_of
from diffaccel.kernels.triton_rows import round_to_codes

PARTS = 256  # of a picture, at most: each program of the second kernel reads all of its picture's
_BLOCK = 4096  # elements that a program handles at a time
_CHANNELS, _PIXELS = 64, 64  # tile of a picture that is turned to channels last


@triton.jit
def picture_parts_kernel(x_ptr, part_ptr, length, span, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Write the largest magnitude of part ``program_id(0)`` of picture ``program_id(1)``; infinity for NaN."""
    part, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    places = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, span, BLOCK):
        offsets = part * span + start + places
        x = tl.load(x_ptr + picture * length + offsets, mask=offsets < length, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.where(x != x, float("inf"), tl.abs(x)))
    tl.store(part_ptr + picture * PARTS + part, tl.max(largest, axis=0))


@triton.jit
def picture_codes_kernel(
    x_ptr, part_ptr, q_ptr, scale_ptr, CHANNELS, pixels, parts,
    LARGEST: tl.constexpr, INVERSE: tl.constexpr, SMALLEST: tl.constexpr, PARTS: tl.constexpr,
    IS_LAST: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Write the codes of tile ``program_id(0)`` of picture ``program_id(1)``; the first tile also writes the scale.

    ``IS_LAST``: the picture has channels last too, and a tile is ``BC * BP`` elements in a row.
    """
    tile, picture = tl.program_id(0), tl.program_id(1)
    numbers = tl.arange(0, PARTS)
    amax = tl.max(tl.load(part_ptr + picture * PARTS + numbers, mask=numbers < parts, other=0.0), axis=0)
    bad = amax == float("inf")
    amax = tl.where(bad, 1.0, tl.maximum(amax, SMALLEST))
    if tile == 0:
        tl.store(scale_ptr + picture, tl.where(bad, float("nan"), amax * INVERSE))
    first = picture.to(tl.int64) * CHANNELS * pixels
    if IS_LAST:
        places = tile * (BC * BP) + tl.arange(0, BC * BP)
        inside = places < CHANNELS * pixels
        x = tl.load(x_ptr + first + places, mask=inside, other=0.0).to(tl.float32)
        codes = round_to_codes(x, amax, bad, LARGEST, True)
        tl.store(q_ptr + first + places, codes.to(tl.int8), mask=inside)
    else:
        across = tl.cdiv(CHANNELS, BC)
        channel = (tile % across) * BC + tl.arange(0, BC)[:, None]
        pixel = (tile // across) * BP + tl.arange(0, BP)[None, :]
        inside = (channel < CHANNELS) & (pixel < pixels)
        x = tl.load(x_ptr + first + channel * pixels + pixel, mask=inside, other=0.0).to(tl.float32)
        codes = round_to_codes(x, amax, bad, LARGEST, True)
        tl.store(q_ptr + first + pixel * CHANNELS + channel, codes.to(tl.int8), mask=inside)


def launch_quantize_pictures(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run both kernels on ``x (B, C, H, W)`` and return codes, channels last, and scales ``(B, 1)``."""
    batch, channels, height, width = x.shape
    x = x.float() if x.dtype == torch.float64 else x
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    x = x if is_last else x.contiguous()
    q = torch.empty((batch, height, width, channels), dtype=torch.int8, device=x.device)
    scale = torch.empty((batch, 1), dtype=torch.float32, device=x.device)
    codes, pixels = q.permute(0, 3, 1, 2), height * width
    if batch == 0 or channels * pixels == 0:
        return codes, scale.fill_(SMALLEST * (1 / LARGEST["int8"]))
    length = channels * pixels
    span = count_of(count_of(length, PARTS), _BLOCK) * _BLOCK
    parts = count_of(length, span)
    largest = torch.empty((batch, PARTS), dtype=torch.float32, device=x.device)
    picture_parts_kernel[(parts, batch)](x, largest, length, span, BLOCK=_BLOCK, PARTS=PARTS, num_warps=8)
    size = _CHANNELS * _PIXELS
    tiles = count_of(length, size) if is_last else count_of(channels, _CHANNELS) * count_of(pixels, _PIXELS)
    picture_codes_kernel[(tiles, batch)](
        x, largest, q, scale, channels, pixels, parts,
        LARGEST=LARGEST["int8"], INVERSE=1 / LARGEST["int8"], SMALLEST=SMALLEST, PARTS=PARTS,
        IS_LAST=is_last, BC=_CHANNELS, BP=_PIXELS, num_warps=8,
        enable_fp_fusion=False,  # a fused multiply and add would round ties by what was rounded away before
    )  # fmt: skip
    return codes, scale
