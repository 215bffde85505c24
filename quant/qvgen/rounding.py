"""Rounding with gradients: learned scales and zeros of weights, and clipped ranges of tokens (LSQ+, arXiv 2004.09576).

Rounding passes gradients straight through. Everything is computed in fp32, or in fp64 for fp64 weights.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffaccel.kernels.dispatch import has_triton
from diffaccel.kernels.quantize_tokens import token_scales

LEAST_FUSED = 1 << 16  # numbers from which on compiling a formula pays


def _weight_forward(weight: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
    return ((weight / scale + zero).round().clamp(0, largest) - zero) * scale


def _weight_backward(
    gradient: Tensor, weight: Tensor, scale: Tensor, zero: Tensor, largest: int
) -> tuple[Tensor, Tensor, Tensor]:
    v = weight / scale + zero
    whole = v.round()
    inside = (whole >= 0) & (whole <= largest)
    to_weight = torch.where(inside, gradient, 0.0)
    slope = torch.where(inside, whole - v, whole.clamp(0, largest) - zero)
    to_scale = (gradient * slope).sum(dim=1, keepdim=True)
    return to_weight, to_scale, (to_weight - gradient).sum(dim=1, keepdim=True) * scale


def _tokens_forward(x: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
    codes = ((x.to(scale.dtype) * scale.reciprocal()).round() + zero).clamp(0, largest)
    return ((codes - zero) * scale).to(x.dtype)


def _tokens_backward(gradient: Tensor, x: Tensor, scale: Tensor, zero: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    v = x.to(scale.dtype) * scale.reciprocal()
    whole = v.round()
    inside = (whole + zero >= 0) & (whole + zero <= largest)
    slope = torch.where(inside, whole - v, (whole + zero).clamp(0, largest) - zero)
    return torch.where(inside, gradient, 0.0), (gradient * slope).sum(dim=1, keepdim=True)


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _fused(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Return a formula as one kernel where the device has a compiler for it: a pass over memory, not one a term."""
    is_fast = x.is_cuda and has_triton() and x.numel() >= LEAST_FUSED and not torch.compiler.is_compiling()
    return _compiled(function) if is_fast else function


class RoundedWeight(torch.autograd.Function):
    """``s (clamp(round(W / s + z), 0, P) - z)`` of rows with scales and real zeros ``(N, 1)``.

    With ``v = W / s + z``, gradients to (W, s, z) are (1, round(v) - v, 0) where ``0 <= round(v) <= P``, (0, -z, -s)
    below and (0, P - z, -s) above; those of s and z are summed over a row and multiplied by ``1 / sqrt(K P)``.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
        """Return the rounded weight."""
        ctx.save_for_backward(weight, scale, zero)
        ctx.largest = largest
        rounded: Tensor = _fused(_weight_forward, weight)(weight, scale, zero, largest)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients of weight, scale and zero."""
        weight, scale, zero = ctx.saved_tensors
        backward = _fused(_weight_backward, weight)
        to_weight, to_scale, to_zero = backward(gradients[0], weight, scale, zero, ctx.largest)
        factor = 1 / math.sqrt(weight.shape[1] * ctx.largest)
        return to_weight, to_scale * factor, to_zero * factor, None


class RoundedTokens(torch.autograd.Function):
    """``s (clamp(round(x / s) + z, 0, P) - z)`` of rows with scales and whole zeros ``(M, 1)``, in the dtype of x.

    Gradients to (x, s) are (1, round(x / s) - x / s) inside and (0, q - z) outside; the zero has none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, largest: int) -> Tensor:
        """Return the rounded rows."""
        ctx.save_for_backward(x, scale, zero)
        ctx.largest = largest
        rounded: Tensor = _fused(_tokens_forward, x)(x, scale, zero, largest)
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of rows and scales."""
        x, scale, zero = ctx.saved_tensors
        to_x, to_scale = _fused(_tokens_backward, x)(gradients[0], x, scale, zero, ctx.largest)
        return to_x, to_scale, None, None


def round_weight(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return a weight ``(N, K)`` rounded to ``bits``, with the gradients of :class:`RoundedWeight`."""
    return RoundedWeight.apply(weight, scale, zero, 2**bits - 1)


def round_tokens(x: Tensor, clip: Tensor, bits: int, symmetric: bool = False, range_gradients: bool = False) -> Tensor:
    """Return rows ``(M, K)`` rounded between ``c_lo min x`` and ``c_hi max x``, both widened to hold 0.

    Args:
        clip: factors of the rows' samples, ``(B, 2)``, B a divisor of M.
        range_gradients: let gradients of the range run into each row's least and largest number.
    """
    ends = x if range_gradients else x.detach()
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    low, high = _ends(ends) if range_gradients else _fused(_ends, ends)(ends)
    rows = clip.repeat_interleave(x.shape[0] // len(clip), dim=0) if len(clip) > 1 else clip
    lo, hi = (low.to(wide) * rows[:, :1]).clamp_max(0), (high.to(wide) * rows[:, 1:]).clamp_min(0)
    scale, zero = token_scales(lo, hi, bits, symmetric)
    return RoundedTokens.apply(x, scale, zero, 2**bits - 1)
