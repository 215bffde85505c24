"""Product of int8 matrices with exact int32 sums, scaled by row and column, with bias: one pass, one rounding.

``y = (a w^T) * (s_a s_w^T) + b`` for codes ``a (M, K)`` and ``w (N, K)``, scales ``s_a (M, 1)`` and ``s_w (N, 1)`` in
fp32. The sum of products is an exact int32, converted to fp32, scaled and shifted there, and rounded once to ``dtype``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from diffaccel.kernels.dispatch import Mode, is_direct, is_fused, on_device_of

LARGEST_K = 2**31 // 127**2  # 133,144: products that fit an int32 whatever the codes
_CHUNK = 1024  # products whose sum fp32 holds exactly: 1024 * 128^2 = 2^24


def int_matmul(a: Tensor, w: Tensor) -> Tensor:
    """Return ``a w^T`` in int32, exact, for int8 codes ``(M, K)`` and ``(N, K)``, on any device and at any shape.

    Parts of K are multiplied in fp32, which every library does fast: on a CPU ``torch._int_mm`` takes many times as
    long but for a few rows.
    """
    total = torch.zeros((a.shape[0], w.shape[0]), dtype=torch.int32, device=a.device)
    sums = torch.empty_like(total, dtype=torch.float32)
    for a_part, w_part in zip(a.split(_CHUNK, dim=1), w.split(_CHUNK, dim=1), strict=True):
        # autocast, which would round the sums, leaves products with a place for their result alone
        total += torch.mm(a_part.float(), w_part.float().t(), out=sums).to(torch.int32)
    return total


def int8_linear_reference(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``(a w^T) * (s_a s_w^T) + b``, on any device."""
    return scaled(int_matmul(a, w).float(), a_scale, w_scale, bias, dtype)


def scaled(sums: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return fp32 sums of codes times the scales of their rows and columns, plus the bias."""
    y = sums * (a_scale * w_scale.t())
    return (y if bias is None else y + bias.float()).to(dtype)


def int8_linear(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mode: Mode = "auto",
) -> Tensor:
    """Multiply int8 codes by rows and columns: ``(a w^T) * (s_a s_w^T) + b``.

    Args:
        a: int8 ``(M, K)``, with K up to 133,144.
        a_scale: fp32 ``(M, 1)``; NaN makes the row NaN.
        w: int8 ``(N, K)``, as ``nn.Linear`` stores its weight.
        w_scale: fp32 ``(N, 1)``.
        bias: ``(N,)`` or None.
        dtype: of the result.
        mode: "auto" is the kernel on a CUDA device, and the reference elsewhere.

    Raises:
        ValueError: for shapes that do not fit together, a K whose sums may overflow, and an unknown mode.
        TypeError: for codes that are not int8 or scales that are not fp32.
    """
    check_operands(a, a_scale, w, w_scale, bias, torch.int8)
    if a.shape[1] > LARGEST_K:
        raise ValueError(f"K is {a.shape[1]}: int32 sums are exact up to K = {LARGEST_K}. Split the layer.")
    runs_fused = is_fused(mode, a.device, "int8_linear")
    if mode == "reference":
        return int8_linear_reference(a, a_scale, w, w_scale, bias, dtype)
    if runs_fused and is_direct(a, a_scale, w, w_scale):
        return _launch(a, a_scale, w, w_scale, bias, dtype)
    return torch.ops.diffaccel.int8_linear(a, a_scale, w, w_scale, bias, dtype)


def check_operands(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, codes: torch.dtype
) -> None:
    """Raise for operands of a scaled product that do not fit together."""
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise ValueError(f"The codes must be (M, K) and (N, K); got {tuple(a.shape)} and {tuple(w.shape)}.")
    if a.dtype != codes or w.dtype != codes:
        raise TypeError(f"The codes must be {codes}; got {a.dtype} and {w.dtype}.")
    m, n = a.shape[0], w.shape[0]
    if a_scale.shape != (m, 1) or w_scale.shape != (n, 1):
        raise ValueError(
            f"The scales must be ({m}, 1) and ({n}, 1); got {tuple(a_scale.shape)} and {tuple(w_scale.shape)}."
        )
    if a_scale.dtype != torch.float32 or w_scale.dtype != torch.float32:
        raise TypeError(f"The scales must be float32; got {a_scale.dtype} and {w_scale.dtype}.")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"The bias must be ({n},); got {tuple(bias.shape)}.")


@torch.library.custom_op("diffaccel::int8_linear", mutates_args=())
def _int8_linear(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if not is_fused("auto", a.device, "int8_linear"):
        return int8_linear_reference(a, a_scale, w, w_scale, bias, dtype)
    return _launch(a, a_scale, w, w_scale, bias, dtype)


def _launch(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from diffaccel.kernels.triton_int8 import launch_int8_linear

    with on_device_of(a):
        return launch_int8_linear(a, a_scale, w, w_scale, bias, dtype)


@_int8_linear.register_fake
def _(a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], w.shape[0]), dtype=dtype)


@torch.utils.flop_counter.register_flop_formula(torch.ops.diffaccel.int8_linear)
def _flops(a_shape: Any, a_scale_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a_shape[0] * a_shape[1] * w_shape[0])
