"""How far a run is from its end: where assistant and teacher agree about what the generator draws, it has converged.

The generator's loss is signed and hovers about zero, so it tells nothing. What tells is measured at fixed levels on
drawings of fixed noise: the distance of the two clean estimates, and the errors of both networks in denoising the
drawings. The assistant, which learns to denoise them, has the smaller one; where both are equal, the teacher knows
nothing about the drawings that the assistant does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffaccel.distill.drawing import coefficients, generate, guided
from diffaccel.distill.parameterization import scale, target
from diffaccel.distill.steps import Draw

if TYPE_CHECKING:
    from diffaccel.distill.run import Distillation

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the linear path
_SEED = 7919


@torch.no_grad()
def converged(run: Distillation) -> dict[str, float]:
    """Return the convergence meter of a run, whose generator is looked at as it is.

    ``distance@L`` is the root mean square of ``D_F - D_T`` at level L, ``assistant_error`` and ``teacher_error`` are
    mean squares of denoising in raw outputs, over all levels, and ``residual`` the root mean square of ``D_F - x0``.
    Their noise is the meter's own: training draws the same numbers with it and without.
    """
    teacher, config, kind, data = run.teacher, run.config, run.teacher.kind, run.teacher.sigma_data
    generator, share = torch.Generator("cpu").manual_seed(_SEED), (run.processes.rank, run.processes.size)
    draw = Draw.new(teacher, config.generator_law, config, generator, run.device, share)
    values: dict[str, Tensor] = {}
    sums = {"assistant_error": [], "teacher_error": [], "residual": []}  # type: dict[str, list[Tensor]]
    with run.autocast():
        x0 = generate(teacher, run.generator, draw.z, draw.group, config, draw.fresh, draw.call_of_row)
        for level in LEVELS:
            at_level = replace(draw, sigma=torch.full_like(draw.sigma, level))
            a, s = coefficients(teacher, at_level.sigma, x0)
            x_t = a * x0 + s * draw.eps
            of_assistant = teacher.ask(run.assistant, x_t, at_level.sigma, draw.group).float()
            of_teacher = guided(teacher, x_t, at_level.sigma, draw.group).float()
            wanted, to_clean = target(kind, x0, draw.eps, x_t, a, s, data), scale("x0", kind, a, s, data)
            values[f"distance@{level}"] = (to_clean * (of_assistant - of_teacher)).square().mean().sqrt()
            sums["assistant_error"].append((of_assistant - wanted).square().mean())
            sums["teacher_error"].append((of_teacher - wanted).square().mean())
            sums["residual"].append((to_clean * (of_assistant - wanted)).square().mean().sqrt())
    values |= {name: torch.stack(parts).mean() for name, parts in sums.items()}
    return {name: round(float(value), 6) for name, value in values.items()}
