"""Difference between the counts of things in a picture and the requested ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.rewards.callables import reward_attributes
from diffaccel.samplers.rewards.reward import Reward

Detector = Callable[[Tensor, list[str]], Any]
Counts = Mapping[str, int]


def counts(detector: Detector, expected: Counts | Callable[[str], Counts]) -> Reward:
    """Score by ``-sum_i (count_i - expected_i)^2``, the quantity task's residual sum of squares of arXiv 2503.19385.

    Args:
        detector: from images ``(b, 3, H, W)`` in [0, 1] and n names of things to counts ``(b, n)``; its attributes
            ``device``, ``batch_size``, ``input`` and ``differentiable`` are used where it has them.
        expected: number of each thing, ``{"apple": 3, "cat": 2}``, or a function from a prompt to that.

    Raises:
        DiffAccelError: for nothing to count; when called, for counts of another shape.
    """
    fixed = {} if callable(expected) else dict(expected)
    if not callable(expected) and not fixed:
        raise DiffAccelError("There is nothing to count. Say how many of what, such as {'apple': 3}.")

    residual = _Residual(detector, expected if callable(expected) else fixed)

    things = ", ".join(f"{count} {name}" for name, count in fixed.items()) or "by prompt"
    attributes = {"needs_prompts": callable(expected), **reward_attributes(detector), "identity": None}
    return Reward(name=f"counts[{things}]", function=residual, **attributes)


@dataclass(frozen=True, eq=False)
class _Residual:
    """The function of :func:`counts`, which can be pickled where its detector can."""

    detector: Detector
    expected: Counts | Callable[[str], Counts]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        groups: dict[tuple[tuple[str, int], ...], list[int]] = {}  # rows by what their prompts ask for
        for i, prompt in enumerate(prompts):
            expected = self.expected(prompt) if callable(self.expected) else self.expected
            groups.setdefault(tuple(expected.items()), []).append(i)
        scores = torch.cat([_residual(self.detector, images[rows], dict(things)) for things, rows in groups.items()])
        rows_in_groups = [i for rows in groups.values() for i in rows]
        order = torch.tensor(rows_in_groups, dtype=torch.int64, device="cpu").argsort()
        return scores[order.to(scores.device)]


def _residual(detector: Detector, images: Tensor, things: Counts) -> Tensor:
    answer: Any = detector(images, list(things))
    detected = answer if isinstance(answer, Tensor) else torch.as_tensor(np.asarray(answer), device="cpu")
    if detected.shape != (len(images), len(things)):
        raise DiffAccelError(
            f"The detector returned counts of shape {tuple(detected.shape)} for {len(images)} images and {len(things)} "
            f"things ({', '.join(things)}); expected ({len(images)}, {len(things)})."
        )
    target = torch.tensor(list(things.values()), dtype=torch.int64, device=detected.device)
    return -((detected - target) ** 2).sum(1)
