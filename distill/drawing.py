"""How a generator draws: in one network call, or in a few, each given its last drawing with noise, fresh or its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffaccel.distill.parameterization import clean
from diffaccel.distill.stage import StageOptions
from diffaccel.distill.teacher import Teacher


def coefficients(teacher: Teacher, sigma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the teacher's ``a`` and ``s`` at levels ``(B,)``, on the device of ``like``."""
    a, s = teacher.coefficients(sigma)
    return a.to(like.device), s.to(like.device)


def generate(
    teacher: Teacher,
    generator: nn.Module,
    z: Tensor,
    group: int,
    config: StageOptions,
    fresh: Tensor | None = None,
    call_of_row: Tensor | None = None,
) -> Tensor:
    """Return the generator's drawings ``x0`` of noise ``z``; gradients run through the last network call alone.

    Args:
        fresh: noise ``(N - 1, B, C, H, W)`` of the calls after the first, where there are ``N > 1`` and the stage gives
            them fresh noise.
        call_of_row: ``(B,)`` number of the call whose drawing is returned, on the CPU; the last by default.
    """
    sigma = torch.full((len(z),), config.student_levels[0], dtype=torch.float32, device="cpu")
    x = z if config.start == "unit" else coefficients(teacher, sigma, z)[1] * z
    if config.calls > 1:
        x, sigma = _input_of_call(teacher, generator, x, sigma, group, config, fresh, call_of_row)
    return _clean_at(teacher, generator, x, sigma, group)


@torch.no_grad()
def _input_of_call(
    teacher: Teacher, generator: nn.Module, x: Tensor, sigma: Tensor, group: int, config: StageOptions,
    fresh: Tensor | None, call_of_row: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what the network is given in the call of every row, and its level ``(B,)``."""
    calls = torch.full((len(x),), config.calls - 1, device="cpu") if call_of_row is None else call_of_row
    for call in range(int(calls.max())):
        level = torch.full_like(sigma, config.student_levels[call + 1])
        out = teacher.ask(generator, x, sigma, group)
        following = jump(teacher, out, x, sigma, level, fresh[call] if fresh is not None else None)
        goes_on = calls > call  # the others wait at their own level
        sigma = torch.where(goes_on, level, sigma)
        x = torch.where(goes_on.to(x.device).view(-1, *[1] * (x.ndim - 1)), following, x)
    return x, sigma


def jump(teacher: Teacher, out: Tensor, x: Tensor, sigma: Tensor, to: Tensor, noise: Tensor | None = None) -> Tensor:
    """Return ``a' x0 + s' eps`` at levels ``to``, of the clean estimate of an output at ``x = a x0 + s eps``.

    Without ``noise`` it is the estimate's own ``eps``, which is one step of Euler's method on a flow model's path, and
    of DDIM (arXiv 2010.02502) on others.
    """
    a, s = coefficients(teacher, sigma, x)
    x0 = clean(teacher.kind, out, x, a, s, teacher.sigma_data)
    a_to, s_to = coefficients(teacher, to, x)
    return a_to * x0 + s_to * ((x - a * x0) / s if noise is None else noise)


def guided(teacher: Teacher, x: Tensor, sigma: Tensor, group: int) -> Tensor:
    """Return the teacher's raw output, ``N_neg + guidance (N_pos - N_neg)`` where it is guided."""
    positive = teacher.ask(teacher.network, x, sigma, group)
    if teacher.guidance == 1:
        return positive
    negative = teacher.ask(teacher.network, x, sigma, group, "negative")
    return negative + teacher.guidance * (positive - negative)


def _clean_at(teacher: Teacher, generator: nn.Module, x: Tensor, sigma: Tensor, group: int) -> Tensor:
    """Return the clean estimate of one network call at levels ``(B,)``."""
    a, s = coefficients(teacher, sigma, x)
    return clean(teacher.kind, teacher.ask(generator, x, sigma, group), x, a, s, teacher.sigma_data)
