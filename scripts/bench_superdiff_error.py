"""Measure what a superposition's steps miss, where densities are known: this package's kernel against the paper's.

    OMP_NUM_THREADS=1 python -m scripts.bench_superdiff_error --kind cpu --out docs/results

Two mixtures of Gaussians stand for two models: their scores, their densities at every noise level and draws of both
are exact, so an error is one of steps alone. OR: the error of the tracked log-density of the likelier model (root of
the mean square, nats), that of the mixing weight which follows from it (mean), and the energy distance of the samples
to exact draws of the mixture. AND: how far the two log-densities of a sample lie apart (mean, nats). The reference is
the published sampler, Euler-Maruyama (arXiv 2412.17762), at 600 steps; ratios to it have 95 % intervals over samples,
which begin at the same noise. Levels: the variance-preserving path; those of Stable Diffusion's Euler scheduler, which
the published code uses; and a flow path, from 0.999 for Euler-Maruyama. "Equal at" is the number of steps at which the
error would be the reference's, since errors fall as the root of the steps. "Within modes": ``data_std`` is not the
default but the standard deviation within a mode; "mean": a step of ``or`` is the mean of the components, as the paper's
is, in place of one of them. What is finished is kept: the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from diffaccel import flow, record
from diffaccel.eval.uncertainty.influence import influence_interval
from diffaccel.eval.uncertainty.intervals import Interval
from diffaccel.files import write_json
from diffaccel.samplers import SuperDiff
from diffaccel.schedules import Schedule
from diffaccel.session import Eval, Pred, Session, Step, bcast
from scripts.earlier import earlier
from scripts.ends import ends, ends_text

PAPER = 600  # steps of the reference
PATHS = ("vp", "sd", "flow")
NOTHING = 1e-12  # an error below it is one of rounding, and has no ratio
LEAST_WEIGHT = 1e-3  # errors of a weight below it decide nothing


@dataclass(frozen=True, eq=False)
class Modes:
    """A model known in closed form: ``mean_k N(m_k, std^2 I)`` of means ``(K, d)``."""

    means: Tensor
    std: float

    def _apart(self, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x - a m_k``, ``(B, K, d)``, and the variance of a coordinate."""
        return x[:, None] - a * self.means, a * a * self.std**2 + s * s

    def velocity(self, path: flow.Path, x: Tensor, t: Tensor) -> Tensor:
        """Return the exact velocity of states ``(B, d)`` at a time."""
        a, s = (torch.as_tensor(f(t), dtype=torch.float64, device=x.device) for f in (path.alpha, path.sigma))
        apart, variance = self._apart(x, a, s)
        share = (-apart.square().sum(2) / (2 * variance)).softmax(1)[..., None]
        x0 = (share * (self.means + a * self.std**2 / variance * apart)).sum(1)
        return path.velocity(x0, (share * (s / variance * apart)).sum(1), t)

    def log_density(self, path: flow.Path, x: Tensor, t: float) -> Tensor:
        """Return ``log q_t(x)`` of states ``(B, d)``."""
        a, s = (torch.as_tensor(f(t), dtype=torch.float64, device=x.device) for f in (path.alpha, path.sigma))
        apart, variance = self._apart(x, a, s)
        exponent = -apart.square().sum(2) / (2 * variance)
        return exponent.logsumexp(1) - math.log(len(self.means)) - x.shape[1] / 2 * torch.log(2 * math.pi * variance)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw data, ``(count, d)``."""
        modes = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[modes] + self.std * noise


def beds() -> dict[str, tuple[Modes, Modes]]:
    """Return the pairs of models by name."""
    flat = [[(-1.5, y), (1.5, y)] for y in (1.0, -1.0)]
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 4, 16, generator=generator, dtype=torch.float64)
    first, second = (torch.tensor(means, dtype=torch.float64) for means in flat)
    near = torch.tensor([(-1.0, -0.6), (1.5, -0.2)], dtype=torch.float64)
    return {
        "2-D, apart": (Modes(first, 0.3), Modes(second, 0.3)),
        "2-D, overlapping": (Modes(0.5 * first, 0.4), Modes(near, 0.6)),
        "16-D": (Modes(wide[0], 0.3), Modes(wide[1], 0.5)),
    }


def within_modes(models: tuple[Modes, Modes]) -> float:
    """Return the standard deviation of a coordinate within a mode, of both models' modes together."""
    return math.sqrt(sum(model.std**2 for model in models) / len(models))


def levels(name: str, steps: int, *, euler: bool) -> tuple[flow.Path, Tensor]:
    """Return a path and ``steps + 1`` falling times on it, the last of little noise."""
    if name == "sd":
        scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        scheduler.set_timesteps(steps + 1)
        return flow.VE_PATH, scheduler.sigmas[:-1].double()
    path, last = (flow.VP(), 1e-3) if name == "vp" else (flow.LINEAR, 0.005)
    first = 0.999 if name == "flow" and euler else 1.0
    return path, torch.linspace(first, last, steps + 1, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Sampled:
    """Samples at the last level, and what was tracked of them.

    Attributes:
        x: ``(B, d)``.
        tracked: each model's log-density as it was tracked, ``(B, 2)``.
        true: as it is.
        predictions: of a model, a sample.
    """

    x: Tensor
    tracked: Tensor
    true: Tensor
    predictions: float


def sample(
    config: SuperDiff, models: tuple[Modes, Modes], path: flow.Path, times: Tensor, rows: int, seed: int
) -> Sampled:
    """Draw samples of a config; those of one seed begin at the same noise."""
    generator = torch.Generator().manual_seed(seed)
    dim = models[0].means.shape[1]
    x = torch.randn(rows, dim, 1, 1, generator=generator, dtype=torch.float64) * float(path.sigma(float(times[0])))
    schedule = Schedule(path, times, times[:-1] * 1000, "velocity", False, 1000)
    sessions = [_session(x, schedule, generator) for _ in models]
    sessions[0].partners.append(sessions[1])
    sampling, reply, asked = config.sample(sessions[0]), None, 0
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration as end:
            x = end.value.flatten(1)
            break
        if isinstance(event, Step):
            x, reply = event.x, event.x
            continue
        requests = event if isinstance(event, list) else [event]
        asked += sum(len(request.x) for request in requests)
        reply = [_answer(models[request.at is sessions[1]], path, request) for request in requests]
    report = sessions[0].report["superdiff"]
    tracked = torch.tensor(report["log_density"][-1], dtype=torch.float64)[0]
    tracked = tracked + torch.tensor(report["common"], dtype=torch.float64)[0][:, None]
    true = torch.stack([model.log_density(path, x, float(times[-1])) for model in models], 1)
    return Sampled(x, tracked, true, asked / rows)


def _session(x: Tensor, schedule: Schedule, generator: torch.Generator) -> Session:
    bare = Session(
        pipe=None, family=None, scheduler=None, conds=[], latents=x, timesteps=schedule.timesteps, step_arguments={},  # type: ignore[arg-type]
        read_schedule=schedule, dtype=x.dtype, height=1, width=1, generator=generator, reopen=None,  # type: ignore[arg-type]
    )  # fmt: skip
    bare.__dict__["x"] = x  # set directly: there is no family that knows the layout of latents
    return bare


def _answer(model: Modes, path: flow.Path, request: Eval) -> Pred:
    sigma = bcast(request.sigma, request.x)
    velocity = model.velocity(path, request.x.flatten(1), request.sigma.double().flatten()[0])
    return Pred(path, request.x, sigma, velocity.reshape(request.x.shape))


@dataclass(frozen=True, kw_only=True)
class Way:
    """A sampler of a row: its rule, its options, its steps."""

    name: str
    config: SuperDiff
    steps: int


def ways(std: float, paper: int, ours: int) -> dict[str, list[Way]]:
    """Return the ways by operator, the reference first.

    Args:
        std: of the data within a mode.
        paper: steps of the reference.
        ours: of the others.
    """
    published = {op: SuperDiff.paper(op=op, first_sigma=0.0) for op in ("or", "and")}
    either = [
        Way(name="paper", config=published["or"], steps=paper),
        Way(name="paper", config=published["or"], steps=ours),
        Way(name="matched", config=SuperDiff(op="or"), steps=ours),
        Way(name="matched, mean", config=SuperDiff(op="or", switch="never"), steps=ours),
        Way(name="matched, within modes", config=SuperDiff(op="or", data_std=std), steps=ours),
    ]
    both = [
        Way(name="paper", config=published["and"], steps=paper),
        Way(name="paper", config=published["and"], steps=ours),
        Way(name="matched", config=SuperDiff(), steps=ours),
        Way(name="matched, curvature", config=SuperDiff(curvature=True, probe=1e-5), steps=ours),
    ]
    return {"or": either, "and": both}


def errors(op: str, made: Sampled) -> dict[str, Tensor]:
    """Return the errors of every sample, ``(B,)``; "density" is squared."""
    if op == "and":
        return {"apart": (made.true[:, 0] - made.true[:, 1]).abs()}
    missed = (made.tracked - made.true).gather(1, made.true.argmax(1, keepdim=True))[:, 0]
    weight = (made.tracked.softmax(1) - made.true.softmax(1))[:, 0].abs()
    return {"density": missed.square(), "weight": weight}


def ratio_of_means(a: Tensor, b: Tensor, power: float = 1.0) -> Interval:
    """Return ``(mean(a) / mean(b)) ** power`` of errors of paired samples, with the interval of its logarithm."""
    value = float((a.mean() / b.mean()).log()) * power

    def influences(rows: Tensor) -> Tensor:
        first, second = a[rows], b[rows]
        return power * ((first / first.mean() - 1) - (second / second.mean() - 1))

    log = influence_interval(value, influences, len(a), held="none")
    return Interval(math.exp(log.value), math.exp(log.low), math.exp(log.high), method=log.method, null=1.0)


def energy(x: Tensor, data: Tensor) -> tuple[float, Callable[[Tensor], Tensor]]:
    """Return the energy distance of samples and draws, and the influences of rows of the samples."""
    within = float(torch.cdist(data, data).sum()) / (len(data) * (len(data) - 1))

    def parts(rows: Tensor) -> tuple[Tensor, Tensor]:
        chosen = x[rows]
        return torch.cdist(chosen, data).mean(1), torch.cdist(chosen, chosen).sum(1) / (len(chosen) - 1)

    across, own = parts(torch.arange(len(x)))

    def influences(rows: Tensor) -> Tensor:
        to_data, to_others = parts(rows)
        moved = 2 * (to_data - to_others)
        return moved - moved.mean()

    return float(2 * across.mean() - own.mean()) - within, influences


def cell(bed: str, path: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of a pair of models on one path."""
    models, rows = beds()[bed], []
    generator = torch.Generator().manual_seed(1)
    data = torch.cat([model.draw(args.rows // 2, generator) for model in models])
    for op, listed in ways(within_modes(models), args.paper, args.steps).items():
        if op == "and" and models[0].std == models[1].std:
            continue  # alike but for a shift, so that every rule makes them equal
        first: dict[str, Tensor] = {}
        far: tuple[float, Callable[[Tensor], Tensor]] | None = None
        for way in listed:
            start = time.perf_counter()
            times = levels(path, way.steps, euler=way.config.kernel == "euler")
            made = sample(way.config, models, *times, args.rows, args.seed)
            row: dict[str, Any] = {"bed": bed, "levels": path, "op": op, "way": way.name, "steps": way.steps,
                                   "options": way.config.to_dict(), "predictions": made.predictions}  # fmt: skip
            found = errors(op, made)
            first = first or found
            for name, values in found.items():
                power = 0.5 if name == "density" else 1.0
                row[name] = float(values.mean()) ** power
                if values is not first[name] and row[name] > NOTHING:
                    row[f"{name} ratio"] = ends(ratio_of_means(values, first[name], power))
            if op == "or":
                clean = made.x / float(times[0].alpha(float(times[1][-1])))
                near = energy(clean, data)
                far = far or near
                row["samples"] = near[0]
                row["samples minus paper's"] = ends(_further(near, far, len(clean)))
            row["seconds"] = time.perf_counter() - start
            rows.append(row)
            print(shown(row), flush=True)
    return rows


def _further(
    near: tuple[float, Callable[[Tensor], Tensor]], far: tuple[float, Callable[[Tensor], Tensor]], count: int
) -> Interval:
    """Return the difference of two energy distances of paired samples, the draws held fixed."""
    return influence_interval(near[0] - far[0], lambda rows: near[1](rows) - far[1](rows), count, held="draws fixed")


def shown(row: dict[str, Any]) -> str:
    """Return a measured way as text."""
    name = "density" if row["op"] == "or" else "apart"
    further = ends_text(row.get("samples minus paper's"), 1000, "+")
    parts = [
        f"{row['bed']}, {row['levels']}, {row['op']}: {row['way']} at {row['steps']}, {row['predictions']:.0f} "
        f"predictions: {row[name]:.3f} nats",
        ends_text(row.get(f"{name} ratio")) + " times the paper's" if f"{name} ratio" in row else "",
        f"weight {1e4 * row['weight']:.2f}e-4" if "weight" in row else "",
        f"energy distance {further}e-3" if further else "",
    ]
    return ", ".join(part for part in parts if part)


HEAD = (
    "| models | levels | log-density, nats: paper | here | ratio | equal at | within modes, ratio "
    "| weight, 1e-4: paper | here | ratio | AND apart, nats: paper | here, ratio | with curvature, ratio |\n"
    + "|---" * 13
    + "|"
)


def summary(rows: list[dict[str, Any]]) -> str:
    """Return the row of a cell in the table: the reference and this package's defaults, and AND's curvature beside."""
    ways = {(row["op"], row["way"]): row for row in reversed(rows)}  # of the paper's two the first is the reference
    paper, ours = ways["or", "paper"], ways["or", "matched"]
    ratio = ours["density ratio"]
    is_told = max(paper["weight"], ours["weight"]) >= LEAST_WEIGHT
    both = [ways.get(("and", way), {}) for way in ("paper", "matched", "matched, curvature")]
    cells = [
        paper["bed"], paper["levels"], f"{paper['density']:.3f}", f"{ours['density']:.3f}", ends_text(ratio),
        f"{ours['steps'] * ratio[0] ** 2:.0f}", ends_text(ways["or", "matched, within modes"]["density ratio"]),
        f"{1e4 * paper['weight']:.1f}", f"{1e4 * ours['weight']:.1f}",
        ends_text(ours.get("weight ratio")) if is_told else "", f"{both[0]['apart']:.3f}" if both[0] else "",
        *(ends_text(row.get("apart ratio")) for row in both[1:]),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rows", type=int, default=2000, help="samples of a row")
    add("--paper", type=int, default=PAPER, help="steps of the reference")
    add("--steps", type=int, default=100, help="steps of the others")
    add("--seed", type=int, default=0)
    add("--beds", nargs="*", choices=list(beds()), default=list(beds()))
    add("--paths", nargs="*", choices=PATHS, default=list(PATHS))
    add("--kind", default="cpu", help="name of the machine, for the record")
    add("--out", type=Path, default=Path("out/superdiff"))
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Measure all cells, or go on with them, and print the table."""
    args = make_parser().parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"bench_superdiff_error_{args.kind}.json"
    settings = {name: getattr(args, name) for name in ("rows", "paper", "steps", "seed")}
    before = earlier(file, {"settings": settings}, ("settings",))
    cells: dict[str, list[dict[str, Any]]] = before.get("cells", {})
    for bed in args.beds:
        for path in args.paths:
            name = f"{bed}; {path}"
            if name in cells:
                continue
            cells[name] = cell(bed, path, args)
            write_json(file, {"settings": settings, "device": record.describe_device(torch.device("cpu")),
                              "versions": record.versions(), "date": record.now(), "cells": cells})  # fmt: skip
    print(HEAD)
    print("\n".join(map(summary, cells.values())))


if __name__ == "__main__":
    main()
