"""How a generator draws: in one network call, or in a few, each given its last drawing with fresh noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffaccel.distill.parameterization import clean
from diffaccel.distill.stage import Stage
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
    config: Stage,
    fresh: Tensor | None = None,
    call_of_row: Tensor | None = None,
) -> Tensor:
    """Return the generator's drawings ``x0`` of noise ``z``; gradients run through the last network call alone.

    Args:
        fresh: noise ``(N - 1, B, C, H, W)`` of the calls after the first, where there are ``N > 1``.
        call_of_row: ``(B,)`` number of the call whose drawing is returned, on the CPU; the last by default.
    """
    sigma = torch.full((len(z),), config.student_levels[0], dtype=torch.float32, device="cpu")
    x = z if config.start == "unit" else coefficients(teacher, sigma, z)[1] * z
    if fresh is not None:
        x, sigma = _input_of_call(teacher, generator, x, sigma, group, config, fresh, call_of_row)
    return _clean_at(teacher, generator, x, sigma, group)


@torch.no_grad()
def _input_of_call(
    teacher: Teacher, generator: nn.Module, x: Tensor, sigma: Tensor, group: int, config: Stage, fresh: Tensor,
    call_of_row: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what the network is given in the call of every row, and its level ``(B,)``."""
    calls = torch.full((len(x),), len(fresh), device="cpu") if call_of_row is None else call_of_row
    for call in range(int(calls.max())):
        x0 = _clean_at(teacher, generator, x, sigma, group)
        level = torch.full_like(sigma, config.student_levels[call + 1])
        a, s = coefficients(teacher, level, x)
        goes_on = calls > call  # the others wait at their own level
        sigma = torch.where(goes_on, level, sigma)
        rows = goes_on.to(x.device).view(-1, *[1] * (x.ndim - 1))
        x = torch.where(rows, a * x0 + s * fresh[call], x)
    return x, sigma


def _clean_at(teacher: Teacher, generator: nn.Module, x: Tensor, sigma: Tensor, group: int) -> Tensor:
    """Return the clean estimate of one network call at levels ``(B,)``."""
    a, s = coefficients(teacher, sigma, x)
    return clean(teacher.kind, teacher.ask(generator, x, sigma, group), x, a, s, teacher.sigma_data)
