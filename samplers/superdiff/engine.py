"""The superposition sampler: one trajectory, the log-density of its state under every component, and their mixing."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.gram import gram
from diffaccel.samplers.superdiff import composition, formulas, particles
from diffaccel.samplers.superdiff.components import Components
from diffaccel.samplers.superdiff.composition import Densities, Taken
from diffaccel.samplers.superdiff.geometry import Geometry, Move, combine
from diffaccel.samplers.superdiff.probes import Probes
from diffaccel.samplers.superdiff.trace import Trace
from diffaccel.samplers.superdiff.transitions import ReverseKernel
from diffaccel.session import Sampling, Session, Step


@dataclass(frozen=True, eq=False)
class ParticleTarget:
    """What particles are weighed for: a rule of the first ``columns`` log-densities, whose derivatives sum to total."""

    rule: formulas.MixRule
    total: float
    columns: int
    guidance: float

    def log_density(self, densities: Densities) -> Tensor:
        """Return the target's log-density, ``(R, B)``."""
        return self.rule(densities.log_density[..., : self.columns])[1] + self.total * densities.shared


@dataclass(eq=False)
class Superposition:
    """One call under one config: everything that a step needs beside its state.

    Attributes:
        x: the initial state of all particles, and after the run their last one.
        config: a SuperDiff; methods name no method's module, their own parts neither.
        rows: of the call, for each row of the state; None where they are the call's own.
        masks: ``(R, d)`` weights of every place in every region, or None for one region.
        kernels: of every step.
        rule: what the composition aims at, over the components alone; None for AND of the paper.
        total: sum of the rule's derivatives.
        target: what the particles' weights were for in the last step.
    """

    session: Session
    parts: Components
    config: Any
    x: Tensor
    rows: list[int] | None
    masks: Tensor | None
    sigmas: Tensor
    kernels: list[ReverseKernel]
    rule: formulas.MixRule | None
    total: float
    densities: Densities
    sizes: Tensor
    trace: Trace = field(default_factory=Trace)
    target: ParticleTarget | None = None

    @property
    def wide(self) -> torch.dtype:
        """The dtype of inner products and densities: fp64 where the device has it."""
        return self.densities.shared.dtype

    # -- a step --------------------------------------------------------------------------------------------------------

    def sample(self) -> Sampling:
        """Sample the whole trajectory."""
        x = self.x
        for index, (sigma, sigma_next) in enumerate(pairwise(self.sigmas)):
            x = yield from self._step(index, x, sigma, sigma_next)
        self.x = x
        if self.config.particles > 1:
            weights = self.densities.log_weights.reshape(-1, self.config.particles)
            x = x[particles.chosen(weights, particles.uniforms(self.session, len(weights), weights))]
        self.trace.finish(self)
        return x

    def _step(self, index: int, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Generator[Any, Any, Tensor]:
        kernel = self.kernels[index]
        stop = self.config.guidance_stop
        is_guided = stop >= 1 or index < math.ceil(round(stop * len(self.kernels), 6))
        scale = self.parts.guidance(sigma) if is_guided else 1.0
        with_null = self.parts.null is not None and (scale != 1 or self.config.negates)
        velocities = yield from self.velocities(x, sigma, with_null)
        is_random = self.config.eta > 0 and not kernel.is_last
        z = particles.noise(self.session, x, self.config.particles) if is_random else torch.zeros_like(x)
        base, others = velocities[0], velocities[1:]
        vectors = torch.stack([*others, z, x, base]).flatten(2)
        products = gram(vectors, len(others), self.masks)
        geometry = Geometry(
            products.to(self.wide), kernel, scale, self.config.counts_guided(self.parts), with_null, products.dtype
        )
        probes = Probes(self, geometry, vectors, x, sigma, sigma_next)
        taken = yield from self._move(index, geometry, probes)
        y = combine(taken.move, vectors, len(others), self.masks).reshape(x.shape)
        if self.config.eta == 0 and not others:
            y = x + (sigma_next - sigma) * base  # to the bit the step of Euler's method
        self.trace.add(self, geometry, taken)
        y = self._resample(y, kernel)
        if self.config.op == "mcmc" and not kernel.is_last:
            y = yield from probes.langevin(y)
        return (yield from self._finish(y, sigma_next))

    def velocities(self, x: Tensor, sigma: Tensor, with_null: bool) -> Generator[Any, Any, list[Tensor]]:
        """Ask for the velocity of every component, and of no prompt, in one list of requests."""
        requests = self.parts.requests(x, sigma, self.rows, with_null=with_null)
        preds = yield (requests[0] if len(requests) == 1 else requests)
        return self.parts.velocities([preds] if len(requests) == 1 else preds, x, sigma)

    def _finish(self, y: Tensor, sigma_next: Tensor) -> Generator[Any, Any, Tensor]:
        """Report a finished step; of particles the first of each picture is shown, and cannot be edited."""
        if self.config.particles == 1:
            return (yield Step(y, sigma_next))
        yield Step(y[:: self.config.particles], sigma_next)
        return y

    # -- the move ------------------------------------------------------------------------------------------------------

    def _move(self, index: int, geometry: Geometry, probes: Probes) -> Generator[Any, Any, Taken]:
        """Choose the move of a step, and bring densities and weights up to date."""
        if self.config.eta == 0:
            return (yield from self._flow(index, geometry, probes))
        before = self.densities.log_density
        active = before[..., : geometry.differences + 1]
        if self.rule is None:
            corrections = yield from probes.curvature(active)
            start = active if self.config.repair else torch.zeros_like(active)
            taken = composition.equalised(geometry, start, self.goals(index), corrections)
            self._track(geometry, taken.move, corrections)
            return taken
        rule, total = self._guided_rule(geometry), float(self.total_under(geometry))
        if self.config.particles > 1:
            self._retarget(geometry, rule, total)
        kappa, value = rule(active)
        is_switched = self.config.switches(geometry.guidance)
        move = self._drawn(geometry, self._switched(kappa, geometry) if is_switched else kappa, total)
        taken = Taken(move, kappa[..., : len(self.parts)] / geometry.guidance)
        if geometry.kernel.is_last:
            return taken
        if self.config.op == "fkc":
            self.densities.log_weights = self.densities.log_weights + composition.rate_weights(geometry, kappa, total)
        self._track(geometry, move, None)
        if self.config.particles > 1 and self.config.op != "fkc":
            after = rule(self.densities.log_density[..., : geometry.differences + 1])[1]
            change = composition.weight_change(geometry, move, value, after, total)
            self.densities.log_weights = self.densities.log_weights + change
        return taken

    def _retarget(self, geometry: Geometry, rule: formulas.MixRule, total: float) -> None:
        """Weigh the particles for a target that a change of guidance has changed since the last step."""
        target, densities = ParticleTarget(rule, total, geometry.differences + 1, geometry.guidance), self.densities
        if self.target is not None and self.target.guidance != target.guidance:
            change = target.log_density(densities) - self.target.log_density(densities)
            densities.log_weights = densities.log_weights + change.sum(0)
        self.target = target

    def _switched(self, kappa: Tensor, geometry: Geometry) -> Tensor:
        """Return the weights of one component of every row and region, drawn by the weights of all."""
        u = torch.stack([particles.uniforms(self.session, len(region), region) for region in kappa])
        return composition.switched(kappa, u, len(self.parts), geometry.guidance)

    def _drawn(self, geometry: Geometry, kappa: Tensor, total: float) -> Move:
        op = self.config.op
        if op == "fkc" and not geometry.kernel.is_last:
            return composition.summed(geometry, kappa, total)
        if op in ("product", "fkc", "mcmc") and abs(total - 1) > 1e-12:
            return composition.multiplied(geometry, kappa, total)
        return composition.mixed(geometry, kappa)

    def _flow(self, index: int, geometry: Geometry, probes: Probes) -> Generator[Any, Any, Taken]:
        """Choose the move without noise."""
        divergence = yield from probes.divergence()
        active = self.densities.log_density[..., : geometry.differences + 1]
        if self.rule is None:
            start = active if self.config.repair else torch.zeros_like(active)
            taken, kappa = composition.equalised_flow(geometry, start, self.goals(index), divergence)
        else:
            kappa, _ = self._guided_rule(geometry)(active)
            taken = Taken(composition.followed(geometry, kappa), kappa[..., : len(self.parts)] / geometry.guidance)
        if geometry.kernel.is_last:
            return taken
        change = composition.flow_change(geometry, kappa, divergence)
        self.densities.log_density = _added(self.densities.log_density, change)
        return taken

    def _track(self, geometry: Geometry, move: Move, corrections: Tensor | None) -> None:
        """Add what a stochastic move does to the log-densities."""
        if geometry.kernel.is_last:
            return
        point = geometry.point(move)
        change = geometry.log_kernels(point)
        change = change if corrections is None else change + corrections
        first = change[..., :1]  # all are told relative to the first component's
        self.densities.log_density = _added(self.densities.log_density, change - first)
        common = composition.common_change(geometry, move, point, self.sizes)
        self.densities.shared = self.densities.shared + common + first[..., 0]

    def _guided_rule(self, geometry: Geometry) -> formulas.MixRule:
        """Return the rule over all columns of a step, those of no prompt included."""
        if self.rule is None:
            raise DiffAccelError("AND has no target density.")
        if not geometry.has_null:
            return self.rule
        return formulas.guided(self.rule, self.total, geometry.guidance, self.config.negates)

    def exponents(self, guidance: float | None) -> list[float]:
        """Return the exponents of a product, those of no prompt included under guidance."""
        own = self.config.weights or (1.0,) * len(self.parts)
        return list(own) if guidance is None else [guidance * e for e in own] + [1 - guidance * sum(own)]

    def total_under(self, geometry: Geometry) -> float:
        """Return the sum of the mixing weights of a step; guidance makes it 1."""
        return 1.0 if geometry.has_null else self.total

    def goals(self, index: int) -> Tensor:
        """Return how far log-densities are to lie apart after a step of AND, ``(R, 1, M)``."""
        steps = max(sum(not kernel.is_last for kernel in self.kernels), 1)
        done = min(index + 1, steps) if self.config.repair else 1
        return self.trace.bias * (done / steps)

    def _resample(self, y: Tensor, kernel: ReverseKernel) -> Tensor:
        """Resample the particles of every picture whose weights have become too unequal."""
        count = self.config.particles
        if count == 1 or kernel.is_last:
            return y
        weights = self.densities.log_weights.reshape(-1, count)
        u = particles.uniforms(self.session, len(weights), weights)
        rows, kept = particles.resampled(weights, u, self.config.resample)
        densities = self.densities
        densities.log_weights = kept.flatten()
        densities.log_density, densities.shared = densities.log_density[:, rows], densities.shared[:, rows]
        return y[rows]


def _added(log_density: Tensor, change: Tensor) -> Tensor:
    """Add changes of the first columns; a column that a step leaves out stays."""
    return log_density + functional.pad(change, (0, log_density.shape[-1] - change.shape[-1]))
