"""What draws the frames of a world model's pipeline while NFD is on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffaccel.models.next_frame.pipeline import NextFramePipeline, draw_plainly
from diffaccel.samplers.nfd.sampler import NextFrameSampler

OF_A_CALL = ("context_noise", "shift", "rule")  # settings that a pipeline's scheduler and config give


@dataclass(eq=False)
class Drafting:
    """Draws the frames of a pipeline's calls until removal; see :class:`FrameSource`.

    Attributes:
        options: of its samplers: ``draft``, ``capture``, ``latency`` and ``merged``.
        samplers: by steps and number of videos; a sampler's graphs serve all calls of its kind.
        stats: of the last call.
    """

    pipe: NextFramePipeline
    options: Mapping[str, Any]
    samplers: dict[tuple[int, int], NextFrameSampler] = field(default_factory=dict)
    stats: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies have: no samplers, whose memory and graphs belong to one network."""
        return {**vars(self), "samplers": {}}

    def __call__(
        self, pipe: NextFramePipeline, frames: Tensor, given: Tensor, actions: Tensor, steps: int, seeds: Sequence[int]
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Return the frames that follow, and the counts of the rollout."""
        sampler = self.sampler(steps, seeds)
        sampler.reset(frames, given, seeds=seeds)
        rollout = sampler.rollout(actions)
        self.stats = rollout.stats.to_dict()
        return rollout.frames, self.stats

    def sampler(self, steps: int, seeds: Sequence[int]) -> NextFrameSampler:
        """Return the sampler for calls of this kind."""
        network, settings = self.pipe.transformer, self.pipe.settings(steps)
        weight = network.proj_in.weight
        kept = self.samplers.get((steps, len(seeds)))
        if kept is not None and kept.model is network:
            cache, had = kept.engine.cache, kept.engine.settings
            is_same = (cache.dtype, cache.device) == (weight.dtype, weight.device)
            if is_same and all(getattr(had, name) == getattr(settings, name) for name in OF_A_CALL):
                return kept
        self.samplers[steps, len(seeds)] = NextFrameSampler(
            self.pipe.transformer, steps, context_noise=settings.context_noise, shift=settings.shift,
            rule=settings.rule, seeds=seeds, **self.options,
        )  # fmt: skip
        return self.samplers[steps, len(seeds)]

    def remove(self) -> None:
        """Let the pipeline draw as before."""
        self.pipe.draw_frames = draw_plainly
        self.samplers.clear()

    def report(self) -> dict[str, Any] | None:
        """Return the counts of the last call."""
        return self.stats
