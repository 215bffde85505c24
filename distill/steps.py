"""The two steps of score implicit matching (arXiv 2410.16794): of the assistant, and of the generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.distill.drawing import coefficients, generate, guided
from diffaccel.distill.levels import Levels
from diffaccel.distill.losses import generator_loss, sample_weight
from diffaccel.distill.options import Matching
from diffaccel.distill.parameterization import clean, scale, target
from diffaccel.distill.teacher import Teacher
from diffaccel.training.steps import backward


@dataclass(frozen=True)
class Draw:
    """What one step is made of: noise ``z`` to draw from, noise ``eps`` at ``sigma`` to look at the drawing with.

    Attributes:
        z, eps: ``(B, C, H, W)``.
        sigma: ``(B,)`` levels of the linear path, on the CPU.
        group: the conditions.
        call_of_row: ``(B,)`` number of the network call whose drawing is looked at, on the CPU; None for one call.
        fresh: noise ``(N - 1, B, C, H, W)`` of its later calls.
    """

    z: Tensor
    eps: Tensor
    sigma: Tensor
    group: int
    call_of_row: Tensor | None = None
    fresh: Tensor | None = None

    @classmethod
    def new(
        cls,
        teacher: Teacher,
        law: Levels,
        config: Matching,
        generator: torch.Generator,
        device: Any,
        share: tuple[int, int],
    ) -> Draw:
        """Draw on the CPU for all processes, so that the numbers of one picture depend on no other, and keep a share.

        Args:
            share: number of this process and of all of them.
        """
        rank, size = share
        rows = slice(rank * config.batch // size, (rank + 1) * config.batch // size)
        both = torch.randn(2, config.batch, *teacher.shape, generator=generator, device="cpu", dtype=torch.float32)
        sigma = law.draw(config.batch, generator)[rows]
        group = int(torch.randint(-(-teacher.groups // size), (1,), generator=generator, device="cpu"))
        pair = both[:, rows].to(device)
        if config.student_steps == 1:
            return cls(pair[0], pair[1], sigma, group * size + rank)
        calls, whole = config.student_steps, (config.batch, *teacher.shape)
        call_of_row = torch.randint(calls, (config.batch,), generator=generator, device="cpu")[rows]
        if config.student_match == "last":
            call_of_row = torch.full_like(call_of_row, calls - 1)
        fresh = torch.randn(calls - 1, *whole, generator=generator, device="cpu", dtype=torch.float32)[:, rows]
        return cls(pair[0], pair[1], sigma, group * size + rank, call_of_row, fresh.to(device))


def assistant_loss(
    teacher: Teacher, generator: nn.Module, assistant: nn.Module, draw: Draw, config: Matching
) -> Tensor:
    """Return the mean square of denoising the generator's drawings, in raw outputs."""
    with torch.no_grad():
        x0 = generate(teacher, generator, draw.z, draw.group, config, draw.fresh, draw.call_of_row)
    a, s = coefficients(teacher, draw.sigma, x0)
    x_t = a * x0 + s * draw.eps
    wanted = target(teacher.kind, x0, draw.eps, x_t, a, s, teacher.sigma_data)
    return (teacher.ask(assistant, x_t, draw.sigma, draw.group) - wanted).square().mean()


def generator_step(
    teacher: Teacher, generator: nn.Module, assistant: nn.Module, draw: Draw, config: Matching
) -> dict[str, Tensor]:
    """Add the gradient of the generator's loss to its parameters, and return what the log shows.

    Gradients run from the drawing through ``x_t`` and through both frozen networks, and directly through the residual.
    """
    make = _one_network_at_a_time if config.sequential else _all_networks_at_once
    with frozen(teacher.network, assistant):
        return make(teacher, generator, assistant, draw, config)


@contextmanager
def frozen(*networks: nn.Module) -> Iterator[None]:
    """Let no weight of the networks get a gradient in the block; every weight's own flag returns after it."""
    flags = [(p, p.requires_grad) for network in networks for p in network.parameters()]
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def _all_networks_at_once(
    teacher: Teacher, generator: nn.Module, assistant: nn.Module, draw: Draw, config: Matching
) -> dict[str, Tensor]:
    """Make the step with the activations of all networks in memory."""
    x0 = generate(teacher, generator, draw.z, draw.group, config, draw.fresh, draw.call_of_row)
    a, s = coefficients(teacher, draw.sigma, x0)
    x_t = a * x0 + s * draw.eps
    with torch.set_grad_enabled(config.grad_through_scores):
        of_assistant = teacher.ask(assistant, x_t, draw.sigma, draw.group)
        of_teacher = guided(teacher, x_t, draw.sigma, draw.group)
    loss, shown = matching_loss(teacher, x0, x_t, of_assistant, of_teacher, draw, config)
    backward(loss)
    return shown


def _one_network_at_a_time(
    teacher: Teacher, generator: nn.Module, assistant: nn.Module, draw: Draw, config: Matching
) -> dict[str, Tensor]:
    """Make the same step with the activations of one network at a time, by vector-Jacobian products."""
    with torch.no_grad():
        drawn = generate(teacher, generator, draw.z, draw.group, config, draw.fresh, draw.call_of_row)
    a, s = coefficients(teacher, draw.sigma, drawn)
    x_t = (a * drawn + s * draw.eps).requires_grad_()
    with torch.no_grad():
        teacher_value = guided(teacher, x_t, draw.sigma, draw.group)
    of_assistant = teacher.ask(assistant, x_t, draw.sigma, draw.group)
    parts = [part.detach().requires_grad_() for part in (drawn, x_t, of_assistant, teacher_value)]
    loss, shown = matching_loss(teacher, parts[0], parts[1], parts[2], parts[3], draw, config)
    to_x0, to_x_t, to_assistant, to_teacher = torch.autograd.grad(
        loss, parts, allow_unused=True, materialize_grads=True
    )
    if config.grad_through_scores:
        (through,) = torch.autograd.grad(of_assistant, x_t, to_assistant)
        to_x_t = to_x_t + through
        del of_assistant
        (through,) = torch.autograd.grad(guided(teacher, x_t, draw.sigma, draw.group), x_t, to_teacher)
        to_x_t = to_x_t + through
    x0 = generate(teacher, generator, draw.z, draw.group, config, draw.fresh, draw.call_of_row)
    torch.autograd.backward(x0, to_x0 + a * to_x_t)
    return shown


def matching_loss(
    teacher: Teacher, x0: Tensor, x_t: Tensor, of_assistant: Tensor, of_teacher: Tensor, draw: Draw, config: Matching
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the mean loss of drawings ``x0``, and the mean distance of the two clean estimates a coordinate."""
    kind, data = teacher.kind, teacher.sigma_data
    a, s = coefficients(teacher, draw.sigma, x0)
    factor = scale(config.space, kind, a, s, data)
    raw = of_assistant - of_teacher
    v = factor * raw
    if config.grad_through_scores:
        r = factor * (of_assistant - target(kind, x0, draw.eps, x_t, a, s, data))
    else:  # the clean estimates are constants, x_t included, and the drawing alone is followed
        residual = clean(kind, of_assistant, x_t, a, s, data).detach() - x0
        v, r = v.detach(), factor / scale("x0", kind, a, s, data) * residual
    estimate = clean(kind, of_teacher.detach(), x_t.detach(), a, s, data)
    weight = sample_weight(config.weight, x0.detach(), estimate)
    loss = (weight * generator_loss(v, r, alpha=config.alpha, distance=config.distance, c=config.c)).mean()
    distance = (scale("x0", kind, a, s, data) * raw).detach().square().mean().sqrt()
    return loss, {"loss": loss.detach(), "distance": distance}
