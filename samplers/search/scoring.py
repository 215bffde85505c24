"""From clean latents to rewards: decode, score, check."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from diffaccel.samplers.rewards.reward import Reward

DECODED = 2**24  # pixels of one decoding
FRAMES = 8  # of a video that a reward of pictures looks at


class Judge:
    """The reward of clean latents.

    Args:
        reward: what scores.
        decode: from clean latents to pixels in [-1, 1], on the device that it decodes on.
        prompts: of every row of the call.
        pixels: of one picture or clip, which sets how many are decoded together.
        device: where it decodes.
    """

    def __init__(
        self,
        reward: Reward,
        decode: Callable[[Tensor], Tensor],
        prompts: Sequence[str],
        pixels: int,
        device: torch.device,
    ) -> None:
        self.reward, self.decode, self.prompts, self.device = reward, decode, list(prompts), device
        self.batch = max(1, min(reward.batch_size, DECODED // max(pixels, 1)))

    def elsewhere(self, device: torch.device) -> bool:
        """Whether its work can go on while ``device`` is busy with other things."""
        return self.device != device or (self.reward.device is not None and self.reward.device != device)

    def pixels(self, x0: Tensor) -> Tensor:
        """Pictures (R, 3, H, W), or clips (R, 3, F, H, W), in [0, 1]."""
        return ((self.decode(x0).float() + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def __call__(self, x0: Tensor, rows: Sequence[int]) -> list[float]:
        """A number a row of ``x0`` (R, C, H, W); ``rows`` are those of the call, whose prompts they are scored by."""
        found: list[float] = []
        for part, prompts in self._parts(x0, rows):
            found += self._of(part, prompts, self.reward).tolist()
        return found

    def guided(self, x0: Tensor, rows: Sequence[int]) -> tuple[list[float], Tensor]:
        """Rewards, and their gradients at ``x0``."""
        found, gradients = [], []
        for part, prompts in self._parts(x0, rows):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                rewards = self._of(leaf, prompts, self.reward.graph)
                gradients.append(torch.autograd.grad(rewards.sum(), leaf)[0])
            found += rewards.detach().double().cpu().tolist()
        return found, torch.cat(gradients)

    def _parts(self, x0: Tensor, rows: Sequence[int]) -> Iterator[tuple[Tensor, list[str]]]:
        """Rows that are decoded together, and their prompts."""
        for begin in range(0, len(x0), self.batch):
            some = slice(begin, begin + self.batch)
            yield x0[some], [self.prompts[row] for row in rows[some]]

    def _of(self, x0: Tensor, prompts: list[str], score: Callable[[Tensor, list[str]], Tensor]) -> Tensor:
        if self.reward.input == "latents":
            return score(x0, prompts)
        images = self.pixels(x0)
        if images.ndim == 4 or self.reward.input == "video":
            return score(images, prompts)
        length = images.shape[2]  # (b, 3, F, H, W): the mean over frames
        chosen = torch.linspace(0, length - 1, min(length, FRAMES)).round().long().tolist()
        frames = images[:, :, chosen].transpose(1, 2).flatten(0, 1)
        scores = score(frames, [prompt for prompt in prompts for _ in chosen])
        return scores.reshape(len(images), -1).mean(1)
