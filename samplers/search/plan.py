"""Which noise levels a search visits, and how much fresh noise is drawn between two of them.

Paths of equal signal-to-noise ratio share ``x0`` and ``eps``, so a search on the variance-preserving path of a flow
model is one on the linear path with other levels and other fresh noise: with time ``s`` of the VP path,
``t = sigma_s / c``, ``gamma = gamma_s / c`` and ``c = alpha_s + sigma_s`` (Kim et al., arXiv 2503.19385, section 4.2;
with the coefficient-preserving kernel of arXiv 2509.05952 the identity is exact).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR, VE_PATH, VP, Path
from diffaccel.samplers.search.transitions import Coefficients, affine, cps
from diffaccel.schedules import Schedule

PathName = Literal["native", "vp", "linear"]
Kind = Literal["posterior_mean", "tail", "t0"]
KernelName = Literal["cps", "em"]
ScaleName = Literal[
    "square", "linear", "constant", "sigma", "sine", "bump", "beta", "flow-grpo", "ancestral"
]  # fmt: skip
VP_PATH = VP(0.1, 20.0)

# f(t) of g(t) = norm f(t), for the path's own time t in [0, 1], 1 is noise (arXiv 2503.19385, table of scales)
SCALES: dict[str, Callable[[float, Path], float]] = {
    "constant": lambda t, path: 1.0,
    "linear": lambda t, path: t,
    "square": lambda t, path: t * t,
    "sigma": lambda t, path: float(path.sigma(t)),
    "sine": lambda t, path: math.sin(math.pi * t / 2),
    "bump": lambda t, path: math.exp(-((t - 0.5) ** 2) / (2 * 0.15**2)),
    "beta": lambda t, path: math.sqrt(_beta(t, path)),
    "flow-grpo": lambda t, path: math.sqrt(min(t, 0.999) / (1 - min(t, 0.999))),  # arXiv 2505.05470, which clamps too
}


@dataclass(frozen=True)
class SearchPlan:
    """Noise levels and kernels of a search from noise to sample, in the session's coordinates.

    Attributes:
        sigmas: the ``S`` levels at which samples are predicted and scored, falling.
        kernels: coefficients of the ``S - 1`` transitions between them.
        tail: levels of the deterministic walk from the last of ``sigmas`` to the end, which is its last level.
        start: scale of the unit noise at the first level; None where the pipeline's own is used.
        path: the path whose coordinates these are.
        kind: what the final sample is: ``t0`` where the call's own levels are searched to the end, after the levels of
            another path ``tail``, or ``posterior_mean`` where these have no tail.
    """

    sigmas: tuple[float, ...]
    kernels: tuple[Coefficients, ...]
    tail: tuple[float, ...]
    start: float | None
    path: Path
    kind: Kind

    @property
    def stages(self) -> int:
        """Number of searched levels."""
        return len(self.sigmas)

    @property
    def tail_nfe(self) -> int:
        """Predictions between the last searched level and the sample, where none is needed."""
        return max(len(self.tail) - 1, 0)

    def ode(self, level: int) -> Coefficients:
        """Return the coefficients from one searched level to the next without fresh noise."""
        return cps(self.path, self.sigmas[level], self.sigmas[level + 1])

    @property
    def stochastic(self) -> bool:
        """Whether children of one parent differ."""
        return any(kernel.c > 0 for kernel in self.kernels)


def make_plan(
    schedule: Schedule,
    *,
    path: PathName = "native",
    kernel: KernelName = "cps",
    scale: ScaleName = "square",
    norm: float = 3.0,
    stages: int = 10,
    tail_steps: int = -1,
) -> SearchPlan:
    """Make the plan for one call of a pipeline.

    Args:
        schedule: the call's schedule, whose coordinates the plan has.
        path: "vp": levels of the variance-preserving path at ``s_k = s_0 sqrt(1 - (k/S)^2)``, ``s_0`` at most 1;
            "linear" and "native": the call's own levels to the end, with noise by ``scale``, or DDPM's.
        kernel: "cps", or "em": ``x' = x - h (u - g^2/2 score) + g sqrt(h) z`` on the path that is searched.
        scale, norm: ``g = norm f(t)``, and ``gamma^2 = min(g^2 h, sigma'^2)`` under cps. "ancestral" is DDPM's share
            ``gamma = norm sigma' sqrt(1 - (alpha sigma' / (alpha' sigma))^2)``; "native" always has it, norm at most 1.
        stages: number of levels of "vp"; the other paths have the call's own.
        tail_steps: steps from the last searched level of "vp" to the end: that many equal ones, -1 for the call's own
            levels below it, 0 for none, where the sample is a posterior mean.

    Raises:
        DiffAccelError: for fewer than two levels, or numbers out of range.
    """
    if path == "native":
        scale, norm = "ancestral", min(norm, 1.0)
    own = [float(sigma) for sigma in schedule.sigmas]
    if path == "vp":
        searched: Path = VP_PATH
        times = _vp_times(schedule, stages)
        sigmas = [_rounded(_session(schedule.path, _share(searched, s))) for s in times]
        tail = _tail(own, sigmas[-1], tail_steps, schedule.path)
        kind: Kind = "posterior_mean" if tail_steps == 0 else "tail"
    else:
        searched, sigmas, tail, kind = LINEAR, own[:-1], own[-1:], "t0"
        times = [_linear(schedule.path, sigma) for sigma in sigmas]
    if len(sigmas) < 2:
        raise DiffAccelError(
            f"A search needs at least 2 noise levels, and this one has {len(sigmas)}. "
            + ("Raise stages." if path == "vp" else "Ask the pipeline for more num_inference_steps.")
        )
    kernels = []
    for (s, s_next), (sigma, sigma_next) in zip(pairwise(times), pairwise(sigmas), strict=True):
        onto = _onto(searched, s_next, schedule.path)
        if kernel == "em":
            of_x0, of_eps, c = _em(searched, s, s_next, _strength(searched, s, scale, norm))
            kernels.append(affine(schedule.path, sigma, of_x0 * onto, of_eps * onto, c * onto))
        else:
            gamma = _fresh(searched, s, s_next, scale, norm) * onto
            kernels.append(cps(schedule.path, sigma, sigma_next, min(gamma, sigma_next)))
    no_signal = _linear(schedule.path, own[0]) >= 1
    start = 1 / _sum(searched, times[0]) if path == "vp" and (no_signal or not schedule.vp) else None
    return SearchPlan(tuple(sigmas), tuple(kernels), tuple(tail), start, schedule.path, kind)


# -- levels ------------------------------------------------------------------------------------------------------------


def _vp_times(schedule: Schedule, stages: int) -> list[float]:
    """Return the VP path's times ``s_0 sqrt(1 - (k/S)^2)``, where ``s_0`` has the call's initial SNR."""
    begin = float(schedule.sigmas[0])
    linear = _linear(schedule.path, begin)
    top = float(VP_PATH.at(LINEAR.rho(linear))) if linear < 1 else 1.0  # a call may begin at no signal, the path not
    return [top * math.sqrt(1 - (k / stages) ** 2) for k in range(stages)]


def _tail(own: list[float], last: float, steps: int, path: Path) -> list[float]:
    """Return the levels below the last searched one, of the call's own or ``steps`` equal ones."""
    if steps == -1:
        return [sigma for sigma in own if sigma < last]
    return [*descend(path, last, _linear(path, own[-1]), max(steps, 1))[:-1], own[-1]]


def at_level(path: Path, t: float) -> float:
    """Convert the level ``t`` in [0, 1] of the linear path to the coordinates of ``path``."""
    return _rounded(_session(path, t))


def descend(path: Path, sigma: float, t: float, steps: int) -> list[float]:
    """Return ``steps`` levels below ``sigma``, at equal steps of the linear path's level down to ``t``."""
    top = _linear(path, sigma)
    return [at_level(path, top + (t - top) * (i + 1) / steps) for i in range(steps)]


# -- kernels of the searched path --------------------------------------------------------------------------------------


def _strength(path: Path, t: float, scale: str, norm: float) -> float:
    """Return the diffusion strength ``g`` at a time of the searched path."""
    return norm * SCALES[scale](t, path)


def _fresh(path: Path, t: float, t_next: float, scale: str, norm: float) -> float:
    """Return ``gamma`` of the coefficient-preserving kernel on the searched path."""
    sigma_next = float(path.sigma(t_next))
    if scale == "ancestral":
        ratio = float(path.alpha(t)) * sigma_next / (float(path.alpha(t_next)) * float(path.sigma(t)))
        return norm * sigma_next * math.sqrt(max(1 - ratio**2, 0.0))
    return min(_strength(path, t, scale, norm) * math.sqrt(t - t_next), sigma_next)


def _em(path: Path, t: float, t_next: float, g: float) -> tuple[float, float, float]:
    """Return the factors of x0, eps and z of an Euler-Maruyama step (arXiv 2503.19385, eq. 5).

    It solves ``dx = (u - g^2/2 score) dt + g dw`` backwards in time.
    """
    h, sigma = t - t_next, float(path.sigma(t))
    of_x0 = float(path.alpha(t)) - h * float(path.d_alpha(t))
    of_eps = sigma - h * float(path.d_sigma(t)) - 0.5 * g * g * h / sigma
    return of_x0, of_eps, g * math.sqrt(h)


def _beta(t: float, path: Path) -> float:
    """Return ``beta`` of the forward process, ``d sigma^2 / dt - 2 sigma^2 d log(alpha) / dt``; ``t`` is at most 0.999.

    At ``t = 1`` it may have a pole.
    """
    t = min(t, 0.999)
    sigma, d_sigma = float(path.sigma(t)), float(path.d_sigma(t))
    return 2 * sigma * d_sigma - 2 * sigma**2 * float(path.d_alpha(t)) / float(path.alpha(t))


# -- between coordinates -----------------------------------------------------------------------------------------------


def _sum(path: Path, t: float) -> float:
    return float(path.alpha(t)) + float(path.sigma(t))


def _share(path: Path, t: float) -> float:
    """Return the linear path's time of equal signal-to-noise ratio, ``sigma / (alpha + sigma)``."""
    return float(path.sigma(t)) / _sum(path, t)


def _linear(path: Path, sigma: float) -> float:
    """Convert a level of the session's path to the linear path."""
    return sigma / (1 + sigma) if path is VE_PATH else sigma


def _session(path: Path, t: float) -> float:
    """Convert a level of the linear path to the session's path: the inverse of :func:`_linear`."""
    return t / (1 - t) if path is VE_PATH else t


def _onto(searched: Path, t: float, path: Path) -> float:
    """Return the factor that brings a state of the searched path at ``t`` to the session's coordinates."""
    linear = 1 / _sum(searched, t)
    return linear / (1 - _share(searched, t)) if path is VE_PATH else linear


def _rounded(sigma: float) -> float:
    """Round to float32, the precision at which the network is evaluated."""
    return float(torch.tensor(sigma, dtype=torch.float32, device="cpu"))
