"""A test bed without a network: data whose posterior mean, density and probability flow are known in closed form.

Data is a mixture of isotropic Gaussians, ``x0 ~ sum_k w_k N(m_k, s_k^2 I)``; one component gives the Gaussian, for
which the probability-flow map is affine. Everything is computed in the dtype of ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from diffaccel.flow import LINEAR, VE_PATH, Path
from diffaccel.schedules import Schedule
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
        """``E[x0 | x]`` for ``x = alpha x0 + sigma eps``."""
        logits, variance, apart, means, stds = self._parts(x, alpha, sigma)
        alpha = torch.as_tensor(alpha, dtype=x.dtype).reshape(-1, 1, 1)
        each = means + alpha * stds**2 / variance * apart
        return (logits.softmax(1)[..., None] * each).sum(1).reshape(x.shape)

    def eps(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """``E[eps | x]``, without the cancellation of ``(x - alpha x0) / sigma`` at small sigma."""
        logits, variance, apart, _, _ = self._parts(x, alpha, sigma)
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, 1, 1)
        return (logits.softmax(1)[..., None] * (sigma / variance * apart)).sum(1).reshape(x.shape)

    def log_density(self, x: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """``log p(x)`` of ``x = alpha x0 + sigma eps``, one number per row."""
        return self._parts(x, alpha, sigma)[0].logsumexp(1)

    def velocity(self, path: Path, x: Tensor, t: Any) -> Tensor:
        """The marginal velocity ``alpha' E[x0|x] + sigma' E[eps|x]``; ``t`` broadcasts against ``x``."""
        alpha, sigma = path.alpha(t), path.sigma(t)
        return path.velocity(self.x0(x, alpha, sigma), self.eps(x, alpha, sigma), t)


def gaussian(mean: float = 1.5, std: float = 0.6, dim: int = 4) -> Mixture:
    """``N(mean, std^2 I)``."""
    return Mixture((1.0,), ((mean,) * dim,), (std,))


def gaussian_flow(data: Mixture, path: Path, x: Tensor, t: Any, t_next: Any) -> Tensor:
    """The probability flow of Gaussian data: ``alpha' m + sqrt(V'/V) (x - alpha m)``, ``V = alpha^2 s^2 + sigma^2``."""
    (mean,), (std,) = data.means, data.stds
    mean = torch.tensor(mean, dtype=x.dtype).reshape(x.shape[1:])
    variance, after = ((path.alpha(s) * std) ** 2 + path.sigma(s) ** 2 for s in (t, t_next))
    return path.alpha(t_next) * mean + (after / variance) ** 0.5 * (x - path.alpha(t) * mean)


BIMODAL = Mixture((0.3, 0.7), ((1.0, -0.5, 0.3, 0.8), (-0.9, 0.4, -0.2, -1.1)), (0.5, 0.7))
SHAPE = (3, 1, 2, 2)  # (B, C, H, W): four dimensions a row


def start(path: Path, sigma: float, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    """Fixed latents of the size that noise has at ``sigma``."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (noise * (1 + sigma if path is VE_PATH else 1.0)).to(dtype)


def session(
    x: Tensor, sigmas: Tensor, path: Path = LINEAR, generator: Any = None, schedule: Schedule | None = None
) -> Session:
    """A session without a pipeline: where to start, the noise levels, and noise."""
    schedule = schedule or Schedule(path, sigmas, sigmas[:-1] * 1000, "velocity", False, 1000)
    return Session(
        pipe=None, family=None, denoiser=None, schedule=schedule, conds=[], x=x, dtype=x.dtype, height=8, width=8,
        generator=generator, reopen=None,
    )  # fmt: skip


@dataclass
class Run:
    """What a sampler did: where it asked, where it said it stood, and what it returned."""

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


def ode(data: Mixture, path: Path, x: Tensor, begin: float, end: float, n: int = 400) -> Tensor:
    """The probability flow by the classical Runge-Kutta method: error of order ``n^-4``."""
    grid = torch.linspace(begin, end, n + 1, dtype=torch.float64)
    for t, t_next in pairwise(grid):
        h, mid = t_next - t, (t + t_next) / 2
        k1 = data.velocity(path, x, t)
        k2 = data.velocity(path, x + h / 2 * k1, mid)
        k3 = data.velocity(path, x + h / 2 * k2, mid)
        k4 = data.velocity(path, x + h * k3, t_next)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def slope(errors: dict[int, float]) -> float:
    """Order of convergence: minus the least-squares slope of ``log error`` over ``log n``."""
    n = torch.tensor([float(k) for k in errors], dtype=torch.float64).log()
    e = torch.tensor(list(errors.values()), dtype=torch.float64).log()
    n = n - n.mean()
    return float(-(n * (e - e.mean())).sum() / (n * n).sum())
