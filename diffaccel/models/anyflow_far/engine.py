"""Chunks of a video on a ring of fixed memory: what is kept from chunk to chunk, and evaluations as graphs.

A drawn chunk looks back at the latest chunks at full resolution, and at those before them compressed. Compressed frames
see compressed ones alone, so that what was computed of them stays right for good: of the context, one chunk is
compressed when it leaves the full resolution, and the latest ones are written anew. The stock pipeline writes the whole
context anew after every chunk; while the ring holds it all, the results are equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.models.anyflow_far.grid import ChunkGrid, check_network
from diffaccel.models.anyflow_far.memory import PADDED_TO, ChunkMemory, ChunkPlace
from diffaccel.models.anyflow_far.network import evaluate
from diffaccel.models.next_frame.cache import REBASE
from diffaccel.models.next_frame.engine import backend_for
from diffaccel.modules.capture.graphs import Graph


@dataclass(frozen=True)
class ChunkWindow:
    """How far a drawn chunk looks back, in latent frames.

    Attributes:
        chunk: maximum number of frames of a chunk.
        whole: maximum number of frames that are kept at full resolution.
        far: number of compressed frames that are kept beside so many; beside fewer, as many more.
    """

    chunk: int
    whole: int
    far: int


def chunk_window(model: Any, window: int | None, chunk: int | None, whose: str) -> ChunkWindow:
    """Return how far chunks look back.

    Args:
        model: the network.
        window: maximum number of latent frames that a chunk looks back at; None for as many as the last chunk of the
            network's own video has behind it.
        chunk: maximum number of latent frames of a chunk; None for the network's own.
        whose: name of what asks, for messages.

    Raises:
        DiffAccelError: for another network, and a window that holds no compressed frame.
    """
    check_network(model, whose)
    own = tuple(model.config.chunk_partition)
    chunk = max(own) if chunk is None else chunk
    limit = model.config.full_chunk_limit
    whole = (limit - 1) * chunk
    # longer chunks than the network's own have its ring at least, shorter ones fill what they leave of the window
    far = max(sum(own[:-limit]), sum(own[:-1]) - whole, chunk) if window is None else window - whole
    if far < chunk:
        raise DiffAccelError(
            f"{whose}: window is {window} latent frames, and the network looks back at {limit - 1} whole chunks of up "
            f"to {chunk} frames and at compressed ones before them; it must be {whole + chunk} or more."
        )
    if far > REBASE or whole + chunk > REBASE:
        raise DiffAccelError(f"{whose}: a window of {far + whole} latent frames is too long; {REBASE} are the most.")
    return ChunkWindow(chunk, whole, far)


class ChunkEngine:
    """Memory and evaluations of the videos of one batch.

    Args:
        model: an ``AnyFlowFARTransformer3DModel``, in evaluation mode.
        window: how far a chunk looks back.
        batch: number of rows.
        height: of a latent frame.
        width: of a latent frame.
        capture: whether evaluations are recorded as CUDA graphs once the ring is full; None where the model is on a
            CUDA device.

    Attributes:
        count: number of latent frames that are decided.
        evaluations: number of network calls so far.
        captures: number of graphs recorded so far.
    """

    @torch.inference_mode(False)  # its memory is written in any mode later
    def __init__(
        self, model: Any, window: ChunkWindow, batch: int, height: int, width: int, capture: bool | None = False
    ) -> None:
        self.model, self.window, self.batch = model, window, batch
        grid = ChunkGrid(model, height, width)
        self._backend = backend_for(capture, grid.key_weight.device)
        self.memory = ChunkMemory(grid, batch, window.far, window.whole + window.chunk)
        self._pool = None if self._backend is None else self._backend.new_pool()
        self._graphs: dict[Hashable, Graph] = {}
        self._weights: list[Any] = []
        cache = self.memory.cache
        shape = (batch, window.chunk, model.config.in_channels, height, width)
        self._latents = torch.zeros(shape, dtype=cache.dtype, device=cache.device)  # (B, T, C, H, W)
        self._velocity = torch.zeros(
            *shape[:2], model.config.out_channels, height, width, dtype=cache.dtype, device=cache.device
        )
        self._levels = torch.zeros(2, batch, dtype=torch.float32, device=cache.device)
        self._text: Tensor | None = None
        self.recent: list[Tensor] = []  # whole chunks, the oldest first
        self.count = self.evaluations = self.captures = 0

    @property
    def bytes(self) -> int:
        """Bytes of keys and values."""
        return self.memory.cache.bytes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape ``(B, T, C, H, W)`` of the largest chunk."""
        return tuple(self._latents.shape)

    def begin(self) -> None:
        """Forget all frames; addresses stay, but those of a ring that short chunks made larger."""
        if self.memory.cache.places != self.window.far:
            self._remember(ChunkMemory(self.memory.grid, self.batch, self.window.far, self.memory.whole))
        self.memory.cache.clear()
        self.recent, self.count = [], 0
        if (weights := _weights_of(self.model)) != self._weights:
            self._graphs.clear()  # they read the weights where these were
            self._weights = weights

    @torch.no_grad()
    def velocity(self, latents: Tensor, level: Tensor, next_level: Tensor, text: Tensor) -> Tensor:
        """Return the mean velocity ``(B, T, C, H, W)`` of the next chunk, in memory that the next call overwrites.

        Args:
            latents: ``(B, T, C, H, W)`` at the level.
            level: timesteps ``(B,)`` in thousandths.
            next_level: timesteps ``(B,)`` at which the step ends.
            text: embedded prompts ``(B, L, text channels)``.
        """
        frames = self._check(latents, text)
        begin = sum(chunk.shape[1] for chunk in self.recent) * self.memory.grid.whole_tokens
        zeros = -frames * self.memory.grid.whole_tokens % PADDED_TO
        place = ChunkPlace("drawn", frames, begin, self._seen(), zeros)
        self.memory.clear_zeros(place)
        self._run(place, latents, self.count, level, next_level, text)
        return self._velocity[:, :frames]

    @torch.no_grad()
    def keep(self, latents: Tensor, text: Tensor) -> None:
        """Decide on the next chunk, ``(B, T, C, H, W)`` and clean, and write what later ones see of the context.

        Frames are counted at the end: a call that was interrupted is made again with the same chunk, to the same bits.
        """
        self._check(latents, text)
        level = torch.zeros(self.batch, dtype=torch.float32, device=self.memory.cache.device)
        recent, count = [*self.recent, latents.detach().clone()], self.count + latents.shape[1]
        if len(recent) == self.model.config.full_chunk_limit:
            far = recent.pop(0)
            whole = sum(chunk.shape[1] for chunk in recent)
            if self.memory.cache.count < count - whole:  # else it was noted before an interrupt
                self._make_room(far.shape[1], whole)
                cache, ring = self.memory.cache, self.memory.held_with(far.shape[1])
                self._run(ChunkPlace("far", far.shape[1], 0, ring), far, cache.count, level, level, text)
                cache.note(far.shape[1])
        begin, first = 0, count - sum(chunk.shape[1] for chunk in recent)
        for chunk in recent:
            frames = chunk.shape[1]
            self._run(ChunkPlace("whole", frames, begin, self._seen()), chunk, first, level, level, text)
            begin, first = begin + frames * self.memory.grid.whole_tokens, first + frames
        self.recent, self.count = recent, count

    def _make_room(self, frames: int, whole: int) -> None:
        """Give the ring the places that the window has left where whole chunks are shorter than the ring was made for.

        Args:
            frames: number that will be written into the ring.
            whole: number of frames that stay at full resolution.
        """
        memory, ring = self.memory, self.window.far + self.window.whole - whole
        if memory.held + frames > memory.cache.places < ring:
            self._remember(memory.grown(ring))

    def _remember(self, memory: ChunkMemory) -> None:
        """Take other memory; graphs are of the addresses of the one before."""
        self._graphs.clear()
        self.memory = memory

    def _seen(self) -> int:
        """Return the number of the ring's frames."""
        return self.memory.held

    def _run(
        self, place: ChunkPlace, latents: Tensor, first: int, level: Tensor, next_level: Tensor, text: Tensor
    ) -> None:  # fmt: skip
        """Make one evaluation of frames from the id ``first`` on, from memory whose addresses stay."""
        self._latents[:, : place.frames].copy_(latents)
        self._levels[0].copy_(level)
        self._levels[1].copy_(next_level)
        self.memory.clock.fill_(first)
        if self._text is None or self._text.shape != text.shape:
            with torch.inference_mode(False):
                self._text = torch.zeros(text.shape, dtype=self.memory.cache.dtype, device=self.memory.cache.device)
            self._graphs.clear()
        kept = self._text.copy_(text)
        self.evaluations += 1
        self._launch(place, lambda: self._evaluate(place, kept))

    def _evaluate(self, place: ChunkPlace, text: Tensor) -> None:
        latents = self._latents[:, : place.frames]
        level, next_level = self._levels
        velocity = evaluate(self.model, self.memory, place, latents, level, next_level, text)
        if velocity is not None:
            self._velocity[:, : place.frames].copy_(velocity)

    def _launch(self, place: ChunkPlace, function: Callable[[], Any]) -> None:
        """Run a function of this object's memory; by its graph from the second time on, once the ring is full."""
        if self._backend is None or place.ring < self.memory.cache.places:
            function()
        elif (graph := self._graphs.get(place)) is not None:
            graph.replay()
        else:
            self._backend.warm_up(function)  # this is the run itself
            self._graphs[place] = self._backend.record(function, self._pool)[0]
            self.captures += 1

    def _check(self, latents: Tensor, text: Tensor) -> int:
        """Return the number of frames of a chunk, or raise for one that the memory was not made for."""
        self.memory.cache.check(self.memory.grid, latents.shape[0])
        batch, most, *frame = self.shape
        if latents.ndim != 5 or not 1 <= latents.shape[1] <= most or list(latents.shape[2:]) != frame:
            raise DiffAccelError(
                f"A chunk is {tuple(latents.shape)}; the memory is for ({batch}, 1 to {most}, "
                f"{', '.join(map(str, frame))}), as (batch, latent frames, channels, height, width). For longer chunks "
                "give chunk=."
            )
        if text.ndim != 3 or text.shape[0] != batch:
            raise DiffAccelError(f"The text is {tuple(text.shape)}; it must be ({batch}, tokens, channels).")
        return int(latents.shape[1])


def _weights_of(model: Any) -> list[Any]:
    """Return what tells that graphs of a network are still right: where its weights lie, and the scale of adapters."""
    places: list[Any] = [part.data_ptr() for part in (*model.parameters(), *model.buffers())]
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            adapters = (getattr(module, name, None) for name in ("active_adapters", "disable_adapters"))
            places.append(repr((module.scaling, *adapters)))
    return places
