"""CLIP score of every picture and its prompt: the one place where pictures of a run meet their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffaccel.eval.comparison.distribution import features
from diffaccel.eval.metrics.clip_score import check_prompts, clip_score
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.sets.run import Run

CONVENTION = "100 max(cos, 0) a picture"


@dataclass(eq=False)
class ClipScores:
    """Score ``100 max(cos, 0)`` of pictures and their prompts (arXiv 2104.08718); each text is encoded once.

    Attributes:
        clip: network that reads pictures and prompts.
    """

    clip: ClipExtractor
    _texts: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def of_features(self, image_features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score pictures of which features ``(n, d)`` are known, each by its own prompt: (n,) float64.

        Raises:
            DiffAccelError: for another number of prompts than pictures.
        """
        check_prompts(prompts, len(image_features))
        new = [text for text in dict.fromkeys(prompts) if text not in self._texts]
        self._texts.update(zip(new, self.clip.texts(new), strict=True))
        return clip_score(image_features, torch.stack([self._texts[text] for text in prompts]))

    def of_run(self, run: Run) -> Tensor:
        """Score every picture of a run whose prompts are known, (n,) float64."""
        return self.of_features(features(run, self.clip), run.prompts or [])

    def truncated(self, prompts: Sequence[str]) -> int:
        """Count the pictures whose prompt is longer than the network reads, and was cut."""
        cut = {text for text in set(prompts) if self.clip.truncated([text])}
        return sum(text in cut for text in prompts)
