"""Attention of one evaluation to the ring of earlier frames: some frames are written into it, others are drafts.

The frames of an evaluation are ``[written | drafts]``: committed frames of which keys and values are kept, then frames
that are being drawn. Both in one evaluation equal one after the other, since no frame sees a later one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.kernels.frame_attention import frame_attention
from diffaccel.kernels.frame_keys import frame_keys
from diffaccel.models.next_frame import mask
from diffaccel.models.next_frame.block import FrameAttention
from diffaccel.models.next_frame.cache import FrameCache
from diffaccel.models.next_frame.transformer import NextFrameTransformer


class CachedAttention:
    """Answers the attention of all layers of one evaluation; see :class:`Attend`.

    Nothing of it depends on numbers of the host except the two counts, so that a recorded evaluation serves all rounds
    with these counts.

    Args:
        cache: ring of earlier frames.
        clock: id of the first draft, on the device: ``()``.
        written: number m of frames with the ids ``clock - m .. clock - 1``, which are written into the ring.
        visible: ``(N, N)``, which draft sees which; None for N drafts of one future, with the ids ``clock`` and on,
            each of which sees those before it. With it, all drafts have the id ``clock``.
        drafts: number N of drafts.
    """

    def __init__(
        self, cache: FrameCache[NextFrameTransformer], clock: Tensor, written: int, drafts: int,
        visible: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.cache, self.written, self.drafts = cache, written, drafts
        offsets = torch.arange(-written, drafts, dtype=torch.int64, device=cache.device)
        if visible is not None:
            offsets = offsets.clamp(max=0)
        self.ids = clock + offsets
        self._slots = self.ids[:written] % cache.places
        if written:
            cache.ids.index_copy_(0, self._slots, self.ids[:written])
        self._frames = mask.band(self.ids, torch.cat([cache.ids, self.ids[written:]]), cache.window)
        if visible is not None:
            self._frames[written:, cache.places :] &= visible
        self._cos, self._sin = cache.model.rotations(self.ids - cache.device_base)
        behind = torch.arange(cache.places, cache.places + drafts, dtype=torch.int64, device=cache.device)
        self._places = torch.cat([self._slots, behind])

    def __call__(self, layer: int, attention: FrameAttention, qkv: Tensor) -> Tensor:
        """Return the attention of a layer."""
        cache = self.cache
        query = frame_keys(
            qkv, attention.norm_q.weight, attention.norm_k.weight, self._cos, self._sin, self._places, self.written,
            cache.keys[layer], cache.rotated[layer], cache.values[layer],
        )  # fmt: skip
        seen = slice(0, (cache.places + self.drafts) * cache.tokens)
        out = frame_attention(
            query, cache.rotated[layer, :, :, seen], cache.values[layer, :, :, seen], self._frames, cache.tokens
        )
        return out.transpose(1, 2).unflatten(1, qkv.shape[1:3])
