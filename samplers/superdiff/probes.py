"""Second derivatives of log-densities by finite differences: further predictions a small step away, nothing else.

They work with any attention kernel, in any precision that resolves the step, and on any network.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffaccel.samplers.superdiff import particles
from diffaccel.samplers.superdiff.geometry import Geometry
from diffaccel.session import bcast

if TYPE_CHECKING:
    from diffaccel.samplers.superdiff.engine import Superposition


INDEPENDENT = 1e-5  # the least squared share of a vector outside the span of those before it: what fp32 sums resolve


def orthonormal(gram: Tensor) -> Tensor:
    """Return coefficients ``(B, n, n)`` by which n vectors give an orthonormal basis of their span, row by row.

    The row of a vector within the span of those before it is zero: with two components, or where components lie on one
    line, no Cholesky factor exists.

    Args:
        gram: inner products of the vectors, ``(B, n, n)``.
    """
    rows: list[Tensor] = []
    for i in range(gram.shape[-1]):
        row = torch.zeros_like(gram[:, 0])
        row[:, i] = 1
        for _ in range(2):  # once more for what rounding left
            for done in rows:
                row = row - (done * (gram @ row[..., None])[..., 0]).sum(1, keepdim=True) * done
        squared = (row * (gram @ row[..., None])[..., 0]).sum(1, keepdim=True)
        is_new = squared > INDEPENDENT * gram[:, i, i, None]
        rows.append(torch.where(is_new, row * squared.clamp(min=1e-30).rsqrt(), torch.zeros_like(row)))
    return torch.stack(rows, 1)


@dataclass(frozen=True, eq=False)
class Probes:
    """The further predictions of one step.

    Attributes:
        vectors: the step's, ``(n + 3, B, d)``.
    """

    run: Superposition
    geometry: Geometry
    vectors: Tensor
    x: Tensor
    sigma: Tensor
    sigma_next: Tensor

    def curvature(self, like: Tensor) -> Generator[Any, Any, Tensor]:
        """Return the change of every log-density that AND's projection leaves out, ``(R, B, M')``.

        ``-(V/2) sum_l q_l' H_i q_l`` over an orthonormal basis q of the differences, H_i the Hessian of ``log q_i``,
        relative to the first component's: the projection cancels the noise along q, so that the path has no quadratic
        variation there.
        """
        geometry, size = self.geometry, self.geometry.prompted
        change = torch.zeros_like(like)
        if not self.run.config.curvature or not size or geometry.kernel.is_last:
            return change
        apart = self.vectors[:size] - self.vectors[-1]
        basis = torch.einsum("bln,nbd->lbd", orthonormal(geometry.between()[0]).to(apart.dtype), apart)
        scale = geometry.kernel.variance * geometry.kernel.eps_v / (2 * geometry.kernel.sigma)
        for direction in basis:
            bent = yield from self._along(direction)
            change[..., 1 : size + 1] += scale * bent[..., :size]
        return change

    def divergence(self) -> Generator[Any, Any, Tensor]:
        """Return ``div (v_j - v_0)`` along one common random sign vector, ``(R, B, M' - 1)``."""
        geometry, config = self.geometry, self.run.config
        zero = geometry.gram.new_zeros(*geometry.gram.shape[:2], geometry.differences)
        if config.op == "average" or not geometry.prompted or geometry.kernel.is_last:
            return zero
        signs = particles.noise(self.run.session, self.x, 1).flatten(1).sign()
        bent = yield from self._along(signs)
        zero[..., : bent.shape[-1]] = bent
        return zero

    def _along(self, direction: Tensor) -> Generator[Any, Any, Tensor]:
        """Return ``<q, (E_j(x + h q) - E_j(x)) / h>`` of the differences between components, ``(R, B, M - 1)``."""
        size = self.geometry.prompted
        length = direction.norm(dim=1, keepdim=True).clamp(min=1e-30)
        spacing = self.run.config.probe * self.geometry.kernel.sigma * direction.shape[1] ** 0.5 / length
        moved = self.x + (spacing * direction).reshape(self.x.shape)
        velocities = yield from self.run.velocities(moved, self.sigma, False)
        base = velocities[0].flatten(1)
        here = self.vectors[:size] - self.vectors[-1]
        columns = []
        for j in range(size):
            slope = (velocities[j + 1].flatten(1) - base - here[j]) / spacing
            columns.append(self._inner(direction, slope))
        return torch.stack(columns, -1)

    def _inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Return inner products in every region, ``(R, B)``."""
        product, masks = (a * b).to(self.run.wide), self.run.masks
        return product.sum(1)[None] if masks is None else torch.einsum("bd,rd->rb", product, masks.to(product))

    def langevin(self, y: Tensor) -> Generator[Any, Any, Tensor]:
        """Move by unadjusted Langevin steps that leave the product at the reached level as it is.

        ``x <- x + h S + sqrt(2 h) z`` with the summed score S (arXiv 2506.08894) and ``h = 2 (snr s)^2``: what ``2 (snr
        |z| / |S|)^2`` is on average, but the same for all states, without which the product would not be left.
        """
        run = self.run
        level = bcast(self.sigma_next, y)
        path = run.session.path
        for _ in range(run.config.langevin):
            scale = run.parts.guidance(self.sigma_next) if self.geometry.has_null else 1.0  # guidance ends by step
            with_null = run.parts.null is not None and scale != 1
            velocities = yield from run.velocities(y, self.sigma_next, with_null)
            exponents = run.exponents(scale if with_null else None)
            score = sum(
                (
                    -beta * path.eps(y, v, level) / path.sigma(level)
                    for beta, v in zip(exponents, velocities, strict=True)
                ),
                torch.zeros_like(y),
            )
            z = particles.noise(run.session, y, run.config.particles)
            h = 2 * (run.config.snr * float(path.sigma(float(self.sigma_next)))) ** 2
            y = y + h * score + (2 * h) ** 0.5 * z
        return y
