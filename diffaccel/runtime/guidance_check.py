"""Check that a family declares the guidance rule which its pipeline applies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.families.base import Family
from diffaccel.runtime.interception import Recording

GUIDANCE_TOLERANCE = 1e-4


def check_guidance(family: Family, pipe: Any, recording: Recording, arguments: dict[str, Any]) -> None:
    """Compare the rule that the pipeline applied to the recorder's answers with the one that the family declares.

    Solves ``guided = w_neg negative + w_pos positive`` by least squares; ``(1 - s, s)`` is classifier-free guidance.

    Raises:
        DiffAccelError: for other weights, or a guided prediction that is no such combination.
    """
    scale = family.guidance_scale(pipe, arguments, recording.timestep)
    if not family.is_linear(pipe):
        return
    inputs = [call[family.latent_arg] for call in recording.calls]
    predictions = [family.prediction(out, like) for out, like in zip(recording.answers, inputs, strict=True)]
    if scale is None:
        columns, expected = [predictions[0]], [1.0]
    elif family.joint_branches:
        columns, expected = list(family.branches(predictions[0])), [1 - scale, scale]
    else:
        columns, expected = [predictions[1], predictions[0]], [1 - scale, scale]
    guided = None if recording.guided is None else family.unwrap(recording.guided, arguments)
    if guided is None or columns[0].numel() != guided.numel():
        raise DiffAccelError(f"{type(pipe).__name__} steps with something other than its network's guided output.")
    weights, residual = _least_squares(columns, guided)
    error = max(abs(weight - declared) for weight, declared in zip(weights, expected, strict=True))
    if residual > GUIDANCE_TOLERANCE or error > GUIDANCE_TOLERANCE * max(1.0, abs(scale or 1.0)):
        raise DiffAccelError(
            f"{type(pipe).__name__} does not combine its predictions by classifier-free guidance of scale {scale} "
            f"(fitted weights {[round(weight, 4) for weight in weights]}, residual {residual:.1e}). Non-linear rules "
            "cannot be followed by a sampler: call without them, or diffaccel.remove(pipe)."
        )


def _least_squares(columns: list[Tensor], target: Tensor) -> tuple[list[float], float]:
    """Return the weights of ``columns`` that fit ``target``, and the relative residual."""
    basis = torch.stack([column.double().flatten() for column in columns], dim=1)
    target = target.double().flatten()
    # normal equations: two columns of independent noise are as good as orthogonal, and only 2x2 leaves the device
    gram, moment = (basis.T @ basis).cpu(), (basis.T @ target).cpu()
    fit = torch.linalg.solve(gram, moment)
    residual = (basis @ fit.to(basis.device) - target).norm().cpu() / target.norm().cpu()
    return fit.tolist(), float(residual)
