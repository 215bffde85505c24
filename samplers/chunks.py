"""The sampler of long videos: chunk by chunk from a chunk-causal network, in memory that does not grow.

For a step from level t to r of a flow map, ``x_r = x_t + (r - t) u(x_t, t, r)`` with the mean velocity u (AnyFlow,
arXiv 2605.13724); each chunk begins with noise that depends on its frames' numbers and the seed alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.models.anyflow_far.engine import ChunkEngine, chunk_window
from diffaccel.models.next_frame.engine import check_seeds
from diffaccel.models.next_frame.levels import levels
from diffaccel.models.next_frame.noise import FrameNoise


class ChunkSampler:
    """Draws a video of any length, chunk by chunk, from diffusers' ``AnyFlowFARTransformer3DModel``.

    Args:
        model: the network, on its device.
        height: of a latent frame: an eighth of the video's.
        width: of a latent frame.
        steps: evaluations of a chunk.
        shift: of the noise levels towards noise, as of the pipeline's scheduler.
        first: number of latent frames of the first chunk; None for the network's own.
        chunk: number of latent frames of the others; None for the network's own.
        window: maximum number of latent frames that a chunk looks back at; see :class:`RollingContext`.
        capture: record CUDA graphs once the ring is full. None: on CUDA devices.
        seeds: of the noise, one for each video.

    Raises:
        DiffAccelError: for another network, and options that do not fit to it.
    """

    def __init__(
        self, model: Any, height: int, width: int, steps: int = 4, *, shift: float = 1.0, first: int | None = None,
        chunk: int | None = None, window: int | None = None, capture: bool | None = None, seeds: Sequence[int] = (0,),
    ) -> None:  # fmt: skip
        check_seeds(seeds)
        for name, value in (("first", first), ("chunk", chunk), ("window", window)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise DiffAccelError(f"{name} is {value!r}; it must be a whole number, 1 or more, or None.")
        self.sigmas = levels(steps, shift)
        sizes = chunk_window(model, window, chunk, "ChunkSampler")
        own = model.config.chunk_partition[0]
        self.first, self.chunk = min(own, sizes.chunk) if first is None else first, sizes.chunk
        if self.first > self.chunk:
            raise DiffAccelError(f"first is {self.first} and chunk {self.chunk}; the first chunk is the shorter one.")
        self.engine = ChunkEngine(model, sizes, len(seeds), height, width, capture)
        self.noise = FrameNoise(tuple(seeds), self.engine.memory.cache.device)
        self._text: Tensor | None = None
        # the latest chunk, its text and the number of its first frame: not written yet
        self._pending: tuple[Tensor, Tensor, int] | None = None

    @property
    def frames(self) -> int:
        """Number of latent frames of the video so far."""
        if self._pending is None:
            return self.engine.count
        chunk, _, first = self._pending
        return first + chunk.shape[1]

    def reset(self, text: Tensor, latents: Tensor | None = None) -> None:
        """Begin a video.

        Args:
            text: embedded prompts ``(B, L, channels)`` or ``(1, L, channels)``.
            latents: clean latent frames ``(B, T, C, H, W)`` that the video begins with: whole chunks; None for none.
        """
        text = self._as_text(text)
        latents = None if latents is None else self._as_frames(latents)
        self._text = self._pending = None  # there is no video until its first frames are here
        self.engine.begin()
        begin = 0
        while latents is not None and begin < latents.shape[1]:
            self._write_pending()
            end = begin + self._size()
            self._pending = latents[:, begin:end], text, begin
            begin = end
        self._text = text

    def _as_frames(self, latents: Any) -> Tensor:
        """Return a copy of latent frames ``(B, T, C, H, W)`` for every row, or raise for what is no beginning."""
        if not isinstance(latents, Tensor) or latents.ndim != 5 or not latents.is_floating_point():
            raise DiffAccelError("latents must be a tensor of floats (batch, latent frames, channels, height, width).")
        if not bool(torch.isfinite(latents).all()):
            raise DiffAccelError("latents hold NaN or infinite values; they must be finite.")
        rows, _, *frame = self.engine.shape
        batch, length, *got = latents.shape
        if batch not in (1, rows) or got != frame:
            raise DiffAccelError(
                f"latents are {tuple(latents.shape)}; they must be ({_rows(rows)}, latent frames, "
                f"{', '.join(map(str, frame))}), as (batch, latent frames, channels, height, width)."
            )
        if length < self.first or (length - self.first) % self.chunk:
            raise DiffAccelError(
                f"latents are {length} frames; give {self.first}, {self.first + self.chunk}, "
                f"{self.first + 2 * self.chunk}, ... of them: whole chunks."
            )
        cache = self.engine.memory.cache
        return latents.to(cache.device, cache.dtype).expand(rows, -1, -1, -1, -1).clone()  # callers may reuse theirs

    @torch.no_grad()
    def step(self, text: Tensor | None = None) -> Tensor:
        """Return the next chunk ``(B, T, C, H, W)`` of latent frames, in the network's dtype.

        Args:
            text: embedded prompts from here on; None for those so far. What earlier frames mean stays as it was.
        """
        if self._text is None:
            raise DiffAccelError("There is no video yet. Call reset(text) first.")
        if text is not None:
            self._text = self._as_text(text)
        self._write_pending()
        cache = self.engine.memory.cache
        batch, _, *frame = self.engine.shape
        precise = torch.float64 if cache.dtype == torch.float64 else torch.float32
        x = torch.zeros(batch, self._size(), *frame, dtype=precise, device=cache.device)
        for j in range(x.shape[1]):
            self.noise.fill(x[:, j], self.engine.count + j, 0)
        for level, next_level in zip(self.sigmas, self.sigmas[1:], strict=False):
            begin, end = (torch.full((batch,), 1000 * t, dtype=torch.float32, device=cache.device)
                          for t in (level, next_level))  # fmt: skip
            velocity = self.engine.velocity(x, begin, end, self._text)
            x = x + (next_level - level) * velocity
        drawn = x.to(cache.dtype)
        self._pending = drawn, self._text, self.engine.count
        return drawn.clone()

    def chunks(self, count: int) -> Iterator[Tensor]:
        """Yield the next ``count`` chunks, one after the other."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise DiffAccelError(f"count is {count!r}; it must be a whole number of chunks.")
        for _ in range(count):
            yield self.step()

    def _size(self) -> int:
        """Return the number of frames of the next chunk."""
        return self.chunk if self.frames else self.first

    def _write_pending(self) -> None:
        """Let the engine have the latest chunk; what an interrupt leaves undone is done by the next call."""
        if self._pending is not None:
            chunk, text, first = self._pending
            if self.engine.count == first:  # else it has it
                self.engine.keep(chunk, text)
            self._pending = None

    def _as_text(self, text: Any) -> Tensor:
        """Return embedded prompts for every row."""
        channels = self.engine.model.config.text_dim
        rows = self.engine.batch
        if (
            not isinstance(text, Tensor) or text.ndim != 3 or text.shape[0] not in (1, rows)
            or text.shape[1] == 0 or text.shape[2] != channels or not text.is_floating_point()
        ):  # fmt: skip
            got = tuple(text.shape) if isinstance(text, Tensor) else type(text).__name__
            raise DiffAccelError(
                f"text is {got}; it must be embedded prompts ({_rows(rows)}, tokens, {channels}), such as the "
                "pipeline's encode_prompt returns."
            )
        cache = self.engine.memory.cache
        if not bool(torch.isfinite(text).all()):
            raise DiffAccelError("text holds NaN or infinite values; they must be finite.")
        return text.to(cache.device, cache.dtype).expand(rows, -1, -1).clone()  # callers may reuse theirs


def _rows(rows: int) -> str:
    """Return the numbers of rows that are right, for a message."""
    return "1" if rows == 1 else f"{rows} or 1"
