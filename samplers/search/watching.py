"""What a user sees of a search while it runs: the best of every picture so far, and its reward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.samplers.search.chains import Search
from diffaccel.samplers.search.scoring import PictureScorer


def best_so_far(
    searches: Sequence[Search], latents: Callable[[Sequence[Any]], Tensor], scorer: PictureScorer
) -> dict[str, Any] | None:
    """Return the best of every picture: clean latents "x0", pixels in [0, 1] as "preview", and "rewards".

    Args:
        latents: from pairs of a search and its particle to clean latents ``(R, C, H, W)``.

    Returns:
        None where a search has nothing yet, or is resumed and has not its latents.
    """
    best = [(search, search.best) for search in searches if search.best is not None]
    if len(best) < len(searches) or any(particle.slot is None for _, particle in best):
        return None
    x0 = latents(best)
    pixels = torch.cat([scorer.pixels(part, preview=True) for part in x0.split(scorer.batch_size)])
    return {"x0": x0, "preview": pixels, "rewards": [particle.reward for _, particle in best]}


def note_of(searches: Sequence[Search]) -> str:
    """Return the mean of the best rewards so far, for a progress bar; "" before the first."""
    rewards = [search.best.reward for search in searches if search.best is not None]
    return f"reward {sum(reward / len(rewards) for reward in rewards):.4g}" if rewards else ""
