"""Continuous-time consistency distillation of video (sCM, arXiv 2410.11081; for frames, arXiv 2506.01380).

With ``dz/dt = sd F_teacher`` and ``f = cos(t) z - sin(t) sd F``, the tangent of a noisy frame is

    g = -cos^2(t) (sd F - dz/dt) - r cos(t) sin(t) (z + sd dF/dt),   g <- g / (|g| + 0.1)

and the loss ``exp(w) mean |sd F - sd F_sg - g|^2 - w`` with a learnt weight ``w(t)``; r rises from 0 to 1 in a warm-up.
``|g|`` is the root mean square over all noisy frames of a clip (``norm="clip"``, the form of arXiv 2506.01380) or over
each frame. Only noisy frames move along the teacher's path: the cache that they see stays as it is.

A short run has no time for what is known at low noise to climb to high noise tangent by tangent. With "solve" the
student learns the end of the teacher's path at once (arXiv 2101.02388): ``g`` is the whole way to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from diffaccel.distill.next_frame.trigflow import per_pixel

Tangent = Literal["jvp", "secant", "solve"]
Norm = Literal["clip", "frame"]
Prediction = Callable[[Tensor, Tensor], Tensor]  # z (B, S, C, H, W), t (B, S) -> sd F
_FREQUENCIES = 16


class LossWeight(nn.Module):
    """The weight ``w(t)`` of the loss, learnt with the network: a line through cosines of the angle; 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(_FREQUENCIES, 1)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Return ``w`` of the shape of ``t``."""
        number = torch.arange(_FREQUENCIES, dtype=t.dtype, device=t.device)
        weight: Tensor = self.line((2 * t[..., None] * number).cos())[..., 0]
        return weight


@torch.no_grad()
def derivative(
    prediction: Prediction, z: Tensor, t: Tensor, dz: Tensor, moving: Tensor, kind: Tangent, step: float
) -> tuple[Tensor, Tensor]:
    """Return ``sd F`` and its derivative along ``(dz, 1)`` of the moving frames; the others are held.

    Args:
        prediction: through whose attention forward-mode derivatives go, for "jvp".
        moving: ``(S,)`` bool.
        kind: "jvp": the exact derivative; "secant": the difference to the prediction ``step`` of angle earlier on the
            path, over ``step`` (less where less is left), which is what distillation in discrete steps uses.
    """
    along = moving.to(t.dtype).expand_as(t)
    dz = dz * per_pixel(along)
    if kind == "jvp":
        both = torch.func.jvp(prediction, (z, t), (dz, along.contiguous()))
        return both[0], both[1]
    back = torch.minimum(torch.full_like(t, step), t / 2) * along
    value = prediction(z, t)
    earlier = prediction(z - per_pixel(back) * dz, t - back)
    return value, (value - earlier) / per_pixel(back.clamp(min=1e-6))


def tangent(value: Tensor, slope: Tensor, dz: Tensor, z: Tensor, t: Tensor, r: Tensor | float) -> Tensor:
    """Return ``g``, not normalised, for ``sd F``, its derivative, the teacher's ``dz/dt``, and r, one or ``(B, S)``."""
    cos, sin = per_pixel(t.cos()), per_pixel(t.sin())
    share = per_pixel(r) if isinstance(r, Tensor) else r
    return -(cos**2) * (value - dz) - share * cos * sin * (z + slope)


def normalized(g: Tensor, moving: Tensor, norm: Norm, floor: float = 0.1) -> Tensor:
    """Return ``g / (|g| + floor)`` with the root mean square of the moving frames of a clip, or of each frame."""
    square = g.square().mean((2, 3, 4))  # (B, S)
    if norm == "clip":
        share = moving.to(g.dtype)
        square = ((square * share).sum(1, keepdim=True) / share.sum().clamp(min=1)).expand_as(square)
    return g / (per_pixel(square.sqrt()) + floor)


@torch.no_grad()
def solved_prediction(teacher: Prediction, z: Tensor, t: Tensor, moving: Tensor, steps: int) -> Tensor:
    """Return the ``sd F`` whose clean estimate is the end of the teacher's path from ``z``.

    The path is followed by ``z_s = cos(t - s) z - sin(t - s) sd F``, in equal steps of angle; frames that do not move
    have their ``z`` where the result would be without a meaning.
    """
    along, end = moving.to(t.dtype), z
    for k in range(steps):
        now = t * (1 - along * k / steps)
        back = per_pixel(along * t / steps)
        end = back.cos() * end - back.sin() * teacher(end, now)
    solved = (per_pixel(t.cos()) * z - end) / per_pixel(t.sin()).clamp(min=1e-4)
    return torch.where(moving[:, None, None, None], solved, z)


def consistency_loss(
    student: Prediction,
    differentiable: Prediction,
    teacher: Prediction,
    z: Tensor,
    t: Tensor,
    moving: Tensor,
    weight: LossWeight,
    *,
    r: Tensor | float,
    norm: Norm,
    kind: Tangent,
    step: float,
    solver_steps: int,
) -> tuple[Tensor, Tensor]:
    """Return the loss over moving frames, and ``sd F`` of the student with its gradient.

    Args:
        student: prediction that learns.
        differentiable: the same in a form through which forward-mode derivatives go.
        teacher: prediction whose path is followed.
        kind: "jvp" and "secant": the tangent by that derivative; "solve": the way to the end of the teacher's path,
            found in ``solver_steps`` steps, as it is.
        r: share of the consistency term; 0 is the flow matching of the teacher's velocity.
    """
    value = student(z, t)
    if kind == "solve":
        g = solved_prediction(teacher, z, t, moving, solver_steps) - value.detach()
    else:
        with torch.no_grad():
            dz = teacher(z, t)
        frozen, slope = derivative(differentiable, z, t, dz, moving, kind, step)
        g = normalized(tangent(frozen, slope, dz, z, t, r), moving, norm)
    # sd F_sg is the student's own value: with another kernel's there would be a gradient from rounding alone
    errors = (value.float() - value.detach().float() - g.float()).square().mean((2, 3, 4))
    w = weight(t.float())
    rows = w.exp() * errors - w
    share = moving.to(rows.dtype)
    return (rows * share).sum() / (len(rows) * share.sum().clamp(min=1)), value


def consistency_share(sigma: Tensor, progress: float, warmup: float, anchor: float) -> Tensor:
    """Return r of frames of these levels: it rises with ``progress`` to 1 over the share ``warmup`` of a run.

    Below the level ``anchor`` it is 0, and from there to twice that level it rises linearly.
    """
    ramp = 1.0 if warmup <= 0 else min(1.0, progress / warmup)
    return ramp * ((sigma - anchor) / anchor).clamp(0, 1) if anchor > 0 else torch.full_like(sigma, ramp)
