"""Scales and zeros of weights by a search over clipped ranges, their codes, and the best matrix of a low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.codes import LEAST_SCALE

SHRINKS = tuple(round(1 - step / 100, 2) for step in range(80))  # 1.00 to 0.21 of a row's range
POWER = 2.4  # of the error that the search minimises
INITIAL_CLIP = 0.95  # of the range of activations
_CHUNK, _CHUNK_OF_CPU = 1 << 22, 1 << 18  # elements searched at a time: a CPU's stay in its caches


@torch.no_grad()
def search_scales(weight: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Return scale and zero of each row of ``(N, K)``, fp32 ``(N, 1)``, of the least ``sum |W_q - W|^2.4``.

    Both ends of a row's range, which holds 0, are shrunk together: ``s = (max - min) / P`` and ``z = -round(min / s)``
    in 0..P. The symmetric form shrinks the largest magnitude: ``s = max|W| / (2^(b-1) - 1)``, ``z = 2^(b-1)``.
    """
    chunk = _CHUNK_OF_CPU if weight.device.type == "cpu" else _CHUNK
    rows = max(1, chunk // max(1, weight.shape[1]))
    parts = [_search(part.float(), bits, symmetric) for part in weight.detach().split(rows)]
    return torch.cat([scale for scale, _ in parts]), torch.cat([zero for _, zero in parts])


def _search(weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    largest, half = 2**bits - 1, 2 ** (bits - 1)
    low = weight.amin(dim=1, keepdim=True).clamp_max(0)
    high = weight.amax(dim=1, keepdim=True).clamp_min(0)
    best_scale, best_zero = torch.ones_like(low), torch.zeros_like(low)
    best = torch.full_like(low, float("inf"))
    for shrink in SHRINKS:
        if symmetric:
            scale = (torch.maximum(-low, high) * shrink / (half - 1 or 1)).clamp_min(LEAST_SCALE)
            zero = torch.full_like(scale, half)
        else:
            scale = ((high - low) * shrink / largest).clamp_min(LEAST_SCALE)
            zero = (-(low * shrink / scale).round()).clamp(0, largest)
        codes = codes_of(weight, scale, zero, bits)
        logs = codes.sub_(zero).mul_(scale).sub_(weight).abs_().log2_()  # a power takes a CPU four times as long
        error = logs.mul_(POWER).exp2_().sum(dim=1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def codes_of(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Return the codes ``clamp(round(W / s + z), 0, 2^b - 1)``, as fp32 whole numbers."""
    return (weight.float() / scale + zero).round().clamp(0, 2**bits - 1)


@torch.no_grad()
def best_of_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return ``L = U_r sqrt(S_r)`` and ``R = sqrt(S_r) V_r^T`` of the singular values of a matrix, fp32.

    They are those of the eigenvectors of its smaller product with itself in fp64, many times faster on a GPU than its
    singular value decomposition.
    """
    wide = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()  # which has no fp64
    is_tall = wide.shape[0] >= wide.shape[1]
    tall = wide if is_tall else wide.t()
    squares, vectors = torch.linalg.eigh(tall.t() @ tall)
    top = vectors[:, -rank:].flip(1)  # (columns of tall, r)
    root = squares[-rank:].flip(0).clamp_min(1e-40).pow(0.25)
    one, other = (tall @ top) / root, top * root
    left, right = (one, other.t()) if is_tall else (other, one.t())
    return left.float().contiguous().to(matrix.device), right.float().contiguous().to(matrix.device)
