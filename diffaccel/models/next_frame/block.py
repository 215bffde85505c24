"""One layer of the network: attention over frames and a multilayer perceptron, modulated per frame by adaLN-zero.

Modulation depends on a frame's noise level and action only, so it has one row a frame and none a token
(arXiv 2212.09748).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Attend(Protocol):
    """Answers the attention of one layer, from queries, keys and values in one piece.

    They are ``(B, T, n, 3, heads, head_dim)``. Queries and keys are still to be normed, by
    :meth:`FrameAttention.normed`, and rotated.
    """

    def __call__(self, layer: int, attention: FrameAttention, qkv: Tensor) -> Tensor:
        """Return the result of the layer's attention, ``(B, T, n, heads, head_dim)``."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return ``norm(x) (1 + scale) + shift`` for tokens ``(B, T, n, d)`` and rows ``(B, T, d)`` of their frames."""
    normed = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift[:, :, None], normed, 1 + scale[:, :, None])


class FrameAttention(nn.Module):
    """Weights of a layer's attention; who sees whom is the caller's."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.to_qkv = nn.Linear(dim, 3 * heads * head_dim)
        self.norm_q = nn.RMSNorm(head_dim, eps=1e-6)
        self.norm_k = nn.RMSNorm(head_dim, eps=1e-6)
        self.to_out = nn.Linear(heads * head_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return queries, keys and values ``(B, T, n, 3, heads, head_dim)``."""
        return self.to_qkv(x).unflatten(-1, (3, self.heads, self.head_dim))

    def normed(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys after their RMS norm, and values: ``(B, T, n, heads, head_dim)`` each."""
        query, key, value = qkv.unbind(-3)
        return self.norm_q(query).to(value.dtype), self.norm_k(key).to(value.dtype), value


class NextFrameBlock(nn.Module):
    """``x += gate1 attention(modulated x)``, then ``x += gate2 mlp(modulated x)``.

    Args:
        own_modulation: whether the layer makes its six modulation rows itself; otherwise it adds a bias of its own to
            rows that all layers share.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_ratio: float, own_modulation: bool) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.attn = FrameAttention(dim, heads, head_dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        self.modulation = nn.Linear(dim, 6 * dim) if own_modulation else None
        self.modulation_bias = None if own_modulation else nn.Parameter(torch.zeros(6 * dim))

    def forward(self, x: Tensor, condition: Tensor, layer: int, attend: Attend) -> Tensor:
        """Return tokens ``(B, T, n, d)``.

        Args:
            x: tokens of that shape.
            condition: of each frame, ``(B, T, d)`` after its activation, or the shared rows ``(B, T, 6 d)``.
            layer: number of this layer, for ``attend``.
            attend: answers the attention.
        """
        rows, qkv = self.before(x, condition)
        return self.after(x, rows, attend(layer, self.attn, qkv))

    def before(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return the modulation rows ``(B, T, 6 d)``, and queries, keys and values in one piece."""
        rows = condition if self.modulation is None else self.modulation(condition)
        if self.modulation_bias is not None:
            rows = rows + self.modulation_bias
        shift, scale = rows.chunk(6, -1)[:2]
        return rows, self.attn(modulate(x, shift, scale))

    def after(self, x: Tensor, rows: Tensor, attended: Tensor) -> Tensor:
        """Return the layer's tokens from the result of its attention."""
        _, _, gate1, shift, scale, gate2 = rows.chunk(6, -1)
        x = torch.addcmul(x, gate1[:, :, None], self.attn.to_out(attended.flatten(-2)))
        return torch.addcmul(x, gate2[:, :, None], self.mlp(modulate(x, shift, scale)))

    def compile_around_attention(self, **options: Any) -> None:
        """Compile all of the layer but its attention, whose memory lies outside; ``options`` are of torch.compile."""
        self.before = torch.compile(self.before, **options)  # type: ignore[method-assign]
        self.after = torch.compile(self.after, **options)  # type: ignore[method-assign]

    def uncompile(self) -> None:
        """Undo :meth:`compile_around_attention`."""
        for name in ("before", "after"):
            vars(self).pop(name, None)
