"""Heads of attention from projections: RMS norm of q and k, rotation, and two streams joined, in one pass.

For a head x of q or k, with weight w: ``x / sqrt(mean(x^2) + eps) * w``, rounded to the dtype of x, then
``x cos + rotate(x) sin`` in fp32 for pairs of neighbours, rounded again. The results have torch's own bits: the kernel
adds squares in the order of torch's norm where a trial on the device shows that, and else torch's norm runs before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.dispatch import Mode, is_fused, on_device_of

Projections = tuple[Tensor, Tensor, Tensor]
Norms = tuple[Tensor, Tensor]
_AGREES: dict[tuple[torch.device, torch.dtype, int], bool] = {}
_TRIAL_ROWS, _TRIAL_SIZES = 1 << 17, (1.0, 0.01, 30.0, 1e-4)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return ``x cos + rotate(x) sin`` of ``x (B, T, H, Dh)`` and cos, sin ``(T, Dh)``, fp32, by torch's operations."""
    cos, sin = (part[None, :, None, :].to(x.device) for part in rotary)
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def joint_heads_reference(
    streams: Sequence[Projections], norms: Sequence[Norms], rotary: tuple[Tensor, Tensor] | None, head: int,
    epsilon: float,
) -> Projections:  # fmt: skip
    """Return what :func:`joint_heads` does by torch's operations, on any device."""
    normed = [_normed(stream, weights, head, epsilon) for stream, weights in zip(streams, norms, strict=True)]
    q, k, v = normed[0] if len(normed) == 1 else (torch.cat(parts, dim=1) for parts in zip(*normed, strict=True))
    return (q, k, v) if rotary is None else (rotate(q, rotary), rotate(k, rotary), v)


def joint_heads(
    streams: Sequence[Projections],
    norms: Sequence[Norms],
    rotary: tuple[Tensor, Tensor] | None,
    head: int,
    epsilon: float,
    mode: Mode = "auto",
) -> Projections:
    """Return q, k and v ``(B, T, H, Dh)`` of one or two streams, joined along T.

    Args:
        streams: q, k, v ``(B, T_i, H Dh)`` of each.
        norms: weights ``(Dh,)`` of the norms of q and k, of each.
        rotary: cos and sin ``(T, Dh)``, fp32; None for no rotation.
        head: Dh.
        epsilon: of the norms.
        mode: "auto" is the kernel on a CUDA device and torch's operations elsewhere; both give the same bits.

    Raises:
        ValueError: for an unknown mode, and for "fused" on a device or with operands that the kernel does not know.
    """
    q = streams[-1][0]
    if is_fused(mode, q.device, "joint_heads"):
        if _is_known(streams, norms, rotary, head):
            return _fused(streams, norms, rotary, head, epsilon)
        if mode == "fused":
            raise ValueError(f"joint_heads runs fused for one dtype, and heads of 8 to 128 numbers; got {head}.")
    return joint_heads_reference(streams, norms, rotary, head, epsilon)


def _fused(
    streams: Sequence[Projections], norms: Sequence[Norms], rotary: tuple[Tensor, Tensor] | None, head: int,
    epsilon: float,
) -> Projections:  # fmt: skip
    from diffaccel.kernels.triton_rope import launch_rope

    q = streams[-1][0]
    with on_device_of(q):
        if agrees(q.device, q.dtype, head):
            return launch_rope(streams, norms, rotary, head, epsilon)
        normed = [_normed(stream, weights, head, epsilon) for stream, weights in zip(streams, norms, strict=True)]
        flat = [(q.flatten(2), k.flatten(2), v.flatten(2)) for q, k, v in normed]
        return launch_rope([_evenly_strided(*stream) for stream in flat], None, rotary, head, epsilon)


def _normed(stream: Projections, weights: Norms, head: int, epsilon: float) -> Projections:
    q, k, v = (x.unflatten(-1, (-1, head)) for x in stream)
    return F.rms_norm(q, (head,), weights[0], epsilon), F.rms_norm(k, (head,), weights[1], epsilon), v


def _evenly_strided(q: Tensor, k: Tensor, v: Tensor) -> Projections:
    return (q, k, v) if q.stride() == k.stride() == v.stride() else (q.contiguous(), k.contiguous(), v.contiguous())


def _is_known(
    streams: Sequence[Projections], norms: Sequence[Norms], rotary: tuple[Tensor, Tensor] | None, head: int
) -> bool:
    """Return whether the kernel knows such operands."""
    from diffaccel.kernels.triton_rope import is_rotatable

    q = streams[-1][0]
    if not (is_rotatable(head) and q.dtype in (torch.bfloat16, torch.float16, torch.float32) and len(streams) <= 2):
        return False
    for stream, weights in zip(streams, norms, strict=True):
        first = stream[0]
        if any(x.stride() != first.stride() or x.shape != first.shape or x.ndim != 3 for x in stream):
            return False
        if first.stride(2) != 1 or first.shape[::2] != q.shape[::2]:
            return False
        if any(x.dtype != q.dtype or x.device != q.device for x in (*stream, *weights)):
            return False
        if any(weight.shape != (head,) or not weight.is_contiguous() for weight in weights):
            return False
    if rotary is None:
        return True
    total = sum(stream[0].shape[1] for stream in streams)
    return all(
        part.shape == (total, head) and part.dtype == torch.float32 and part.device == q.device and part.is_contiguous()
        for part in rotary
    )


def agrees(device: torch.device, dtype: torch.dtype, head: int) -> bool:
    """Return whether the kernel's norm has the bits of torch's on a device, which is tried once on random heads.

    While a CUDA graph is recorded nothing is tried: False, whose result has the same bits.
    """
    key = (device, dtype, head)
    if key not in _AGREES:
        if torch.cuda.is_current_stream_capturing():
            return False
        _AGREES[key] = all(_has_torch_bits(device, dtype, head, size) for size in _TRIAL_SIZES)
    return _AGREES[key]


def _has_torch_bits(device: torch.device, dtype: torch.dtype, head: int, size: float) -> bool:
    from diffaccel.kernels.triton_rope import launch_rope

    draw = torch.Generator(device).manual_seed(0)
    shape = (1, _TRIAL_ROWS * 128 // head // 8, 8 * head)
    q, k = (size * torch.randn(shape, generator=draw, dtype=torch.float32, device=device) for _ in range(2))
    weights = 1 + torch.randn((2, head), generator=draw, dtype=torch.float32, device=device)
    stream, norms = (q.to(dtype), k.to(dtype), k.to(dtype)), (weights[0].to(dtype), weights[1].to(dtype))
    ours = launch_rope([stream], [norms], None, head, 1e-6)
    return all(map(torch.equal, ours, _normed(stream, norms, head, 1e-6)))
