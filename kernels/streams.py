"""Steps of a transformer block on its streams of tokens: gated sums, and norms that are modulated, as one pass each.

A stream is ``x (B, T, D)`` with vectors ``(B, D)``. The results have torch's own bits, since every operation rounds to
the dtype of the tokens: the kernels do the same, and the norm alone is torch's. Quantized to codes, or ``folded``, the
norm is part of the pass too; its sums are then added in another order, so that a result may differ by one rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.kernels.codes import Codes
from diffaccel.kernels.dispatch import Mode, is_fused, on_device_of
from diffaccel.kernels.quantize_rows import quantize_rows

Stream = tuple[Tensor, Tensor, Tensor]
_WIDEST = 16384  # numbers of a row that one program holds in registers


def gated_sums(streams: Sequence[Stream], mode: Mode = "auto") -> list[Tensor]:
    """Return ``x + gate * y`` of each stream ``(y, gate, x)``, at most two of them.

    Args:
        streams: y and x ``(B, T, D)``, gate ``(B, D)``, of one dtype on one device for the kernel.
        mode: "auto" is the kernel on a CUDA device and torch's operations elsewhere; both give the same bits.
    """
    if _is_alike(streams, mode):
        from diffaccel.kernels.triton_streams import launch_affine

        with on_device_of(streams[0][0]):
            return launch_affine(streams, is_gate=True)
    return [x + gate.unsqueeze(1) * y for y, gate, x in streams]


def modulate(streams: Sequence[Stream], mode: Mode = "auto") -> list[Tensor]:
    """Return ``x * (1 + scale) + shift`` of each stream ``(x, scale, shift)``, as :func:`gated_sums` does."""
    if _is_alike(streams, mode):
        from diffaccel.kernels.triton_streams import launch_affine

        with on_device_of(streams[0][0]):
            return launch_affine(streams, is_gate=False)
    return [x * (1 + scale[:, None]) + shift[:, None] for x, scale, shift in streams]


def gated_sum_fp32(y: Tensor, gate: Tensor, x: Tensor, mode: Mode = "auto") -> Tensor:
    """Return ``x + gate * y`` in fp32, rounded once to the dtype of x: a stream whose vectors are fp32.

    Args:
        y, x: ``(B, T, D)``.
        gate: fp32 ``(B, D)``.
        mode: see :func:`gated_sums`.
    """
    if _is_wide([y, gate, x], mode):
        from diffaccel.kernels.triton_streams import launch_affine

        with on_device_of(x):
            return launch_affine([(y, gate, x)], is_gate=True, dtype=x.dtype)[0]
    return (x.float() + y.float() * gate.unsqueeze(1)).to(x.dtype)


def modulate_fp32(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype, mode: Mode = "auto") -> Tensor:
    """Return ``x * (1 + scale) + shift`` in fp32, rounded once to ``dtype``; scale and shift are fp32 ``(B, D)``."""
    if _is_wide([x, scale, shift], mode):
        from diffaccel.kernels.triton_streams import launch_affine

        with on_device_of(x):
            return launch_affine([(x, scale, shift)], is_gate=False, dtype=dtype)[0]
    return (x.float() * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).to(dtype)


def norm_modulate(
    streams: Sequence[Stream],
    epsilon: float,
    gated: Sequence[tuple[Tensor, Tensor]] | None = None,
    folded: bool = False,
    mode: Mode = "auto",
) -> tuple[list[Tensor], list[Tensor]]:
    """Return ``norm(x) * (1 + scale) + shift`` of each stream ``(x, scale, shift)``, with the norm of a layer norm.

    Args:
        streams: one or two.
        epsilon: of the norm, which has no weight.
        gated: ``(y, gate)`` of each stream: x becomes ``x + gate * y`` before.
        folded: one pass without roundings in between, on a CUDA device: faster, and not equal to the bit.
        mode: see :func:`gated_sums`.

    Returns:
        The sums (the streams' own x without ``gated``), and the results.
    """
    if folded and _is_alike(streams, mode, gated):
        sums, results, _ = _in_one_pass(streams, gated, epsilon, None, rounds=False)
        return sums or [x for x, _, _ in streams], results
    xs = [x for x, _, _ in streams]
    if gated is not None:
        xs = gated_sums([(y, gate, x) for (y, gate), x in zip(gated, xs, strict=True)], mode)
    vectors = [(scale, shift) for _, scale, shift in streams]
    normed = _layer_norms(xs, epsilon)
    return xs, modulate([(x, *both) for x, both in zip(normed, vectors, strict=True)], mode)


def norm_modulate_codes(
    streams: Sequence[Stream],
    epsilon: float,
    codes: Codes,
    gated: Sequence[tuple[Tensor, Tensor]] | None = None,
    mode: Mode = "auto",
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return the sums of :func:`norm_modulate`, and its results quantized row by row.

    Returns:
        The sums; and for each stream codes ``(B * T, D)`` and scales ``(B * T, 1)`` in fp32.
    """
    if _is_alike(streams, mode, gated, (8, 9) if codes == "fp8" else (8, 0)):
        sums, results, scales = _in_one_pass(streams, gated, epsilon, codes, rounds=True)
        pairs = [(q.flatten(0, 1), scale.flatten(0, 1)) for q, scale in zip(results, scales, strict=True)]
        return sums or [x for x, _, _ in streams], pairs
    sums, outputs = norm_modulate(streams, epsilon, gated, mode=mode)
    return sums, [quantize_rows(output.flatten(0, 1), codes, mode) for output in outputs]


def _in_one_pass(
    streams: Sequence[Stream], gated: Sequence[tuple[Tensor, Tensor]] | None, epsilon: float, codes: str | None,
    rounds: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    from diffaccel.kernels.triton_streams import launch_norm

    with on_device_of(streams[0][0]):
        return launch_norm(streams, gated, epsilon, codes, rounds)


def _layer_norms(xs: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """Return torch's layer norm of each; streams that lie one behind the other in memory take one call."""
    width = xs[0].shape[-1]
    if len(xs) == 2 and (rows := adjacent_rows(*xs)) is not None:
        normed = F.layer_norm(rows, (width,), None, None, epsilon)
        parts = normed.split_with_sizes([x.numel() // width for x in xs])
        return [part.view(x.shape) for part, x in zip(parts, xs, strict=True)]
    return [F.layer_norm(x, (width,), None, None, epsilon) for x in xs]


def adjacent_rows(first: Tensor, second: Tensor) -> Tensor | None:
    """Return two streams ``(B, T, D)`` as one ``(rows, D)``, where the second follows the first in memory, or None."""
    width = first.shape[-1]
    is_behind = (
        first.dtype == second.dtype
        and first.is_contiguous()
        and second.is_contiguous()
        and second.data_ptr() == first.data_ptr() + first.numel() * first.element_size()
        and second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )
    if not is_behind:
        return None
    return first.as_strided(((first.numel() + second.numel()) // width, width), (width, 1))


def joined_tokens(first: Tensor, second: Tensor) -> Tensor:
    """Return two streams ``(B, T, D)`` as one along T; without a copy where they are parts of one in memory."""
    batch, length, width = first.shape
    total = length + second.shape[1]
    is_one = (
        (second.shape[0], second.shape[2], second.dtype) == (batch, width, first.dtype)
        and first.stride()[1:] == second.stride()[1:] == (width, 1)
        and (batch == 1 or first.stride(0) == second.stride(0) == total * width)
        and second.data_ptr() == first.data_ptr() + length * width * first.element_size()
        and second.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )
    if not is_one:
        return torch.cat([first, second], dim=1)
    return first.as_strided((batch, total, width), (total * width, width, 1))


def _is_wide(tensors: list[Tensor], mode: Mode) -> bool:
    """Return whether a kernel can run on a stream ``(B, T, D)`` and fp32 vectors ``(B, D)``."""
    x, factor = tensors[0], tensors[1]
    if not is_fused(mode, x.device, "a pass over a stream"):
        return False
    return factor.dtype == torch.float32 and all(
        tensor.device == x.device
        and tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and tensor.shape in (x.shape, (x.shape[0], x.shape[2]))
        for tensor in tensors
    )


def _is_alike(
    streams: Sequence[Stream], mode: Mode, gated: Sequence[tuple[Tensor, Tensor]] | None = None,
    least: tuple[int, int] = (8, 0),
) -> bool:  # fmt: skip
    """Return whether a kernel can run: a device that has it, and tensors of one dtype and of shapes that it knows.

    Raises:
        ValueError: for more than two streams, and for "fused" where no kernel can run.
    """
    if len(streams) not in (1, 2):
        raise ValueError(f"One or two streams can be computed in one pass; got {len(streams)}.")
    x = streams[-1][0]
    if not is_fused(mode, x.device, "a pass over streams", least):
        return False
    fits = x.ndim == 3 and x.shape[2] <= _WIDEST and x.dtype in (torch.bfloat16, torch.float16, torch.float32)
    fits = fits and all(
        tensor.dtype == x.dtype
        and tensor.device == x.device
        and tensor.shape in ((x.shape[0], group[0].shape[1], x.shape[2]), (x.shape[0], x.shape[2]))
        for group in (*streams, *(gated or ()))
        for tensor in group
    )
    if mode == "fused" and not fits:
        raise ValueError("Streams are computed in one pass where all have one dtype, one device, and shapes (B, T, D).")
    return fits
