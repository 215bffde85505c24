"""Attention of a training sequence: its frames see each other as its layout says."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffaccel.distill.next_frame.layouts import ClipLayout
from diffaccel.models.next_frame.block import FrameAttention
from diffaccel.models.next_frame.mask import of_tokens
from diffaccel.models.next_frame.rotary import rotate
from diffaccel.models.next_frame.transformer import NextFrameTransformer

Backend = Literal["sdpa", "math"]


class LayoutAttention:
    """Answers the attention of every layer for sequences of one layout.

    Args:
        model: whose tokens and rotary positions the sequence has.
        layout: who sees whom.
        backend: "sdpa": PyTorch's fastest; "math": products and a softmax, through which forward-mode derivatives go.
    """

    def __init__(self, model: NextFrameTransformer, layout: ClipLayout, backend: Backend = "sdpa") -> None:
        self._cos, self._sin = (part[:, :, None] for part in model.rotations(layout.source))
        self._mask = of_tokens(layout.sees, model.tokens)
        self._math = backend == "math"

    def __call__(self, layer: int, attention: FrameAttention, qkv: Tensor) -> Tensor:
        """Return the result of the layer's attention, ``(B, S, n, heads, head_dim)``."""
        query, key, value = attention.normed(qkv)
        shape = query.shape
        query, key = rotate(query, self._cos, self._sin), rotate(key, self._cos, self._sin)
        query, key, value = (part.flatten(1, 2).transpose(1, 2) for part in (query, key, value))  # (B, heads, S n, d)
        if self._math:
            scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
            out = scores.masked_fill(~self._mask, -torch.inf).softmax(-1) @ value
        else:
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self._mask[None, None])
        return out.transpose(1, 2).reshape(shape)
