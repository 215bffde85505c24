"""Codes of weights of 2, 4 and 8 bits, and their packing.

A row has codes ``q`` in [-n, n], n = 2^(b-1) - 1 (2 bits are {-1, 0, 1}), and ``w = q u s``: one fp32 scale ``s`` of
the row, or of each of its two ranges of channels, and a whole multiple ``u`` of each group, 1 without groups, so that
``q u`` is an exact int8 code (two-level groups, arXiv 2405.04532).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.codes import SMALLEST
from diffaccel.kernels.dispatch import Mode
from diffaccel.kernels.int4_weight import expand_int4, pack_int4
from diffaccel.quant.formats import Clip
from diffaccel.quant.mixed.form import MixedFormat

_CHUNK = 1 << 24  # elements quantized at a time, which bounds the memory of a pass
# Fractions of the largest magnitude that are tried for the least squared error. The best ternary step of normal rows
# lies near a third of it.
_FRACTIONS = {2: [1 - 0.05 * i for i in range(16)], 4: [1 - 0.05 * i for i in range(7)], 8: [1.0]}


def largest_code(bits: int) -> int:
    """Return n = 2^(bits - 1) - 1."""
    return 2 ** (bits - 1) - 1


@torch.no_grad()
def quantize_mixed(weight: Tensor, form: MixedFormat, clip: Clip = "mse", split: int = 0) -> dict[str, Tensor]:
    """Return the stored tensors of a weight ``(N, K)``: codes, scales, and multiples below 8 bits.

    Args:
        clip: choose scales for the least squared error ("mse"), or by the largest magnitude ("none").
        split: columns of the first range, which may be several for one channel.

    Raises:
        DiffAccelError: for a weight that holds an infinity or not-a-number.
    """
    if not bool(torch.isfinite(weight).all()):
        raise DiffAccelError(
            f"A weight of shape {tuple(weight.shape)} holds infinities or not-a-numbers. Repair the checkpoint, or "
            "name the layer in skip."
        )
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    with torch.autocast(weight.device.type, enabled=False):
        parts = [_quantize(part.float(), form, clip, split) for part in weight.detach().split(rows)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _quantize(weight: Tensor, form: MixedFormat, clip: Clip, split: int) -> dict[str, Tensor]:
    bits = form.weight_bits
    if form.group:
        codes, multiples, scale = _two_levels(weight, bits, form.group, clip)
    else:
        ranges = weight.split([split, weight.shape[1] - split], dim=1) if split else (weight,)
        scales = [_scale(part, bits, clip) for part in ranges]
        codes = torch.cat([_codes(part, s, bits) for part, s in zip(ranges, scales, strict=True)], dim=1)
        scale = torch.cat(scales, dim=1)
        multiples = torch.ones((len(weight), 1), dtype=torch.uint8, device=weight.device)
    if bits == 8:
        return {"weight": codes, "weight_scale": scale}
    return {"weight": pack(codes, bits), "weight_multiplier": multiples, "weight_scale": scale}


def _codes(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    n = largest_code(bits)
    return (weight / scale).round().clamp(-n, n).to(torch.int8)


def _scale(weight: Tensor, bits: int, clip: Clip) -> Tensor:
    """Return the scale of each row, fp32 ``(N, 1)``."""
    largest = weight.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST) / largest_code(bits)
    best, error = largest, None
    for fraction in _FRACTIONS[bits] if clip == "mse" else ():
        scale = largest * fraction
        other = (weight - _codes(weight, scale, bits) * scale).square().sum(dim=1, keepdim=True)
        better = torch.ones_like(other, dtype=torch.bool) if error is None else other < error
        best = torch.where(better, scale, best)
        error = other if error is None else torch.where(better, other, error)
    return best


def _two_levels(weight: Tensor, bits: int, group: int, clip: Clip) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes ``(N, K)``, multiples uint8 ``(N, G)`` and scale ``(N, 1)``."""
    n = largest_code(bits)
    most = 127 // n  # q u stays an int8 code
    groups = weight.unflatten(1, (-1, group))  # (N, G, group)
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST) / (n * most)
    exact = groups.abs().amax(dim=-1) / (n * scale)
    largest = (exact - 1e-4).ceil().clamp(1, most)
    best, error = largest, torch.full_like(largest, torch.inf)
    for fraction in _FRACTIONS[bits] if clip == "mse" else (1.0,):
        multiple = largest if fraction == 1.0 else (largest * fraction).round().clamp_min(1)
        step = (scale * multiple).unsqueeze(-1)
        other = (groups - (groups / step).round().clamp(-n, n) * step).square().sum(dim=-1)
        best, error = torch.where(other < error, multiple, best), torch.minimum(other, error)
    codes = _codes(groups, (scale * best).unsqueeze(-1), bits).flatten(1)
    return codes, best.to(torch.uint8), scale


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return int8 codes ``(N, K)`` of 2 or 4 bits as uint8, the first in the lowest bits; zeros fill a row."""
    per_byte = 8 // bits
    padded = F.pad(codes, (0, -codes.shape[1] % per_byte))
    if bits == 4:
        return pack_int4(padded)
    fields = (padded.view(torch.uint8) & 3).unflatten(1, (-1, 4))
    return fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6


def unpack_int2(packed: Tensor) -> Tensor:
    """Return the int8 codes ``(N, 4 C)`` of packed 2-bit codes ``(N, C)``."""
    fields = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)
    return ((fields ^ 2).to(torch.int8) - 2).contiguous()  # sign extension


def expanded(packed: Tensor, multiples: Tensor, bits: int, columns: int, mode: Mode = "auto") -> Tensor:
    """Return the int8 codes ``q u`` ``(N, columns)`` of packed codes."""
    if bits == 4 and columns % 2 == 0:
        return expand_int4(packed, multiples, mode)
    codes = unpack_int2(packed) if bits == 2 else expand_int4(packed, torch.ones_like(multiples[:, :1]), mode)
    groups = codes[:, :columns].unflatten(1, (multiples.shape[1], -1))
    return (groups * multiples.to(torch.int8).unsqueeze(-1)).flatten(1)
