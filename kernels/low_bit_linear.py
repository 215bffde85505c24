"""Product of matrices of centred codes with zeros, exact in its sums, on float8 or int8 tensor cores.

For activations ``s_a (a - z_a)`` and weights ``s_w (w - z_w)`` with whole codes a ``(M, K)`` and w ``(N, K)``:

    y = s_a s_w [sum a w - z_a sum w + z_w (K z_a - sum a)] + b

Sums of codes are stored with the weight and come with the activations. Centred codes of 4 bits lie in -8..7: in float8
every product of two is exact, and so are partial sums of 128 of them, at most 2^13, in the tensor cores' short
accumulators; these are added to fp32 every 128 (fast accumulation would lose whole codes). int8 sums are exact int32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor

from diffaccel.kernels.codes import DTYPES, Codes
from diffaccel.kernels.dispatch import Mode, capability, has_triton, is_fused, on_device_of
from diffaccel.kernels.int8_linear import LARGEST_K, int_matmul

EXACT_FLOAT8_BITS = 4  # 128 products of codes of 4 bits fit the tensor cores' accumulators


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a graph is traced for one device
def best_codes(device: torch.device, weight_bits: int, act_bits: int, mode: Mode = "auto") -> Codes:
    """Return the dtype in which codes are multiplied: float8 on Hopper, where sums of 4 bits are exact, else int8.

    Elsewhere the compiler has no means to take sums out of the tensor cores in time, and int8 is as fast.
    """
    is_exact = max(weight_bits, act_bits) <= EXACT_FLOAT8_BITS
    is_hopper = (9, 0) <= capability(device) < (10, 0)
    return "fp8" if is_exact and is_hopper and mode != "reference" and has_triton() else "int8"


def low_bit_linear_reference(
    a: Tensor, a_stats: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, w_sum: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the product by exact sums, on any device."""
    sums = int_matmul(a.float().to(torch.int8), w.float().to(torch.int8)).float()  # (M, N)
    a_scale, a_zero, a_sum = a_stats.unsqueeze(-1).unbind(1)  # (M, 1) each
    rest = a.shape[1] * a_zero - a_sum
    y = (sums - a_zero * w_sum.t() + w_zero.t() * rest) * (a_scale * w_scale.t())
    return (y if bias is None else y + bias.float()).to(dtype)


def low_bit_linear(
    a: Tensor, a_stats: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, w_sum: Tensor,
    bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16, mode: Mode = "auto",
) -> Tensor:  # fmt: skip
    """Multiply centred codes by centred codes.

    Args:
        a: int8 or float8_e4m3fn ``(M, K)``.
        a_stats: scale, centred zero and sum of codes of each row, fp32 ``(M, 3)``; a scale of NaN makes the row NaN.
        w: of the dtype of ``a``, ``(N, K)``.
        w_scale, w_zero, w_sum: the same of each row of the weight, fp32 ``(N, 1)``.
        bias: ``(N,)`` or None.
        dtype: of the result.

    Raises:
        ValueError: for shapes that do not fit together, and a K whose sums may overflow.
        TypeError: for dtypes that do not fit.
    """
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise ValueError(f"The codes must be (M, K) and (N, K); got {tuple(a.shape)} and {tuple(w.shape)}.")
    if a.dtype != w.dtype or a.dtype not in DTYPES.values():
        raise TypeError(f"The codes must both be int8 or float8_e4m3fn; got {a.dtype} and {w.dtype}.")
    stats = (a_stats, w_scale, w_zero, w_sum)
    shapes = ((a.shape[0], 3), *[(w.shape[0], 1)] * 3)
    if any(tensor.shape != shape for tensor, shape in zip(stats, shapes, strict=True)):
        raise ValueError(
            f"Scales, zeros and sums must be ({a.shape[0]}, 3), and three of ({w.shape[0]}, 1); got "
            f"{', '.join(str(tuple(tensor.shape)) for tensor in stats)}."
        )
    if any(tensor.dtype != torch.float32 for tensor in stats):
        raise TypeError(f"Scales, zeros and sums must be float32; got {[str(tensor.dtype) for tensor in stats]}.")
    if bias is not None and bias.shape != (w.shape[0],):
        raise ValueError(f"The bias must be ({w.shape[0]},); got {tuple(bias.shape)}.")
    if a.shape[1] > LARGEST_K:
        raise ValueError(f"K is {a.shape[1]}: int32 sums are exact up to K = {LARGEST_K}. Split the layer.")
    is_fused(mode, a.device, "low_bit_linear", (8, 9) if a.dtype == torch.float8_e4m3fn else (8, 0))
    if mode == "reference":
        return low_bit_linear_reference(a, a_stats, w, w_scale, w_zero, w_sum, bias, dtype)
    return torch.ops.diffaccel.low_bit_linear(a, a_stats, w, w_scale, w_zero, w_sum, bias, dtype)


@torch.library.custom_op("diffaccel::low_bit_linear", mutates_args=())
def _low_bit_linear(
    a: Tensor, a_stats: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, w_sum: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    if not is_fused("auto", a.device, "low_bit_linear", (8, 9) if a.dtype == torch.float8_e4m3fn else (8, 0)):
        return low_bit_linear_reference(a, a_stats, w, w_scale, w_zero, w_sum, bias, dtype)
    from diffaccel.kernels.triton_low_bit import launch_low_bit_linear

    with on_device_of(a):
        return launch_low_bit_linear(a, a_stats, w, (w_scale, w_zero, w_sum), bias, dtype)


@_low_bit_linear.register_fake
def _(
    a: Tensor, a_stats: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, w_sum: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return a.new_empty((a.shape[0], w.shape[0]), dtype=dtype)


@torch.utils.flop_counter.register_flop_formula(torch.ops.diffaccel.low_bit_linear)
def _flops(a_shape: Any, a_stats_shape: Any, w_shape: Any, *args: Any, **kwargs: Any) -> int:
    return int(2 * a_shape[0] * a_shape[1] * w_shape[0])
