"""Answers of a judge of pairs, checked: how sure it is that the first picture is better, and how confident."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.samplers.rewards.reward import Reward


@torch.no_grad()
def compare(reward: Reward, a: Tensor, b: Tensor, prompts: Sequence[str]) -> tuple[list[float], list[float]]:
    """Return ``p(a is better)`` and the confidence of every pair, both in [0, 1]; without one it is 1/2.

    Args:
        a, b: pictures ``(n, 3, H, W)`` in [0, 1].
        prompts: one of each pair.

    Raises:
        DiffAccelError: for a judge that fails, or returns anything but numbers in [0, 1], one or two a pair.
    """
    chances: list[float] = []
    sure: list[float] = []
    size = reward.batch_size
    for begin in range(0, len(a), size):
        batch = slice(begin, begin + size)
        first, second = (p[batch] if reward.device is None else p[batch].to(reward.device) for p in (a, b))
        won, confidence = _answer(reward, first, second, list(prompts[batch]))
        chances += won
        sure += confidence
    return chances, sure


def _answer(reward: Reward, a: Tensor, b: Tensor, prompts: list[str]) -> tuple[list[float], list[float]]:
    try:
        answer: Any = None if reward.compare is None else reward.compare(a, b, prompts)
        is_pair = isinstance(answer, tuple) and len(answer) == 2 and _numbers(answer[0]).ndim > 0
        values = [_numbers(part).reshape(-1) for part in (answer if is_pair else (answer,))]
    except DiffAccelError:
        raise
    except Exception as error:  # the user's own judge may raise anything
        raise DiffAccelError(
            f"The judge '{reward.name}' failed ({type(error).__name__}: {first_line(error, 300)})."
        ) from error
    if not all(len(value) == len(prompts) and bool(((value >= 0) & (value <= 1)).all()) for value in values):
        raise DiffAccelError(
            f"The judge '{reward.name}' compared {len(prompts)} pairs and returned {answer!r:.200}. It must return one "
            "number in [0, 1] a pair, how sure the first picture is better, or these and as many confidences."
        )
    return values[0].tolist(), (values[1] if len(values) > 1 else torch.full_like(values[0], 0.5)).tolist()


def _numbers(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")
