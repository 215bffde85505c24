"""The blocks of Wan around their attentions: norms, modulation and gates in fp32."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor

from diffaccel.kernels.streams import gated_sum_fp32, modulate_fp32
from diffaccel.modules.fused.forward import BlockKind
from diffaccel.modules.fused.plain_parts import is_plain, reason_of_call
from diffaccel.modules.fused.steps import feed_forward_of, reason_of_feed_forward

Rotary = tuple[Tensor, Tensor]


def _is_bare(norm: Any) -> bool:
    return type(norm) is FP32LayerNorm and norm.weight is None and norm.bias is None and is_plain(norm)


def wan_reason(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Rotary
) -> str | None:
    """Return why a block is left to its own forward, or None."""
    if temb.ndim != 3:
        return "its tokens have times of their own"
    if not (_is_bare(block.norm1) and _is_bare(block.norm3)):
        return "its norms are not the stock ones"
    return reason_of_call(hidden_states) or reason_of_feed_forward(block.ffn)


def _modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    normed = F.layer_norm(x.float(), norm.normalized_shape, None, None, norm.eps)
    return modulate_fp32(normed, scale, shift, x.dtype)


def wan(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Rotary, *, folded: bool
) -> Tensor:
    """Return the tokens after a block; the norms are torch's own, also where ``folded``."""
    vectors = (block.scale_shift_table + temb.float()).unbind(dim=1)
    shift, scale, gate, shift_of_layers, scale_of_layers, gate_of_layers = vectors
    x = hidden_states
    attended = block.attn1(_modulated(block.norm1, x, scale, shift), None, None, rotary_emb)
    x = gated_sum_fp32(attended, gate, x)
    normed = block.norm2(x.float()).type_as(x)
    x = x + block.attn2(normed, encoder_hidden_states, None, None)
    output = feed_forward_of(block.ffn, _modulated(block.norm3, x, scale_of_layers, shift_of_layers), x)
    return gated_sum_fp32(output, gate_of_layers, x)


KINDS = (BlockKind(WanTransformerBlock, wan_reason, wan),)
