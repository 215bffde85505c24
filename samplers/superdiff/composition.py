"""The rules of composition: how each operator moves the state, and what the move does to densities and weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffaccel.samplers.superdiff.geometry import Geometry, Move, project

NO_SIGNAL = 0.1  # of the next level's signal in the state: at less, all components have one density


@dataclass(eq=False)
class Densities:
    """What is tracked along the path, in fp64 where the device has it.

    Attributes:
        log_density: ``(R, B, M')``, each component's log-density relative to what is common to all.
        shared: ``(R, B)``, what is common.
        log_weights: ``(B,)``, of particles.
    """

    log_density: Tensor
    shared: Tensor
    log_weights: Tensor


@dataclass(frozen=True, eq=False)
class Taken:
    """A move, and what the record shows of it.

    Attributes:
        kappa: ``(R, B, M)``, the mixing weights.
        displacement: ``(R, B)``, length of the projection relative to the step's noise, or to its length without.
        agreement: ``(R, B)``, ``|v_0|^2`` over the smallest pivot: huge where components agree.
    """

    move: Move
    kappa: Tensor
    displacement: Tensor | None = None
    agreement: Tensor | None = None


def mixed(geometry: Geometry, kappa: Tensor) -> Move:
    """Return the stochastic move with mean ``sum_i kappa_i mu_i``, where kappa ``(R, B, M')`` sums to 1."""
    kernel = geometry.kernel
    noise = 0.0 if kernel.is_last else math.sqrt(kernel.variance)
    return Move(kernel.of_x, kernel.of_v, noise, kernel.of_v * kappa[..., 1:])


def switched(kappa: Tensor, u: Tensor, count: int, guidance: float) -> Tensor:
    """Return the weights of a step by one component alone, drawn by ``kappa``, ``(R, B, M')``.

    The kernel of a mixture of models is the mixture of their kernels, ``sum_i kappa_i N(y; mu_i, V)`` with the weights
    that the path so far gives them: a draw from it keeps the spread between the means, which their mean leaves out.

    Args:
        kappa: ``(R, B, M')``; the first ``count`` sum to the guidance, the others are of no prompt and stay.
        u: in [0, 1), ``(R, B)``.
    """
    totals = (kappa[..., :count] / guidance).cumsum(-1)
    index = torch.searchsorted(totals, u[..., None]).clamp(max=count - 1)
    picked = torch.zeros_like(kappa)
    picked[..., count:] = kappa[..., count:]
    return picked.scatter(-1, index, guidance)


def multiplied(geometry: Geometry, exponents: Tensor, total: float) -> Move:
    """Return the move by the product of the components' kernels to powers, a Gaussian that is normalised.

    ``prod_i N(y; mu_i, V)^beta_i N(x; (a/b) y, S2)^(1 - total)`` has the precision ``total/V + (1 - total) A`` with
    ``A = (a/b)^2 / S2``, finite also where the state holds no signal.

    Args:
        exponents: beta, ``(R, B, M')``.
        total: their sum.
    """
    kernel = geometry.kernel
    back = kernel.ratio / kernel.noising
    variance = 1 / (total / kernel.variance + (1 - total) * kernel.ratio * back)
    share = variance / kernel.variance
    noise = 0.0 if kernel.is_last else math.sqrt(variance)
    of_x = share * total * kernel.of_x + variance * (1 - total) * back
    return Move(of_x, share * total * kernel.of_v, noise, share * kernel.of_v * exponents[..., 1:])


def summed(geometry: Geometry, exponents: Tensor, total: float) -> Move:
    """Return the Euler-Maruyama move with the score ``sum_i beta_i s_i``."""
    kernel = geometry.kernel
    of_x = total * kernel.of_x + (1 - total) * kernel.drift
    return Move(of_x, total * kernel.of_v, math.sqrt(kernel.variance), kernel.of_v * exponents[..., 1:])


def equalised(geometry: Geometry, start: Tensor, goals: Tensor, corrections: Tensor) -> Taken:
    """Return AND: the averaged move, projected to where all log-densities differ by ``goals``.

    ``y = y0 + sum_j lam_j w D_j`` with ``D_j = mu_j - mu_0``, and ``lam`` from the linear system that makes
    ``L_j + dL_j(y) - goal_j`` equal for all j (arXiv 2412.17762, proposition 6, for any number of components).

    Args:
        start: ``(R, B, M')``, log-densities before the step; zero where only the increments are to be equal.
        goals: ``(R, 1, M)``, how far the log-densities are to lie apart after the step.
        corrections: ``(R, B, M')``, what is added to the log-densities beside the kernel's.
    """
    count = geometry.prompted + 1
    even = _even(geometry, start)
    base = mixed(geometry, even)
    if count == 1 or geometry.kernel.is_last:
        return Taken(base, torch.full_like(start[..., :count], 1 / count))
    reached = (start + geometry.log_kernels(geometry.point(base)) + corrections)[..., :count] - goals
    gaps = reached[..., 1:] - reached[..., :1]
    of_v, guidance, kernel = geometry.kernel.of_v, geometry.guidance, geometry.kernel
    between = geometry.between()
    scale = guidance * of_v * of_v / kernel.variance * (guidance if geometry.is_guided_density else 1.0)
    lam, pivot = project(scale * between, gaps, geometry.precision)
    return _projected(
        geometry, base, lam, guidance * of_v, pivot / abs(scale), (kernel.variance * geometry.gram[..., -3, -3]).sqrt()
    )


def _even(geometry: Geometry, like: Tensor) -> Tensor:
    """Return equal weights of all components under guidance, ``(R, B, M')``."""
    count = geometry.prompted + 1
    even = torch.full_like(like, geometry.guidance / count)
    if geometry.has_null:
        even[..., count:] = 1 - geometry.guidance
    return even


def _projected(geometry: Geometry, base: Move, lam: Tensor, scale: float, pivot: Tensor, unit: Tensor) -> Taken:
    """Return a move changed by ``scale lam_j`` of every difference between components; ``unit`` measures its length."""
    count = geometry.prompted + 1
    change = torch.zeros_like(base.differences)
    change[..., : geometry.prompted] = scale * lam
    move = Move(base.of_x, base.of_v, base.of_z, base.differences + change)
    kappa = torch.cat([1 / count - lam.sum(-1, keepdim=True), 1 / count + lam], -1)
    length = abs(scale) * geometry.apart(lam).clamp(min=0).sqrt()
    return Taken(move, kappa, length / unit.clamp(min=1e-30), geometry.gram[..., -1, -1] / pivot.clamp(min=1e-30))


# -- what a move does to densities -------------------------------------------------------------------------------------


def common_change(geometry: Geometry, move: Move, point: Tensor, size: Tensor | float) -> Tensor:
    """Return what :meth:`Geometry.log_kernels` leaves out of ``log N(y; mu_i, V) - log k(x|y)``, ``(R, B)``.

    Args:
        point: where the move leads.
        size: dimensions of every region, ``(R, 1)``.
    """
    kernel = geometry.kernel
    if kernel.is_euler:
        return _first_change(geometry, move, size)
    apart = geometry.square(point) / kernel.variance
    back = geometry.square(geometry.back(move)) / kernel.noising
    return 0.5 * (back - apart + size * (math.log(kernel.noising) - math.log(kernel.variance)))


def _first_change(geometry: Geometry, move: Move, size: Tensor | float) -> Tensor:
    """Return ``<dx, s> + (div f + <f - g^2 s / 2, s>) dt`` of the first component (arXiv 2412.17762, theorem 1)."""
    kernel, none = geometry.kernel, torch.zeros_like(move.differences)
    score = geometry.extended(none, (0.0, -kernel.eps_x / kernel.sigma, -kernel.eps_v / kernel.sigma))
    forward = 1 - kernel.drift  # f dt = forward x
    step = geometry.extended(move.differences, (move.of_z, move.of_x - 1 + forward, move.of_v))
    along = torch.einsum("rbi,rbij,rbj->rb", step - 0.5 * kernel.variance * score, geometry.gram, score)
    return along + size * forward


def weight_change(geometry: Geometry, move: Move, before: Tensor, after: Tensor, total: float) -> Tensor:
    """Return the change of a particle's log-weight, ``F' - F + (total - 1) log k - log K`` up to a constant, ``(B,)``.

    K is the Gaussian that drew the step, F the target's log-density of :mod:`~.formulas`, and ``total`` the sum of its
    derivatives (Feynman-Kac correctors, arXiv 2503.02819, in exact discrete form).

    Args:
        before, after: ``F`` of the log-densities before and after the step, ``(R, B)``.
    """
    kernel = geometry.kernel
    own = geometry.gram[..., -3, -3]  # |z|^2
    change = after - before - total * geometry.square(geometry.point(move)) / (2 * kernel.variance) + own / 2
    if total != 1:
        change = change + (total - 1) * geometry.square(geometry.back(move)) / (2 * kernel.noising)
    return change.sum(0)


def rate_weights(geometry: Geometry, exponents: Tensor, total: float) -> Tensor:
    """Return ``g^2 dt / 2 (|sum_i beta_i s_i|^2 - sum_i beta_i |s_i|^2)``, the published rate, ``(B,)``.

    Arises from the Fokker-Planck equation of the summed drift (arXiv 2503.02819, proposition for products).
    """
    kernel = geometry.kernel
    means = geometry.means[None, None].expand(*exponents.shape, -1).clone()
    means[..., -2] += kernel.of_x - kernel.drift
    means[..., -1] += kernel.of_v
    lengths = torch.einsum("rbmi,rbij,rbmj->rbm", means, geometry.gram, means)
    together = geometry.square((exponents[..., None] * means).sum(-2))
    return ((together - (exponents * lengths).sum(-1)) / (2 * kernel.variance)).sum(0)


# -- without noise -----------------------------------------------------------------------------------------------------


def followed(geometry: Geometry, kappa: Tensor) -> Move:
    """Return the move along the probability flow of the mixed velocity; kappa ``(R, B, M')`` sums to 1."""
    dt = geometry.kernel.dt
    return Move(1.0, -dt, 0.0, -dt * kappa[..., 1:])


def flow_change(geometry: Geometry, kappa: Tensor, divergence: Tensor) -> Tensor:
    """Return each component's change of log-density along the flow relative to the first's, ``(R, B, M')``.

    ``(dt / s) (<E_j, eps - eps_j - eps_0> + s div E_j)`` with the mixed noise eps (arXiv 2412.17762, proposition 5).

    Args:
        divergence: ``div E_j``, ``(R, B, M' - 1)``.
    """
    kernel, size = geometry.kernel, geometry.differences
    rows = geometry.gram[..., :size, :]
    towards = (rows[..., :size] * kappa[..., None, 1:]).sum(-1) * kernel.eps_v
    base = kernel.eps_x * rows[..., -2] + kernel.eps_v * rows[..., -1]
    own = kernel.eps_v * rows[..., :size].diagonal(dim1=-2, dim2=-1)
    change = kernel.dt / kernel.sigma * (towards - base - own + kernel.sigma * divergence)
    return torch.cat([torch.zeros_like(change[..., :1]), change], -1)


def equalised_flow(geometry: Geometry, start: Tensor, goals: Tensor, divergence: Tensor) -> tuple[Taken, Tensor]:
    """Return AND without noise, and its mixing weights ``(R, B, M')``, those of no prompt included."""
    count, kernel, guidance = geometry.prompted + 1, geometry.kernel, geometry.guidance
    even = _even(geometry, start)
    if count == 1 or kernel.is_last or kernel.ratio < NO_SIGNAL:
        return Taken(followed(geometry, even), torch.full_like(start[..., :count], 1 / count)), even
    reached = (start + flow_change(geometry, even, divergence))[..., :count] - goals
    scale = kernel.dt / kernel.sigma * kernel.eps_v * guidance
    lam, pivot = project(scale * geometry.between(), reached[..., 1:] - reached[..., :1], geometry.precision)
    unit = kernel.dt * geometry.gram[..., -1, -1].sqrt()
    taken = _projected(geometry, followed(geometry, even), lam, -kernel.dt * guidance, pivot / max(scale, 1e-30), unit)
    change = torch.zeros_like(even)
    change[..., 1:count] = guidance * lam
    change[..., 0] = -guidance * lam.sum(-1)
    return taken, even + change
