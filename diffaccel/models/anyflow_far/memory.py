"""Where the keys of one evaluation lie: the ring of compressed frames, behind it the whole chunks, then the drawn one.

The memory of a layer is ``[ring | whole chunks | drawn chunk | zeros]``. The ring fills from its end, so that what an
evaluation sees is one piece without a mask. The zeros are keys that the network's own attention sees: it pads a drawn
chunk to a multiple of 128 tokens, and hides the padding only where it writes keys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffaccel.models.anyflow_far.grid import ChunkGrid
from diffaccel.models.next_frame.cache import FrameCache

PADDED_TO = 128


@dataclass(frozen=True)
class ChunkPlace:
    """Where the frames of one evaluation lie; all of it is known to the host, so that it names a recorded evaluation.

    Attributes:
        kind: "far" frames are written into the ring, compressed; "whole" ones behind it; "drawn" ones, too, and their
            velocity is wanted.
        frames: number of latent frames.
        begin: first token of whole frames, counted from the end of the ring.
        ring: number of the ring's frames that are seen, with those that are written.
        zeros: number of keys of zeros behind them.
    """

    kind: Literal["far", "whole", "drawn"]
    frames: int
    begin: int
    ring: int
    zeros: int = 0

    @property
    def compressed(self) -> bool:
        """Whether a token stands for more of a frame than in a drawn one."""
        return self.kind == "far"


class ChunkMemory:
    """Keys and values of one video; writes and reads of one evaluation after the other.

    Args:
        grid: of its frames.
        batch: number of rows.
        ring: number of compressed frames that are kept.
        whole: number of latent frames at full resolution that are kept, with the largest drawn chunk.

    Attributes:
        origin: id of the frame that the last place of the ring takes first.
    """

    @torch.inference_mode(False)  # it is written in any mode later
    def __init__(self, grid: ChunkGrid, batch: int, ring: int, whole: int) -> None:
        behind = whole * grid.whole_tokens + PADDED_TO
        self.grid, self.whole, self.origin = grid, whole, 0
        self.cache = FrameCache(grid, batch, ring + 1, 0, -(-behind // grid.tokens))
        self.end = ring * grid.tokens  # of the ring, in tokens
        self.clock = torch.zeros((), dtype=torch.int64, device=self.cache.device)  # id of the first frame

    def evaluation(self, place: ChunkPlace) -> Evaluation:
        """Return what answers the attention of the layers of one evaluation, of frames from the clock's on."""
        return Evaluation(self, place)

    @property
    def held(self) -> int:
        """Number of frames in the ring."""
        return self.held_with(0)

    def held_with(self, frames: int) -> int:
        """Return the number of frames in the ring once so many more are written."""
        return min(self.cache.count + frames - self.origin, self.cache.places)

    def slots(self, ids: Tensor) -> Tensor:
        """Return the places ``(T,)`` of frames in the ring, which fills from its end."""
        return self.cache.places - 1 - (ids - self.origin) % self.cache.places

    def grown(self, ring: int) -> ChunkMemory:
        """Return memory with a ring of more frames that holds those of this one; what lies behind it is not kept."""
        old, tokens = self.cache, self.grid.tokens
        other = ChunkMemory(self.grid, old.batch, ring, self.whole)
        new, other.origin = other.cache, old.count - self.held
        ids = torch.arange(other.origin, old.count, dtype=torch.int64, device=old.device)
        before, after = self.slots(ids), other.slots(ids)
        for source, target in ((old.keys, new.keys), (old.rotated, new.rotated), (old.values, new.values)):
            frames = source.unflatten(3, (-1, tokens)).index_select(3, before)
            target.unflatten(3, (-1, tokens)).index_copy_(3, after, frames)
        new.ids.index_copy_(0, after, ids)
        new.count, new.base = old.count, old.base
        new.device_base.fill_(old.base)
        return other

    def clear_zeros(self, place: ChunkPlace) -> None:
        """Write the zeros behind a drawn chunk."""
        begin = self.end + place.begin + place.frames * self.grid.whole_tokens
        for part in (self.cache.rotated, self.cache.values):
            part[..., begin : begin + place.zeros, :].zero_()


class Evaluation:
    """Self-attention of one evaluation: writes keys and values of its frames, and looks at all that they may see."""

    def __init__(self, memory: ChunkMemory, place: ChunkPlace) -> None:
        self.memory, self.place = memory, place
        cache, grid = memory.cache, memory.grid
        ids = memory.clock + torch.arange(place.frames, dtype=torch.int64, device=cache.device)
        self.times = ids - cache.device_base
        self.seen = slice(memory.end - place.ring * grid.tokens, memory.end)
        if place.compressed:
            slots = memory.slots(ids)
            cache.ids.index_copy_(0, slots, ids)
            inside = torch.arange(grid.tokens, dtype=torch.int64, device=cache.device)
            self.tokens = (slots[:, None] * grid.tokens + inside).flatten()
        else:
            begin = memory.end + place.begin
            self.written = slice(begin, begin + place.frames * grid.whole_tokens)
            self.seen = slice(self.seen.start, self.written.stop + place.zeros)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return attention ``(B, heads, L, head_dim)`` of queries, keys and values of that shape before rotation."""
        place, cache, grid = self.place, self.memory.cache, self.memory.grid
        rotated, values = cache.rotated[layer], cache.values[layer]
        turned = grid.rotate(key, self.times, place.compressed)
        if place.compressed:
            cache.keys[layer].index_copy_(2, self.tokens, key)
            rotated.index_copy_(2, self.tokens, turned)
            values.index_copy_(2, self.tokens, value)
        else:
            rotated[:, :, self.written] = turned
            values[:, :, self.written] = value
        query = grid.rotate(query, self.times, place.compressed)
        return torch.nn.functional.scaled_dot_product_attention(
            query, rotated[:, :, self.seen], values[:, :, self.seen]
        )


@dataclass(frozen=True)
class LayerEvaluation:
    """One layer's part of an evaluation; what a block is given for its cache."""

    evaluation: Evaluation
    layer: int

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention of the layer; what is compiled around it is the same for all layers and places."""
        return self.evaluation.attend(self.layer, query, key, value)


class RingProcessor:
    """Computes a block's self-attention by the evaluation that the block was given for its cache."""

    def __call__(self, attn: Any, hidden_states: Tensor, kv_cache: LayerEvaluation, **_: Any) -> Tensor:
        """Return the attention's output ``(B, L, channels)``."""
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        parts = (attn.norm_q(query), attn.norm_k(key), value)
        heads = [part.to(hidden_states.dtype).unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in parts]
        seen = kv_cache.attend(*heads)
        out = seen.transpose(1, 2).flatten(2).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](out))


_PROCESSOR = RingProcessor()


@contextlib.contextmanager
def ring_attention(model: Any) -> Iterator[None]:
    """Let the self-attention of a network's blocks be computed by the ring within the block."""
    attentions = [block.attn1 for block in model.blocks]
    before = [attention.processor for attention in attentions]
    try:
        for attention in attentions:
            attention.processor = _PROCESSOR
        yield
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor
