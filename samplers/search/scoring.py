"""From clean latents to rewards: decode, score, check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffaccel.samplers.rewards.reward import Reward
from diffaccel.samplers.search.preview import ROWS, Preview, warn_of_disagreement
from diffaccel.samplers.search.stopwatch import Stopwatch
from diffaccel.training.steps import differentiable_attention

MAX_PIXELS = 2**24  # decoded together
MAX_FRAMES = 8  # of a clip that a reward of pictures scores
CHECKED = 64  # pictures on which a preview is compared with the decoder


class PictureScorer:
    """Rewards of clean latents: decodes them to pictures or clips and scores these.

    Args:
        reward: the reward.
        decode: from clean latents to pixels in [-1, 1], on ``device``.
        prompts: prompt of every row of the call.
        pixels: pixels of one picture or clip, which limit how many are decoded together.
        device: device that ``decode`` runs on.
        preview: cheaper decoder for what is no sample yet; None for ``decode`` everywhere.
        watch: counts the seconds of decoder and reward.
    """

    def __init__(
        self,
        reward: Reward,
        decode: Callable[[Tensor], Tensor],
        prompts: Sequence[str],
        pixels: int,
        device: torch.device,
        preview: Preview | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self.preview, self.watch = preview, watch or Stopwatch(device)
        self.reward, self.decode, self.prompts, self.device = reward, decode, list(prompts), device
        self.batch_size = max(1, min(reward.batch_size, MAX_PIXELS // max(pixels, 1)))

    def elsewhere(self, device: torch.device) -> bool:
        """Return whether it uses another device, so that it can work while ``device`` is busy."""
        return self.device != device or (self.reward.device is not None and self.reward.device != device)

    def pixels(self, x0: Tensor, *, preview: bool = False) -> Tensor:
        """Decode to pictures (R, 3, H, W), or clips (R, 3, F, H, W), in [0, 1]; by the preview where there is one."""
        with self.watch.part("decode"):
            decode = self.preview.decode if preview and self.preview is not None else self.decode
            return ((decode(x0).float() + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def __call__(self, x0: Tensor, rows: Sequence[int], samples: Sequence[bool] | bool = True) -> list[float]:
        """Return the rewards of ``x0`` (R, C, H, W), by the prompts of the call's ``rows`` (R,).

        ``samples`` says which are results, for which the preview never stands in.
        """
        if self.preview is None or samples is True:
            return self._rewards(x0, rows, preview=False)
        whole = [samples] * len(rows) if isinstance(samples, bool) else list(samples)
        rewards = [0.0] * len(rows)
        for preview in (True, False):
            places = [i for i, sample in enumerate(whole) if sample is not preview]
            part = x0 if len(places) == len(rows) else x0[places]
            scores = self._rewards(part, [rows[i] for i in places], preview=preview) if places else []
            if preview and places and not self.preview.checked:
                self._check(part[:CHECKED], [rows[i] for i in places][:CHECKED], scores[:CHECKED])
            for i, score in zip(places, scores, strict=True):
                rewards[i] = score
        return rewards

    def _rewards(self, x0: Tensor, rows: Sequence[int], *, preview: bool) -> list[float]:
        rewards: list[float] = []
        for latents, prompts in self._batches(x0, rows):
            rewards += self._score(latents, prompts, self.reward, preview=preview).tolist()
        return rewards

    def _check(self, x0: Tensor, rows: Sequence[int], cheap: list[float]) -> None:
        """Compare the preview's rewards with those of the decoder, once, as soon as there are enough."""
        if self.preview is not None and len(cheap) >= ROWS:
            self.preview.checked = True
            warn_of_disagreement(cheap, self._rewards(x0, rows, preview=False))

    def guided(self, x0: Tensor, rows: Sequence[int]) -> tuple[list[float], Tensor]:
        """Return the rewards, and their gradients at ``x0``."""
        rewards: list[float] = []
        gradients = []
        for latents, prompts in self._batches(x0, rows):
            with torch.enable_grad(), differentiable_attention():
                leaf = latents.detach().requires_grad_()
                values = self._score(leaf, prompts, self.reward.graph)
                gradients.append(torch.autograd.grad(values.sum(), leaf)[0])
            rewards += values.detach().double().cpu().tolist()
        return rewards, torch.cat(gradients)

    def _batches(self, x0: Tensor, rows: Sequence[int]) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield the latents that are decoded together, with their prompts."""
        for begin in range(0, len(x0), self.batch_size):
            batch = slice(begin, begin + self.batch_size)
            yield x0[batch], [self.prompts[row] for row in rows[batch]]

    def _score(
        self, x0: Tensor, prompts: list[str], score: Callable[[Tensor, list[str]], Tensor], *, preview: bool = False
    ) -> Tensor:
        """Return the rewards of one batch, ``(b,)``; that of a clip is the mean over its frames."""
        images = x0 if self.reward.input == "latents" else self.pixels(x0, preview=preview)
        with self.watch.part("reward"):
            return self._score_pictures(images, prompts, score)

    def _score_pictures(
        self, images: Tensor, prompts: list[str], score: Callable[[Tensor, list[str]], Tensor]
    ) -> Tensor:
        if self.reward.input == "latents":
            return score(images, prompts)
        if images.ndim == 4 or self.reward.input == "video":
            return score(images, prompts)
        length = images.shape[2]
        places = torch.linspace(0, length - 1, min(length, MAX_FRAMES), dtype=torch.float32, device="cpu")
        chosen = places.round().long().tolist()
        frames = images[:, :, chosen].transpose(1, 2).flatten(0, 1)
        scores = score(frames, [prompt for prompt in prompts for _ in chosen])
        return scores.reshape(len(images), -1).mean(1)
