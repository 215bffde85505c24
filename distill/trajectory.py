"""A run of consistency distillation along trajectories that the teacher draws from noise (arXiv 2404.13686).

Levels ``t_0 > t_1 > ... > t_N = 0`` lie on an even grid, of which ``k`` segments have their edges. With the student's
jump ``f(x, t -> e)`` to the edge ``e`` of the segment of ``t``,

    loss = huber(f(x_n, t_n -> e) - constant(f_average(x_{n+1}, t_{n+1} -> e))),      f(x, e -> e) = x

where ``x_{n+1}`` is one guided step of the teacher from ``x_n``. Points are not noised pictures, of which there are
none, but those of whole trajectories: a round of ``N`` turns draws one trajectory a row, and each row then learns at
its ``N`` points in an order of its own. So a teacher's step is made once for every point that is learnt at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.distill.drawing import coefficients, generate, guided, jump
from diffaccel.distill.learner import learner
from diffaccel.distill.learning import LearningRun, decay_of
from diffaccel.distill.segments import Segments
from diffaccel.distill.teacher import Teacher
from diffaccel.modules.weights_hash import weights_hash
from diffaccel.processes import Processes
from diffaccel.training.loop import step_seed
from diffaccel.training.steps import backward

_METER_SEED = 7919


class WithWeights(nn.Module):
    """A network that is called with other weights than its own, by name."""

    def __init__(self, network: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.called = (network, weights)  # in a tuple: neither a part nor a parameter of this module

    def forward(self, *inputs: Any, **named: Any) -> Any:
        network, weights = self.called
        return torch.func.functional_call(network, weights, inputs, named)


class TrajectoryRun(LearningRun):
    """One run; :meth:`run` makes its steps.

    Args:
        begin: network that the student begins as; the teacher's by default.
        folder, device, dtype, tell: as those of every ``LearningRun``.

    Attributes:
        generator: the network that learns to jump; :attr:`average` has what is exported.
    """

    config: Segments

    def __init__(
        self,
        teacher: Teacher,
        config: Segments,
        folder: str | Path,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        processes: Processes | None = None,
        begin: nn.Module | None = None,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        generator = learner(begin or teacher.network)
        super().__init__(
            teacher, config, folder, {"generator": generator}, {"generator": (config.lr, config.momentum)},
            {"average": decay_of(config), "target": config.target_decay}, seed=seed, device=device, dtype=dtype,
            processes=processes, begins="" if begin is None else weights_hash(begin), tell=tell,
        )  # fmt: skip
        self.target = WithWeights(generator, self.averages["target"].state())
        self.levels = torch.tensor(config.levels, dtype=torch.float32, device="cpu")
        self._round: tuple[int, Tensor, Tensor, int] | None = None
        self._fixed: tuple[Tensor, Tensor] | None = None

    def turn(self) -> None:
        """Make one turn: every row learns at one point of its trajectory."""
        points, order, group = self._trajectories(self.step // self.config.grid)
        place = order[:, self.step % self.config.grid]
        with self.autocast():
            loss, distance = self.loss(points, place, group, self.config.segments_at(self.step))
        backward(loss)
        self._update("generator", self.generator)
        for average in self.averages.values():
            average.update()
        self._note({"loss": loss.detach(), "distance": distance})

    def loss(self, points: Tensor, place: Tensor, group: int, segments: int) -> tuple[Tensor, Tensor]:
        """Return the mean pseudo-Huber distance of jumps, and their root mean square a coordinate.

        Args:
            points: ``(N + 1, B, C, H, W)`` of trajectories.
            place: ``(B,)`` numbers of the points that are jumped from, on the CPU.
        """
        length = self.config.grid // segments
        edge = (place // length + 1) * length
        rows = torch.arange(len(place), device="cpu")
        x, following = points[place, rows], points[place + 1, rows]
        sigma, to = self.levels[place], self.levels[edge]
        there = place + 1 == edge
        arrived = there.to(x.device).view(-1, *[1] * (x.ndim - 1))
        with torch.no_grad():
            near = torch.where(there, sigma, self.levels[place + 1])  # no network is asked at level 0
            goal = jump(self.teacher, self.teacher.ask(self.target, following, near, group), following, near, to)
            goal = torch.where(arrived, following, goal)
        own = jump(self.teacher, self.teacher.ask(self.generator, x, sigma, group), x, sigma, to)
        error = (own - goal).flatten(1)
        c = self.config.c
        square = error.square().sum(1) + c * c
        # the root has no slope at 0, where c = 0 and both jumps agree
        distance = torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0) - c
        return distance.mean(), error.detach().square().mean().sqrt()

    @torch.no_grad()
    def _trajectories(self, number: int) -> tuple[Tensor, Tensor, int]:
        """Return points ``(N + 1, B, C, H, W)``, the order ``(B, N)`` of each row, and the conditions of a round.

        They depend on (seed, round) alone, so that a run that goes on inside of a round draws them again.
        """
        if self._round is None or self._round[0] != number:
            config, rank, size = self.config, self.processes.rank, self.processes.size
            rows = slice(rank * config.batch // size, (rank + 1) * config.batch // size)
            random = self._random.manual_seed(step_seed(self.seed, number))
            shape = (config.batch, *self.teacher.shape)
            z = torch.randn(shape, generator=random, device="cpu", dtype=torch.float32)[rows].to(self.device)
            order = torch.rand(config.batch, config.grid, generator=random, device="cpu", dtype=torch.float32)
            groups = -(-self.teacher.groups // size)
            group = int(torch.randint(groups, (1,), generator=random, device="cpu")) * size + rank
            self._round = (number, self.trajectory(z, group), order[rows].argsort(1), group)
        _, points, order, group = self._round
        return points, order, group

    @torch.no_grad()
    def trajectory(self, z: Tensor, group: int) -> Tensor:
        """Return all points ``(N + 1, B, C, H, W)`` of the teacher's guided trajectories from noise ``z``."""
        levels = [level.expand(len(z)) for level in self.levels]
        x = z if self.config.start == "unit" else coefficients(self.teacher, levels[0], z)[1] * z
        points = [x]
        with self.autocast():
            for sigma, to in itertools.pairwise(levels):
                x = jump(self.teacher, guided(self.teacher, x, sigma, group).float(), x, sigma, to)
                points.append(x)
        return torch.stack(points)

    @torch.no_grad()
    def meter(self) -> dict[str, float]:
        """Return ``trajectory_error``: the root mean square of drawings less the ends of the teacher's trajectories.

        The noise is fixed and the meter's own, and the student draws in its last number of calls.
        """
        rank, size = self.processes.rank, self.processes.size
        if self._fixed is None:
            random = torch.Generator("cpu").manual_seed(_METER_SEED + rank)
            shape = (self.config.batch // size, *self.teacher.shape)
            z = torch.randn(shape, generator=random, device="cpu", dtype=torch.float32).to(self.device)
            self._fixed = (z, self.trajectory(z, rank)[-1])
        z, ends = self._fixed
        with self.autocast():
            drawn = generate(self.teacher, self.generator, z, rank, self.config)
        error = drawn.float() - ends
        return {"trajectory_error": round(float(error.square().mean().sqrt()), 6)}
