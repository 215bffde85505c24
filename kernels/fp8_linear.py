"""Product of float8 matrices scaled by row and column: the library's kernel where there is one, a formula elsewhere.

``y = (a w^T) * (s_a s_w^T) + b`` for e4m3fn codes ``a (M, K)`` and ``w (N, K)`` and scales in fp32. The tensor cores
keep fewer than 24 bits of the sums, and fewer still with fast accumulation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.dispatch import Mode, is_fused
from diffaccel.kernels.int8_linear import check_operands, scaled


def fp8_linear_reference(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return ``(a w^T) * (s_a s_w^T) + b`` with sums in fp32, on any device."""
    return scaled(a.float() @ w.float().t(), a_scale, w_scale, bias, dtype)


def fp8_linear(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    mode: Mode = "auto",
    fast_accumulation: bool = True,
) -> Tensor:
    """Multiply float8 codes by rows and columns: ``(a w^T) * (s_a s_w^T) + b``.

    Args:
        a: float8_e4m3fn ``(M, K)``.
        a_scale: fp32 ``(M, 1)``.
        w: float8_e4m3fn ``(N, K)``.
        w_scale: fp32 ``(N, 1)``.
        bias: ``(N,)`` or None.
        dtype: of the result. The library's kernel computes bf16, which is cast where another dtype is asked for.
        mode: "auto" is ``torch._scaled_mm`` on a CUDA device of capability 8.9 or more, where K and N are multiples of
            16, and the reference elsewhere.
        fast_accumulation: keep sums in the tensor cores' own accumulators: faster, less exact at a large K.

    Raises:
        ValueError: for shapes that do not fit together, an unknown mode, and "fused" where it cannot run.
        TypeError: for codes that are not float8_e4m3fn or scales that are not fp32.
    """
    check_operands(a, a_scale, w, w_scale, bias, torch.float8_e4m3fn)
    is_aligned = not (a.shape[1] % 16 or w.shape[0] % 16)
    if mode == "fused" and not is_aligned:
        raise ValueError(
            f"fp8_linear runs fused only where K and N are multiples of 16; got K = {a.shape[1]}, N = {w.shape[0]}."
        )
    if a.shape[0] == 0 or not (is_aligned and is_fused(mode, a.device, "fp8_linear", (8, 9))):
        return fp8_linear_reference(a, a_scale, w, w_scale, bias, dtype)
    inside = bias if bias is None or bias.dtype == torch.bfloat16 else None
    y = torch._scaled_mm(
        a,
        w.t(),
        scale_a=a_scale,
        scale_b=w_scale.t(),
        bias=inside,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast_accumulation,
    )
    if inside is None and bias is not None:
        y = y + bias
    return y.to(dtype)
