"""Networks that the evaluation knows how to load, as rewards: where weights are looked for is said there, once.

Samplers do not import the evaluation: what is borrowed is reached by name, when a reward needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from diffaccel.samplers.rewards.reward import Reward

LENDERS = {
    "scorer": "diffaccel.eval.scorers:scorer",
    "extractor": "diffaccel.eval.extractors:extractor",
    "clips": "diffaccel.eval.extractors:clips",
    "find": "diffaccel.eval.weights:find",
}
NO_TEXT = ("aesthetic",)  # of the scorers: looks at the picture alone


def borrow(name: str) -> Any:
    """One of :data:`LENDERS`, imported now."""
    module, _, attribute = LENDERS[name].partition(":")
    return getattr(import_module(module), attribute)


def published(name: str, path: str, device: torch.device, model: str) -> Reward:
    """A published preference scorer of :mod:`diffaccel.eval.scorers` as a reward, on pictures rounded to 8 bits.

    Args:
        name: "aesthetic", "image-reward", "hpsv2" or "pickscore".
        path: of its weights; "" looks for them as :mod:`diffaccel.eval.weights` says.
        device: of its networks.
        model: not used.

    Raises:
        MissingWeights: where they are not found.
    """
    score = borrow("scorer")(name, path or None, device=device)

    def rounded(images: Tensor, prompts: list[str]) -> Tensor:
        return score((images.clamp(0, 1) * 255).round().to(torch.uint8), prompts)

    full = f"{name}:{path}" if path else name
    return Reward(name=full, function=rounded, batch_size=16, needs_prompts=name not in NO_TEXT)
