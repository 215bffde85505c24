"""Quantization of each token between its own least and largest number, to codes of 2 to 8 bits.

For a row x with clipping factors ``(c_lo, c_hi)``, ``lo = min(c_lo min x, 0)``, ``hi = max(c_hi max x, 0)`` and
``P = 2^b - 1``:

    s = max((hi - lo) / P, 1e-9)    z = clamp(-round(lo / s), 0, P)    q = clamp(round(x / s) + z, 0, P)

with ties to even; zero is always one of the numbers, so that padding stays zero. The symmetric form has
``s = max(-lo, hi) / (2^(b-1) - 1)`` and ``z = 2^(b-1)``. Codes are returned centred, ``q - 2^(b-1)``, with the scale,
the centred zero and the sum of the centred codes of each row, which is all that a product needs. A row that holds an
infinity or not-a-number has the scale NaN and the codes 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.codes import DTYPES, LARGEST, LEAST_SCALE, Codes
from diffaccel.kernels.dispatch import Mode, is_fused, on_device_of


def token_scales(lo: Tensor, hi: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return scale and zero (not centred) of ranges that contain 0, fp32; the zero has no gradient."""
    largest, half = 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scale = (torch.maximum(-lo, hi) * (1 / (half - 1 or 1))).clamp_min(LEAST_SCALE)
        return scale, torch.full_like(scale, half, requires_grad=False)
    scale = ((hi - lo) * (1 / largest)).clamp_min(LEAST_SCALE)
    zero = (-(lo * scale.reciprocal()).round()).clamp(0, largest).detach()
    return scale, zero


def quantize_tokens_reference(
    x: Tensor, clip: Tensor, bits: int, symmetric: bool, codes: Codes
) -> tuple[Tensor, Tensor]:
    """Return centred codes ``(M, K)`` and ``(scale, zero, sum)`` of each row, fp32 ``(M, 3)``, on any device."""
    x, half = x.float(), 2 ** (bits - 1)
    factors = clip.repeat_interleave(x.shape[0] // max(len(clip), 1), dim=0) if len(clip) > 1 else clip
    lo, hi = (f(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1) for f in (x.amin, x.amax))
    good = torch.isfinite(lo) & torch.isfinite(hi)
    lo = torch.where(good, lo * factors[:, :1], 0.0).clamp_max(0)
    hi = torch.where(good, hi * factors[:, 1:], 0.0).clamp_min(0)
    scale, zero = token_scales(lo, hi, bits, symmetric)
    whole = torch.where(good, (x * scale.reciprocal()).round(), 0.0)
    centred = torch.where(good, (whole + zero).clamp(0, 2**bits - 1) - half, 0.0)
    total = centred.sum(dim=1, keepdim=True)
    stats = torch.cat([torch.where(good, scale, float("nan")), zero - half, total], dim=1)
    return centred.to(DTYPES[codes]), stats


def quantize_tokens(
    x: Tensor, clip: Tensor, bits: int, symmetric: bool, codes: Codes, mode: Mode = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``x`` between its own least and largest number.

    Args:
        x: ``(M, K)``, floating.
        clip: factors of the least and of the largest number, fp32 ``(B, 2)``: the rows are those of B samples, one
            after another.
        bits: 2..8.
        codes: dtype of the centred codes, "int8", or "fp8" for up to 5 bits.

    Raises:
        ValueError: for shapes that do not fit, and codes that the dtype does not hold.
    """
    if codes not in LARGEST or not 2 <= bits <= (5 if codes == "fp8" else 8):
        raise ValueError(f"codes is {codes!r} of {bits} bits; it must be 'int8' of 2..8 bits, or 'fp8' of 2..5.")
    if x.ndim != 2 or clip.ndim != 2 or clip.shape[1] != 2 or not len(clip) or x.shape[0] % len(clip):
        raise ValueError(
            f"quantize_tokens needs (M, K), and clip (B, 2) with M a multiple of B; got {tuple(x.shape)} and "
            f"{tuple(clip.shape)}."
        )
    if torch.compiler.is_compiling() and mode == "auto":
        return quantize_tokens_reference(x, clip, bits, symmetric, codes)
    if is_fused(mode, x.device, "quantize_tokens", (8, 9) if codes == "fp8" else (8, 0)):
        return torch.ops.diffaccel.quantize_tokens(x, clip, bits, symmetric, codes)
    return quantize_tokens_reference(x, clip, bits, symmetric, codes)


@torch.library.custom_op("diffaccel::quantize_tokens", mutates_args=(), device_types="cuda")
def _quantize_tokens(x: Tensor, clip: Tensor, bits: int, symmetric: bool, codes: str) -> tuple[Tensor, Tensor]:
    from diffaccel.kernels.triton_low_bit import launch_quantize_tokens

    with on_device_of(x):
        return launch_quantize_tokens(x, clip, bits, symmetric, codes)


@_quantize_tokens.register_kernel("cpu")
def _(x: Tensor, clip: Tensor, bits: int, symmetric: bool, codes: Codes) -> tuple[Tensor, Tensor]:
    return quantize_tokens_reference(x, clip, bits, symmetric, codes)


@_quantize_tokens.register_fake
def _(x: Tensor, clip: Tensor, bits: int, symmetric: bool, codes: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=DTYPES[codes]), x.new_empty((x.shape[0], 3), dtype=torch.float32)
