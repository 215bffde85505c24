"""Test beds of inference-time search: scripted rewards without latents, and sessions without a pipeline.

A policy is a generator that sees rewards and keys alone, so :func:`play` can answer it from a script. On data known in
closed form :func:`found` runs a whole search, engine and scorer included, with a reward of clean latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any

import torch
from analytic import session
from torch import Tensor

from diffaccel.flow import LINEAR, VE_PATH, Path, Tabulated
from diffaccel.samplers.rewards import Reward
from diffaccel.samplers.search.chains import RunningChain, Search
from diffaccel.samplers.search.particles import Particle, Transition
from diffaccel.samplers.search.plan import SearchPlan
from diffaccel.samplers.search.transitions import Coefficients, cps
from diffaccel.schedules import Schedule
from diffaccel.session import Eval, Pred, Progress, Session, Step, bcast

Script = Callable[[Transition], float]
Velocity = Callable[[Tensor, Tensor], Tensor]


def plan(stages: int, tail: int = 0) -> SearchPlan:
    """``stages`` even levels with noise between them, then ``tail`` deterministic ones."""
    sigmas = [1 - k / (stages + tail) for k in range(stages + tail)]
    searched, rest = sigmas[:stages], [*sigmas[stages:], 0.0]
    kernels = [cps(LINEAR, s, t, t / 2) for s, t in pairwise(searched)]
    return SearchPlan(tuple(searched), tuple(kernels), tuple(rest), None, LINEAR, "t0")


def schedule(path: Path, sigmas: Sequence[float]) -> Schedule:
    """Return a schedule with these levels, rounded to float32; in VE coordinates that of a noise-prediction model."""
    falling, ve = torch.tensor(list(sigmas)), path is VE_PATH
    table = Tabulated(torch.linspace(0.9991, 0.0047, 1000)) if ve else None
    return Schedule(path, falling, falling[:-1] * 1000, "epsilon" if ve else "velocity", ve, 1000, table)


@dataclass
class Played:
    """What a policy did with scripted rewards: its search, and the moves of every chain in the order it asked."""

    search: Search
    moves: list[list[Transition]] = field(default_factory=list)
    came_by: dict[Particle, Transition] = field(default_factory=dict)

    def lineage(self, particle: Particle) -> list[Transition]:
        """The moves that led to a particle, the last one first."""
        moves = [self.came_by[particle]]
        while moves[-1].parent is not None:
            moves.append(self.came_by[moves[-1].parent])
        return moves

    def proposals(self, chain: int = 0) -> list[int]:
        """Children that a chain tried at each level but the first."""
        counts = [0] * (self.search.plan.stages - 1)
        for move in self.moves[chain]:
            if 0 < move.stage < self.search.plan.stages:
                counts[move.stage - 1] += 1
        return counts


def play(config: Any, budget: int, plan: SearchPlan, script: Script, keep: int = 0, **levels: int) -> Played:
    """Run a method's chains one after the other; ``script`` says the reward of each scored move."""
    search = Search(0, "", 0, plan, budget, keep, **levels)
    played = Played(search)
    for number, chain in enumerate(config.chains(search)):
        running, asked = RunningChain(search, number, chain), []
        running.advance(None)
        while running.transitions:
            particles = [Particle.from_transition(move) for move in running.transitions]
            for move, particle in zip(running.transitions, particles, strict=True):
                search.charge(move)
                played.came_by[particle] = move
                particle.reward = script(move) if move.score else float("nan")
                search.observe(particle)
            asked += running.transitions
            running.advance(particles)
        played.moves.append(asked)
    return played


def gaussian_moments(
    plan: SearchPlan, mean: float, std: float, begin: tuple[float, float] = (0.0, 1.0)
) -> list[tuple[float, float]]:
    """Mean and variance at every searched level of a flow's plan, from those at the first, for data ``N(mean, std^2)``:
    the velocity there is ``-mean + slope (x - alpha mean)``."""
    found = [begin]
    for sigma, kernel in zip(plan.sigmas, plan.kernels, strict=False):
        found.append(gaussian_move(kernel, sigma, mean, std, found[-1]))
    return found


def gaussian_move(
    kernel: Coefficients, sigma: float, mean: float, std: float, at: tuple[float, float]
) -> tuple[float, float]:
    """Mean and variance after one move from ``sigma`` on the linear path."""
    alpha = 1 - sigma
    slope = (sigma - alpha * std**2) / (alpha**2 * std**2 + sigma**2)
    factor = kernel.a + kernel.b * slope
    moved = factor * (at[0] - alpha * mean) + kernel.a * alpha * mean - kernel.b * mean
    return moved, factor**2 * at[1] + kernel.c**2


def latent_reward(function: Callable[[Tensor], Any], **about: Any) -> Reward:
    """Return a reward of clean latents ``(b, C, H, W)``."""
    return Reward(name="closed form", function=lambda x0, prompts: function(x0), **{"input": "latents", **about})


@dataclass
class Found:
    """What a search came to."""

    x: Tensor
    report: dict[str, Any]
    evals: list[Eval]
    resumed: dict[str, Any] | None = None

    @property
    def pictures(self) -> list[dict[str, Any]]:
        return self.report["pictures"]

    @property
    def decisions(self) -> list[list[dict[str, Any]]]:
        """Of every picture, without what was charged when."""
        return [[{k: v for k, v in line.items() if k != "nfe"} for line in p["decisions"]] for p in self.pictures]


def stand_in(
    x: Tensor, sigmas: Tensor, path: Path = LINEAR, prompts: Sequence[str] = (), folder: FilePath | None = None,
    seed: int = 0,
) -> Session:  # fmt: skip
    """Return a session without a pipeline, with prompts, one generator a row, and pixels that are the first channel."""
    made = session(x, sigmas, path, [torch.Generator().manual_seed(seed + row) for row in range(len(x))])
    made.pipe = SimpleNamespace(config=SimpleNamespace())
    made.conds.append(SimpleNamespace(arguments={"prompt": list(prompts) or [""] * len(x)}))  # type: ignore[arg-type]
    made.family = SimpleNamespace(decode=lambda pipe, x0, arguments: x0[:, :1].expand(-1, 3, -1, -1))  # type: ignore[assignment]
    made.folder = folder
    return made


def found(config: Any, here: Session, velocity: Velocity, stop: Callable[[int], bool] = lambda done: False) -> Found:
    """Run a search to its end; ``stop`` is asked, with the predictions so far, whether the user interrupts."""
    sampling, reply, evals = config.sample(here), None, []
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration as end:
            return Found(end.value, here.report["search"], evals, here.report.get("resumed"))
        if isinstance(event, Progress):
            reply = stop(event.done)
        elif isinstance(event, Step):
            reply = event.x
        else:
            evals.append(event)
            sigma = bcast(event.sigma, event.x)
            reply = Pred(here.path, event.x, sigma, velocity(event.x, sigma))
