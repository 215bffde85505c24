"""GELU of the hidden layer, beside tokens that join it, as one tensor or as 8-bit codes in one pass.

In FLUX's single blocks the last product reads attention and hidden layer side by side, ``[a, gelu(h)]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.codes import Codes
from diffaccel.kernels.dispatch import Mode, is_fused, on_device_of
from diffaccel.kernels.quantize_rows import quantize_rows

_WIDEST = 32768
_AGREES: dict[tuple[torch.device, torch.dtype], bool] = {}


def gelu_joined(beside: Tensor, x: Tensor) -> Tensor:
    """Return ``[beside, gelu(x)]`` along the last dimension, GELU by its tanh formula, with torch's own bits.

    On a CUDA device GELU writes into its place beside the other, where a trial shows that its bits stay.
    """
    if x.device.type != "cuda" or beside.dtype != x.dtype or not _writes_in_place(x.device, x.dtype):
        return torch.cat([beside, F.gelu(x, approximate="tanh")], dim=-1)
    return _joined_in_place(beside, x)


def _joined_in_place(beside: Tensor, x: Tensor) -> Tensor:
    width = beside.shape[-1]
    joined = torch.empty((*x.shape[:-1], width + x.shape[-1]), dtype=x.dtype, device=x.device)
    joined[..., :width].copy_(beside)
    torch.ops.aten.gelu.out(x, approximate="tanh", out=joined[..., width:])
    return joined


def _writes_in_place(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether GELU has the same bits between others as alone, which is tried once on all 16-bit patterns."""
    key = (device, dtype)
    if key not in _AGREES:
        if torch.cuda.is_current_stream_capturing():
            return False
        patterns = torch.arange(1 << 16, dtype=torch.int32, device=device)
        x = patterns.to(torch.int16).view(dtype) if dtype.itemsize == 2 else patterns.to(dtype) / 4096 - 8
        x = x.nan_to_num(0.0).view(256, 256)
        joined = torch.cat([x, F.gelu(x, approximate="tanh")], dim=-1)
        _AGREES[key] = torch.equal(_joined_in_place(x, x), joined)
    return _AGREES[key]


def gelu_codes(
    beside: Tensor | None, x: Tensor, codes: Codes, approximate: str, mode: Mode = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``[beside, gelu(x)]``, see :func:`diffaccel.kernels.quantize_rows.quantize_rows`.

    Args:
        beside: ``(B, T, K0)`` of the dtype of x, or None.
        x: ``(B, T, K)``.
        approximate: "tanh" or "none", torch's names of the two formulas of GELU.
        mode: "auto" is the kernel on a CUDA device and torch's operations elsewhere.

    Returns:
        Codes ``(B * T, K0 + K)`` and scales ``(B * T, 1)`` in fp32.
    """
    width = x.shape[-1] + (0 if beside is None else beside.shape[-1])
    least = (8, 9) if codes == "fp8" else (8, 0)
    is_alike = beside is None or (beside.dtype == x.dtype and beside.shape[:-1] == x.shape[:-1])
    if width <= _WIDEST and is_alike and x.dtype != torch.float64 and is_fused(mode, x.device, "gelu_codes", least):
        from diffaccel.kernels.triton_activate import launch_gelu_codes

        with on_device_of(x):
            rows = None if beside is None else beside.reshape(-1, beside.shape[-1])
            return launch_gelu_codes(rows, x.reshape(-1, x.shape[-1]), codes, approximate == "tanh")
    y = F.gelu(x, approximate=approximate)
    if beside is not None:
        y = torch.cat([beside, y], dim=-1)
    return quantize_rows(y.reshape(-1, width), codes, mode)
