"""A test bed of superposition: mixtures whose densities are known, asked for by the handle of a conditioning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from analytic import Mixture, session
from torch import Tensor

from diffaccel.flow import VP, Path
from diffaccel.samplers.superdiff import opening
from diffaccel.samplers.superdiff.components import Component, Components
from diffaccel.samplers.superdiff.engine import Superposition
from diffaccel.session import Eval, Pred, Session, Step, bcast

VP_PATH = VP()
A = Mixture((0.5, 0.5), ((-1.5, 1.0), (1.5, 1.0)), (0.3, 0.3))
B = Mixture((0.5, 0.5), ((-1.5, -1.0), (1.5, -1.0)), (0.3, 0.3))


def levels(path: Path, n: int) -> Tensor:
    """``n + 1`` falling times of a path, fp64, from pure noise to nearly none."""
    name = type(path).__name__
    if name == "VE":
        return torch.logspace(torch.log10(torch.tensor(50.0)).item(), -2, n + 1, dtype=torch.float64)
    last = 0.005 if name == "Linear" else 1e-3
    return torch.linspace(1, last, n + 1, dtype=torch.float64)


@dataclass
class Superposed:
    """What a run came to: the samples, the run itself, and how often each component was asked."""

    x: Tensor
    run: Superposition
    evals: list[Eval] = field(default_factory=list)

    @property
    def report(self) -> dict[str, Any]:
        return self.run.session.report["superdiff"]

    def tracked(self) -> Tensor:
        """Each component's tracked log-density at the end, ``(B, M)``."""
        densities = self.run.densities
        return (densities.log_density + densities.shared[..., None])[0]

    def true(self, models: Sequence[Mixture], t: float) -> Tensor:
        """Each component's own log-density of the samples at time ``t``, ``(B, M)``."""
        path = self.run.session.path
        return torch.stack([m.log_density(self.x, path.alpha(t), path.sigma(t)) for m in models], 1)


def superpose(
    config: Any,
    models: Sequence[Any],
    path: Path,
    times: Tensor,
    rows: int,
    *,
    dim: int = 2,
    seed: int = 0,
    begin: Tensor | None = None,
    guidance: float | None = None,
    dtype: torch.dtype = torch.float64,
    initial: Tensor | None = None,
    edit: Callable[[Tensor], Tensor] = lambda x: x,
) -> Superposed:
    """Run a config on models known in closed form; with ``guidance`` the last model is that of no prompt."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, 1, 1, generator=generator, dtype=torch.float64) * float(path.sigma(float(times[0])))
    x = (x if begin is None else begin).to(dtype)
    here = session(x, times, path, generator)
    count = len(models) - (guidance is not None)
    parts = _Parts(
        here, tuple(Component(i) for i in range(count)), "positive" if guidance is not None else "guided",
        count if guidance is not None else None, guidance,
    )  # fmt: skip
    run = _opened(config, here, parts)
    if initial is not None:
        run.densities.shared = initial[None].to(run.densities.shared)
    evals: list[Eval] = []
    sampling, reply = run.sample(), None
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration as stop:
            return Superposed(stop.value, run, evals)
        if isinstance(event, Step):
            reply = edit(event.x)
            continue
        requests = event if isinstance(event, list) else [event]
        evals += requests
        preds = [_answer(models[e.cond], path, e) for e in requests]
        reply = preds if isinstance(event, list) else preds[0]


@dataclass(frozen=True, eq=False)
class _Parts(Components):
    """Components whose guidance is a number."""

    scale: float | None = None

    def guidance(self, sigma: Tensor) -> float:
        return 1.0 if self.scale is None else self.scale


def _opened(config: Any, here: Session, parts: Components) -> Superposition:
    before = opening.open_components
    opening.open_components = lambda session, separate: parts  # type: ignore[assignment]
    try:
        return opening.superposition(config, here)
    finally:
        opening.open_components = before


def _answer(model: Any, path: Path, request: Eval) -> Pred:
    sigma = bcast(request.sigma, request.x)
    velocity = model.velocity(path, request.x, sigma) if isinstance(model, Mixture) else model(path, request.x, sigma)
    return Pred(path, request.x, sigma, velocity)
