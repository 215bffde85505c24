"""A test bed without a network: data whose posterior mean, density and probability flow are known in closed form.

Data is a mixture of isotropic Gaussians, ``x0 ~ sum_k w_k N(m_k, s_k^2 I)``; one component gives the Gaussian, for
which the probability-flow map is affine. Everything is computed in the dtype of ``x``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffaccel.flow import LINEAR, VE_PATH, Path
from diffaccel.schedules import Schedule, read
from diffaccel.session import Eval, Pred, Sampling, Session, Step, bcast


@dataclass(frozen=True)
class Mixture:
    """``sum_k w_k N(m_k, s_k^2 I)`` over the flattened rows of ``x``."""

    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[float, ...]

    def _parts(self, x: Tensor, alpha: Any, sigma: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Responsibilities' logits, variances of ``x`` and distances from the means: (B, K), (B, K, 1), (B, K, D)."""
        flat = x.flatten(1)
        alpha, sigma = (torch.as_tensor(v, dtype=x.dtype).reshape(-1, 1, 1) for v in (alpha, sigma))
        means = torch.tensor(self.means, dtype=x.dtype)[None]
        stds = torch.tensor(self.stds, dtype=x.dtype)[None, :, None]
        variance = alpha**2 * stds**2 + sigma**2
        apart = flat[:, None] - alpha * means
        logits = torch.tensor(self.weights, dtype=x.dtype).log()[None]
        logits = logits - 0.5 * flat.shape[1] * torch.log(2 * torch.pi * variance)[..., 0]
        logits = logits - (apart**2 / (2 * variance)).sum(-1)
        return logits, variance, apart, means, stds

    def x0(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """Return ``E[x0 | x]`` for ``x = alpha x0 + sigma eps``."""
        logits, variance, apart, means, stds = self._parts(x, alpha, sigma)
        alpha = torch.as_tensor(alpha, dtype=x.dtype).reshape(-1, 1, 1)
        component_means = means + alpha * stds**2 / variance * apart
        return (logits.softmax(1)[..., None] * component_means).sum(1).reshape(x.shape)

    def eps(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """Return ``E[eps | x]``, without the cancellation of ``(x - alpha x0) / sigma`` at small sigma."""
        logits, variance, apart, _, _ = self._parts(x, alpha, sigma)
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1)
        return (logits.softmax(1)[..., None] * (sigma / variance * apart)).sum(1).reshape(x.shape)

    def log_density(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """Return ``log p(x)`` of ``x = alpha x0 + sigma eps``, one number per row."""
        return self._parts(x, alpha, sigma)[0].logsumexp(1)

    def velocity(self, path: Path, x: Tensor, t: Any) -> Tensor:
        """Return the marginal velocity ``alpha' E[x0|x] + sigma' E[eps|x]``; ``t`` broadcasts against ``x``."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        return path.velocity(self.x0(x, alpha, sigma), self.eps(x, alpha, sigma), t)


def gaussian(mean: float = 1.5, std: float = 0.6, dim: int = 4) -> Mixture:
    """``N(mean, std^2 I)``."""
    return Mixture((1.0,), ((mean,) * dim,), (std,))


def gaussian_flow(data: Mixture, path: Path, x: Tensor, t: Any, t_next: Any) -> Tensor:
    """Move Gaussian data along its probability flow.

    The map is ``alpha' m + sqrt(V'/V) (x - alpha m)`` with ``V = alpha^2 s^2 + sigma^2``.
    """
    (mean,), (std,) = data.means, data.stds
    mean = torch.tensor(mean, dtype=x.dtype).reshape(x.shape[1:])
    variance, after = ((path.alpha(s) * std) ** 2 + path.sigma(s) ** 2 for s in (t, t_next))
    return path.alpha(t_next) * mean + (after / variance) ** 0.5 * (x - path.alpha(t) * mean)


BIMODAL = Mixture((0.3, 0.7), ((1.0, -0.5, 0.3, 0.8), (-0.9, 0.4, -0.2, -1.1)), (0.5, 0.7))
SHAPE = (3, 1, 2, 2)  # (B, C, H, W): four dimensions a row


def start(path: Path, sigma: float, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return fixed latents with the standard deviation of noise at ``sigma``."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (noise * (1 + sigma if path is VE_PATH else 1.0)).to(dtype)


def session(
    x: Tensor, sigmas: Tensor, path: Path = LINEAR, generator: Any = None, schedule: Schedule | None = None
) -> Session:
    """Return a session without a pipeline: initial latents, noise levels, and noise."""
    schedule = schedule or Schedule(path, sigmas, sigmas[:-1] * 1000, "velocity", False, 1000)
    bare = Session(
        pipe=None, family=None, scheduler=None, conds=[], latents=x, timesteps=schedule.timesteps, step_arguments={},
        read_schedule=schedule, dtype=x.dtype, height=8, width=8, generator=generator, reopen=None,
    )  # fmt: skip
    bare.__dict__["x"] = x  # there is no family whose layout the latents have
    return bare


@dataclass
class Run:
    """The events of a sampler, the replies to its steps, and its result."""

    evals: list[Eval] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    replies: list[Tensor] = field(default_factory=list)
    x: Tensor = None  # type: ignore[assignment]


def drive(
    sampling: Sampling, velocity: Callable[[Tensor, Tensor], Tensor], path: Path, edit: Any = lambda index, x: x
) -> Run:
    """Run a sampler to its end, answering from ``velocity(x, sigma)``; ``edit`` may replace a step's state."""
    run, reply = Run(), None
    while True:
        try:
            event = sampling.send(reply)
        except StopIteration as stop:
            run.x = stop.value
            return run
        if isinstance(event, Step):
            reply = edit(len(run.steps), event.x)
            run.steps.append(event)
            run.replies.append(reply)
        else:
            run.evals.append(event)
            sigma = bcast(event.sigma, event.x)
            reply = Pred(path, event.x, sigma, velocity(event.x, sigma))


def sample(config: Any, data: Mixture, x: Tensor, sigmas: Tensor, path: Path = LINEAR, generator: Any = None) -> Run:
    """Run a sampler's config on data known in closed form."""
    here = session(x, sigmas, path, generator)
    return drive(config.sample(here), lambda x, sigma: data.velocity(path, x, sigma), path)


# A path with a grid on which solvers of first and second order show their order from n = 16 on.
RANGES: dict[str, tuple[Path, float, float]] = {"linear": (LINEAR, 0.95, 0.05), "ve": (VE_PATH, 8.0, 0.1)}


def grid(path: Path, begin: float, end: float, n: int) -> Tensor:
    """``n`` steps: even in time on the linear path, in ``sigma^(1/7)`` on the VE path (arXiv 2206.00364, eq. 5)."""
    if path is VE_PATH:
        return torch.linspace(begin ** (1 / 7), end ** (1 / 7), n + 1, dtype=torch.float64) ** 7
    return torch.linspace(begin, end, n + 1, dtype=torch.float64)


@cache
def solution(data: Mixture, name: str, n: int = 400) -> Tensor:
    """Return the end of the probability flow: the affine map for a Gaussian, else by Runge-Kutta 4 (error 1e-9)."""
    path, begin, end = RANGES[name]
    x, times = start(path, begin), grid(path, begin, end, n)
    if len(data.weights) == 1:
        return gaussian_flow(data, path, x, times[0], times[-1])
    for t, t_next in pairwise(times):
        h, mid = t_next - t, (t + t_next) / 2
        k1 = data.velocity(path, x, t)
        k2 = data.velocity(path, x + h / 2 * k1, mid)
        k3 = data.velocity(path, x + h / 2 * k2, mid)
        k4 = data.velocity(path, x + h * k3, t_next)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def order(config: Any, data: Mixture, name: str) -> float:
    """Return the order of convergence over n = 16 to 128: minus the slope of ``log error`` over ``log n``."""
    path, begin, end = RANGES[name]
    steps = [16, 32, 64, 128]
    errors = []
    for n in steps:
        x = sample(config, data, start(path, begin), grid(path, begin, end, n), path).x
        errors.append(float((x - solution(data, name)).abs().max()))
    n, e = (torch.tensor(v, dtype=torch.float64).log() for v in (steps, errors))
    n = n - n.mean()
    return float(-(n * (e - e.mean())).sum() / (n * n).sum())


# -- against the schedulers of diffusers -----------------------------------------------------------------------------


def network(x: Tensor, t: Tensor) -> Tensor:
    """Evaluate a smooth nonlinear stand-in for a trained network; ``t`` is a time in 0 to 1000."""
    t = t.to(x.dtype) / 1000
    return torch.tanh(1.3 * x + 0.4 * x.flip(-1) - 0.3) * (0.6 + 0.4 * torch.cos(3 * t)) + 0.2 * x * t


def initial(scheduler: Any, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """Return a pipeline's initial latents, fp32."""
    return start(LINEAR, 1.0, shape, torch.float32) * getattr(scheduler, "init_noise_sigma", 1.0)


def stock(scheduler: Any, **options: Any) -> Tensor:
    """Run a pipeline's own loop around :func:`network`."""
    scheduler, x = copy.deepcopy(scheduler), initial(scheduler)
    for t in scheduler.timesteps:
        fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(fed, t), t, x, **options).prev_sample
    return x


def walk(config: Any, scheduler: Any, generator: Any = None) -> Tensor:
    """Run a sampler around :func:`network`, on the schedule of ``scheduler``."""
    schedule = read(scheduler)
    x = schedule.from_pipeline(initial(scheduler))

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return schedule.velocity(network(schedule.network_input(x, sigma), schedule.timestep(sigma)), x, sigma)

    run = drive(
        config.sample(session(x, schedule.sigmas, generator=generator, schedule=schedule)), velocity, schedule.path
    )
    return schedule.to_pipeline(run.x, schedule.sigmas[-1])
