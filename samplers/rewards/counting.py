"""How near the counts of things in a picture are to those that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.rewards.callables import attributes
from diffaccel.samplers.rewards.reward import Reward

Detector = Callable[[Tensor, list[str]], Any]
Counts = Mapping[str, int]


def counts(detector: Detector, expected: Counts | Callable[[str], Counts]) -> Reward:
    """``-sum_i (found_i - expected_i)^2``, the residual sum of squares of arXiv 2503.19385's quantity task; best is 0.

    Args:
        detector: from images ``(b, 3, H, W)`` in [0, 1] and n names of things to counts ``(b, n)``; its attributes
            ``device``, ``batch_size``, ``input`` and ``differentiable`` count where it has them.
        expected: how many of each thing, ``{"apple": 3, "cat": 2}``, or a function from a prompt to that.

    Raises:
        DiffAccelError: for nothing to count; when called, for counts of another shape.
    """
    fixed = {} if callable(expected) else dict(expected)
    wanted = expected if callable(expected) else lambda prompt: fixed
    if not callable(expected) and not fixed:
        raise DiffAccelError("There is nothing to count. Say how many of what, such as {'apple': 3}.")

    def residual(images: Tensor, prompts: list[str]) -> Tensor:
        rows: dict[tuple[tuple[str, int], ...], list[int]] = {}  # prompts may ask for different things
        for i, prompt in enumerate(prompts):
            rows.setdefault(tuple(wanted(prompt).items()), []).append(i)
        found = torch.cat([_residual(detector, images[which], dict(things)) for things, which in rows.items()])
        order = torch.tensor([i for which in rows.values() for i in which]).argsort()
        return found[order.to(found.device)]

    what = ", ".join(f"{count} {name}" for name, count in fixed.items()) or "by prompt"
    given = {"needs_prompts": callable(expected), **attributes(detector)}
    return Reward(name=f"counts[{what}]", function=residual, **given)


def _residual(detector: Detector, images: Tensor, things: Counts) -> Tensor:
    found = torch.as_tensor(detector(images, list(things)))
    if found.shape != (len(images), len(things)):
        raise DiffAccelError(
            f"The detector returned counts of shape {tuple(found.shape)} for {len(images)} images and {len(things)} "
            f"things ({', '.join(things)}); expected ({len(images)}, {len(things)})."
        )
    target = torch.tensor(list(things.values()), device=found.device)
    return -((found - target) ** 2).sum(1)
