"""Published preference scorers as rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.eval.networks import scorers
from diffaccel.samplers.rewards import identity
from diffaccel.samplers.rewards.reward import Reward

WITHOUT_TEXT = ("aesthetic",)  # scorers that look at the picture alone


def published(name: str, path: str, device: torch.device, model: str) -> Reward:
    """Return a scorer of :mod:`diffaccel.eval.networks.scorers` as a reward, on pictures rounded to 8 bits.

    Args:
        name: "aesthetic", "image-reward", "hpsv2" or "pickscore".
        path: path of its weights; "" looks for them as :mod:`diffaccel.eval.networks.weights` says.
        device: device of its networks.
        model: not used.

    Raises:
        MissingWeights: where they are not found.
    """
    score = scorers.scorer(name, path or None, device=device)

    def score_rounded(images: Tensor, prompts: list[str]) -> Tensor:
        return score((images.clamp(0, 1) * 255).round().to(torch.uint8), prompts)

    full_name = f"{name}:{path}" if path else name
    return Reward(
        name=full_name, function=score_rounded, batch_size=16, needs_prompts=name not in WITHOUT_TEXT,
        identity=lambda: identity.digest(score.function),
    )  # fmt: skip
