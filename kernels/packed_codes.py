"""Codes of 2 to 8 bits in bytes: code j of a row occupies its bits ``b j`` to ``b j + b - 1``, the lowest bit first.

With 4 bits a byte holds two codes, the even index in the low nibble; with 3 bits three bytes hold eight. Codes are kept
from 0 on, and are centred when they are unpacked: ``q - 2^(b - 1)``, which is exact in int8, and in float8 (e4m3fn) up
to 5 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.codes import DTYPES, Codes
from diffaccel.kernels.dispatch import Mode, is_fused, on_device_of


def packed_width(k: int, bits: int) -> int:
    """Return the bytes of a row of ``k`` codes.

    Raises:
        ValueError: where they end inside of a byte.
    """
    if k * bits % 8:
        raise ValueError(f"{k} codes of {bits} bits end inside of a byte: K must be a multiple of {8 // _gcd(bits)}.")
    return k * bits // 8


def _gcd(bits: int) -> int:
    return bits & -bits  # of bits and 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return codes in 0..2^bits - 1, uint8 ``(N, K)``, as uint8 ``(N, K bits / 8)``."""
    n, k = codes.shape
    width = packed_width(k, bits)
    if bits == 8:
        return codes.clone()
    if bits == 4:
        return codes[:, 0::2] | (codes[:, 1::2] << 4)
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    single = ((codes.unsqueeze(-1) >> places) & 1).reshape(n, width, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (single * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, k: int) -> Tensor:
    """Invert :func:`pack_codes`: the ``k`` codes of each row, uint8 ``(N, K)``."""
    if bits == 8:
        return packed.clone()
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    place = torch.arange(k, dtype=torch.int64, device=packed.device) * bits
    byte = place // 8
    second = (byte + 1).clamp_max(packed.shape[1] - 1)  # of a code that ends in its first byte, no bit is used
    word = packed[:, byte].to(torch.int32) | (packed[:, second].to(torch.int32) << 8)
    return ((word >> (place % 8)) & (2**bits - 1)).to(torch.uint8)


def expand_codes_reference(packed: Tensor, bits: int, center: int, k: int, codes: Codes) -> Tensor:
    """Return the centred codes ``(N, K)``, on any device."""
    return (unpack_codes(packed, bits, k).to(torch.int16) - center).to(torch.float32).to(DTYPES[codes])


def expand_codes(packed: Tensor, bits: int, center: int, k: int, codes: Codes, mode: Mode = "auto") -> Tensor:
    """Unpack codes and centre them: ``q - center``, int8 or float8 ``(N, K)``, exact.

    Args:
        packed: uint8 ``(N, K bits / 8)``.
        bits: of storage, 2..8.
        center: what is subtracted, half of the number of codes.
        codes: "int8" or "fp8".

    Raises:
        ValueError: for a width that does not fit.
    """
    if packed.ndim != 2 or packed.dtype != torch.uint8 or packed.shape[1] != packed_width(k, bits):
        raise ValueError(
            f"{k} codes of {bits} bits are uint8 (N, {packed_width(k, bits)}); got {packed.dtype} "
            f"{tuple(packed.shape)}."
        )
    if is_fused(mode, packed.device, "expand_codes", (8, 9) if codes == "fp8" else (8, 0)):
        return torch.ops.diffaccel.expand_codes(packed, bits, center, k, codes)
    return expand_codes_reference(packed, bits, center, k, codes)


@torch.library.custom_op("diffaccel::expand_codes", mutates_args=())
def _expand_codes(packed: Tensor, bits: int, center: int, k: int, codes: str) -> Tensor:
    if not is_fused("auto", packed.device, "expand_codes"):
        return expand_codes_reference(packed, bits, center, k, codes)  # type: ignore[arg-type]
    from diffaccel.kernels.triton_low_bit import launch_expand_codes

    with on_device_of(packed):
        return launch_expand_codes(packed, bits, center, k, codes)


@_expand_codes.register_fake
def _(packed: Tensor, bits: int, center: int, k: int, codes: str) -> Tensor:
    return packed.new_empty((packed.shape[0], k), dtype=DTYPES[codes])
