"""Weighted sums of rewards, and their notation: ``clip + 0.2*compress``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.rewards.reward import Reward

_SIGN = re.compile(r"\s+([+-])(?:\s+|$)")  # between spaces, since names and paths contain hyphens
_TERM = re.compile(r"(?P<sign>[+-]?)\s*(?:(?P<weight>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*)?(?P<name>\S.*)")


def terms(text: str) -> list[tuple[float, str]]:
    """Parse weights and names from text such as ``0.7*clip - 0.1*compress``; a sign between terms needs spaces.

    Raises:
        DiffAccelError: for text that is no such sum.
    """
    first, *rest = _SIGN.split(text.strip())
    weighted_names = []
    for sign, part in zip(("+", *rest[::2]), (first, *rest[1::2]), strict=True):
        match = _TERM.fullmatch(part.strip())
        if match is None:
            raise DiffAccelError(f"'{text}' is no reward. Write names with weights, such as clip + 0.2*compress.")
        weight = float(match["weight"] or 1)
        weighted_names.append((-weight if (sign == "-") != (match["sign"] == "-") else weight, match["name"]))
    return weighted_names


def weighted(parts: Sequence[tuple[float, Reward]]) -> Reward:
    """Make the reward ``sum_i w_i r_i``, in float64. It is differentiable where all terms are; one NaN makes it NaN.

    Raises:
        DiffAccelError: for no terms, weights that are not finite, or terms that take different inputs.
    """
    if not parts:
        raise DiffAccelError("A sum of rewards has at least one term.")
    for weight, reward in parts:
        if not math.isfinite(float(weight)):
            raise DiffAccelError(f"The weight of the reward '{reward.name}' is {weight}; it must be a finite number.")
    inputs = {reward.input: reward.name for _, reward in parts}
    if len(inputs) > 1:
        mixed = ", ".join(f"'{name}' takes {kind}" for kind, name in inputs.items())
        raise DiffAccelError(f"Rewards of one sum take the same input; {mixed}. Sum rewards of one kind.")
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]

    rewards = [reward for _, reward in parts]
    return Reward(
        name=_name(parts),
        function=_Total(tuple(parts)),
        input=rewards[0].input,
        batch_size=min(reward.batch_size for reward in rewards),
        differentiable=all(reward.differentiable for reward in rewards),
        needs_prompts=any(reward.needs_prompts for reward in rewards),
    )


@dataclass(frozen=True, eq=False)
class _Total:
    """``sum_i w_i r_i``, a function that can be pickled where its rewards can."""

    parts: tuple[tuple[float, Reward], ...]

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        addends = (weight * reward.numbers(images, prompts).to("cpu", torch.float64) for weight, reward in self.parts)
        return reduce(torch.add, addends)


def _name(parts: Sequence[tuple[float, Reward]]) -> str:
    """Write a sum as :func:`terms` reads it."""
    text = ""
    for weight, reward in parts:
        sign = ("-" if weight < 0 else "") if not text else (" - " if weight < 0 else " + ")
        text += sign + (reward.name if abs(weight) == 1 else f"{abs(weight):g}*{reward.name}")
    return text
