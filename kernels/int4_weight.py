"""Weights of 4 bits: two codes in a byte along K, the even index in the low nibble, in two's complement.

A group of ``K / G`` codes along K shares a scale: ``w = q * s`` with ``q`` in [-7, 7]. The scales are either fp32
``(N, G)``, or whole multiples of one scale of the row: ``w = (q * u) * s`` with ``u (N, G)`` in 1..18, so that
``q * u`` is an exact int8 code within [-126, 126] (the two-level grouping of arXiv 2405.04532).
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.dispatch import Mode, is_direct, is_fused, on_device_of


def pack_int4(codes: Tensor) -> Tensor:
    """Return codes in -8..7, int8 ``(N, K)`` with an even K, as uint8 ``(N, K / 2)``."""
    nibbles = codes.view(torch.uint8) & 15
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Invert :func:`pack_int4`: uint8 ``(N, K / 2)`` to int8 ``(N, K)``."""
    low, high = packed & 15, packed >> 4
    nibbles = torch.stack((low, high), dim=-1).flatten(1)
    return ((nibbles ^ 8).to(torch.int8) - 8).contiguous()  # sign extension


def expand_int4_reference(packed: Tensor, multipliers: Tensor) -> Tensor:
    """Return the int8 codes ``q * u`` ``(N, K)``, on any device."""
    codes = unpack_int4(packed).unflatten(1, (multipliers.shape[1], -1))
    return (codes * multipliers.to(torch.int8).unsqueeze(-1)).flatten(1)


def dequantize_int4_reference(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight ``q * s`` ``(N, K)`` in ``dtype``, rounded once, on any device."""
    codes = unpack_int4(packed).unflatten(1, (scales.shape[1], -1))
    return (codes * scales.unsqueeze(-1)).flatten(1).to(dtype)


def expand_int4(packed: Tensor, multipliers: Tensor, mode: Mode = "auto") -> Tensor:
    """Expand packed codes by whole multipliers to int8: ``(q * u)``, exact.

    Args:
        packed: uint8 ``(N, K / 2)``.
        multipliers: uint8 ``(N, G)``, 1..18.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _check(packed, multipliers)
    if is_fused(mode, packed.device, "expand_int4"):
        return (_expanded if is_direct(packed) else torch.ops.diffaccel.expand_int4)(packed, multipliers)
    return expand_int4_reference(packed, multipliers)


def dequantize_int4(packed: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16, mode: Mode = "auto") -> Tensor:
    """Expand packed codes by the scales of their groups: ``q * s``, rounded once to ``dtype``.

    Args:
        packed: uint8 ``(N, K / 2)``.
        scales: fp32 ``(N, G)``.

    Raises:
        ValueError: for shapes that do not fit together.
    """
    _check(packed, scales)
    if is_fused(mode, packed.device, "dequantize_int4"):
        return (_dequantized if is_direct(packed) else torch.ops.diffaccel.dequantize_int4)(packed, scales, dtype)
    return dequantize_int4_reference(packed, scales, dtype)


def _check(packed: Tensor, groups: Tensor) -> None:
    if packed.ndim != 2 or groups.ndim != 2 or packed.shape[0] != groups.shape[0] or packed.dtype != torch.uint8:
        raise ValueError(
            f"Packed codes must be uint8 (N, K / 2) with scales (N, G); got {packed.dtype} {tuple(packed.shape)} and "
            f"{tuple(groups.shape)}."
        )
    if not groups.shape[1] or packed.shape[1] % groups.shape[1]:
        raise ValueError(f"{groups.shape[1]} groups do not divide K = {2 * packed.shape[1]} into even sizes.")


def _expanded(packed: Tensor, multipliers: Tensor) -> Tensor:
    if not is_fused("auto", packed.device, "expand_int4"):
        return expand_int4_reference(packed, multipliers)
    from diffaccel.kernels.triton_weights import launch_int4

    with on_device_of(packed):
        return launch_int4(packed, multipliers, torch.int8)


_expand_int4 = torch.library.custom_op("diffaccel::expand_int4", _expanded, mutates_args=())


@_expand_int4.register_fake
def _(packed: Tensor, multipliers: Tensor) -> Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=torch.int8)


def _dequantized(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    if not is_fused("auto", packed.device, "dequantize_int4"):
        return dequantize_int4_reference(packed, scales, dtype)
    from diffaccel.kernels.triton_weights import launch_int4

    with on_device_of(packed):
        return launch_int4(packed, scales, dtype)


_dequantize_int4 = torch.library.custom_op("diffaccel::dequantize_int4", _dequantized, mutates_args=())


@_dequantize_int4.register_fake
def _(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype)
