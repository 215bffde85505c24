"""One step in the coordinates of its vectors: every density and every projection is a small form of inner products.

Vectors of a step, in this order: ``E_j = v_j - v_0`` of the components ``j = 1 ... M-1``, ``U = v_u - v_0`` of no
prompt where it is predicted, then the noise z, the state x and the base ``v_0``. A point ``p`` of the step is written
relative to the first component's mean, ``p - mu_0 = sum_i c_i u_i``, so that what is common to all components cancels
before anything is multiplied. Tensors are (R, B, ...): regions of the picture, then rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from diffaccel.samplers.superdiff.transitions import ReverseKernel

RIDGE = {torch.float32: 1e-6, torch.float64: 1e-13}  # relative to the mean eigenvalue


@dataclass(frozen=True, eq=False)
class Move:
    """The next state ``y = of_x x + of_v v_0 + of_z z + sum_j c_j u_j``.

    Attributes:
        differences: ``c``, ``(R, B, n)`` for the n differences.
    """

    of_x: float
    of_v: float
    of_z: float
    differences: Tensor


@dataclass(frozen=True, eq=False)
class Geometry:
    """Inner products of one step's vectors, and the points that the components' means are.

    Attributes:
        gram: ``(R, B, n + 3, n + 3)`` of n differences, noise, state, base.
        kernel: the step's.
        guidance: scale of classifier-free guidance between the last difference and the others; 1 for none.
        is_guided_density: whether the guided prediction counts as a component's own model.
        has_null: whether the last difference is that of no prompt.
        precision: dtype in which the products were summed.
    """

    gram: Tensor
    kernel: ReverseKernel
    guidance: float = 1.0
    is_guided_density: bool = False
    has_null: bool = False
    precision: torch.dtype = torch.float32

    @property
    def differences(self) -> int:
        """Number of differences."""
        return self.gram.shape[-1] - 3

    @property
    def prompted(self) -> int:
        """Number of differences between components, without that of no prompt."""
        return self.differences - self.has_null

    @cached_property
    def means(self) -> Tensor:
        """The components' means ``mu_j - mu_0``, ``(M', n + 3)``; the last is of no prompt where it is there."""
        points = self.kernel.of_v * _units(self.differences, self.gram.dtype, self.gram.device)
        if self.is_guided_density and self.has_null:
            null = points[-1:].clone()
            points = self.guidance * points + (1 - self.guidance) * null
            points[-1:] = null
        return points

    def point(self, move: Move) -> Tensor:
        """Return ``y - mu_0``, ``(R, B, n + 3)``."""
        rest = (move.of_z, move.of_x - self.kernel.of_x, move.of_v - self.kernel.of_v)
        return self.extended(move.differences, rest)

    def back(self, move: Move) -> Tensor:
        """Return ``x - (a/b) y``, ``(R, B, n + 3)``."""
        ratio = self.kernel.ratio
        rest = (-ratio * move.of_z, 1 - ratio * move.of_x, -ratio * move.of_v)
        return self.extended(-ratio * move.differences, rest)

    def extended(self, differences: Tensor, rest: tuple[float, float, float]) -> Tensor:
        """Return ``(R, B, n + 3)`` coefficients from those of the differences, and of noise, state and base."""
        shape = self.gram.shape[:3]
        ends = [differences.new_full((shape[0], shape[1], 1), value) for value in rest]
        return torch.cat([differences.expand(shape[0], shape[1], -1), *ends], -1)

    def square(self, point: Tensor) -> Tensor:
        """Return ``|p|^2``, ``(R, B)``."""
        return _form(self.gram, point)

    def log_kernels(self, point: Tensor) -> Tensor:
        """Return ``log N(y; mu_j, V) - log N(y; mu_0, V)`` without guided densities, ``(R, B, M')``.

        In any case ``|y - mu_0|^2 / (2 V)``, common to all components, is left out.
        """
        products, halves = self._of_means
        return (point.unsqueeze(-1) * products).sum(-2) - halves

    @cached_property
    def _of_means(self) -> tuple[Tensor, Tensor]:
        """Products ``(R, B, n + 3, M')`` of all vectors with the means, and half of the means' squares, both over V."""
        columns = self.means.T
        products = (self.gram @ columns) / self.kernel.variance
        return products, 0.5 * (columns * products).sum(-2)

    def between(self) -> Tensor:
        """Return the Gram matrix of the differences between components, ``(R, B, M - 1, M - 1)``."""
        return self.gram[..., : self.prompted, : self.prompted]

    def apart(self, coefficients: Tensor) -> Tensor:
        """Return ``|sum_j c_j (v_j - v_0)|^2`` of ``(R, B, M - 1)`` coefficients, ``(R, B)``."""
        return _form(self.between(), coefficients)


@lru_cache(maxsize=64)
def _units(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the coefficients of 0 and of every difference, ``(n + 1, n + 3)``; nobody writes into them."""
    rows = torch.zeros(size + 1, size + 3, dtype=dtype, device=device)
    rows.diagonal(-1).fill_(1)
    return rows


def _form(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return the quadratic form ``v' A v``, ``(R, B)``; products of matrices cost the host twice the time."""
    return (matrix * vector.unsqueeze(-1) * vector.unsqueeze(-2)).sum((-2, -1))


def project(matrix: Tensor, gaps: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Solve ``matrix lam = -gaps`` for every region and row, well defined where components agree.

    Args:
        matrix: ``(R, B, k, k)``, positive semidefinite.
        gaps: ``(R, B, k)``.
        precision: dtype in which inner products were summed, which decides the ridge.

    Returns:
        ``lam`` and the smallest squared pivot of the factorisation, ``(R, B, k)`` and ``(R, B)``.
    """
    size, tiny = matrix.shape[-1], torch.finfo(torch.float32).tiny
    if size == 1:
        pivot = (1 + RIDGE[precision]) * matrix.squeeze(-1) + tiny
        return gaps / -pivot, pivot.squeeze(-1)
    ridge = RIDGE[precision] / size * matrix.diagonal(dim1=-2, dim2=-1).sum(-1) + tiny
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    factor, _ = torch.linalg.cholesky_ex(matrix + ridge[..., None, None] * identity, check_errors=False)
    solution = torch.cholesky_solve(-gaps[..., None], factor)[..., 0]
    pivot = factor.diagonal(dim1=-2, dim2=-1).amin(-1).square()
    return solution, pivot


def combine(move: Move, vectors: Tensor, differences: int, masks: Tensor | None) -> Tensor:
    """Return the next state ``(B, d)`` of a move, from the step's vectors ``(n + 3, B, d)``.

    Args:
        masks: ``(R, d)``, which sum to 1 at every place; None for one region.
    """
    base, x, z = vectors[-1], vectors[-2], vectors[-3]
    y = move.of_x * x + move.of_v * base
    if move.of_z:
        y = y + move.of_z * z
    if not differences:
        return y
    apart = vectors[:differences] - base
    coefficients = move.differences.to(y.dtype)
    if masks is None:
        return y + (coefficients[0].T.unsqueeze(-1) * apart).sum(0)
    return y + torch.einsum("rbn,nbd,rd->bd", coefficients, apart, masks.to(y.dtype))
