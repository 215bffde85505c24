"""The blocks of Stable Diffusion 3 on text and image tokens; their attention runs as it is."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero
from torch import Tensor, nn

from diffaccel.kernels.streams import gated_sums, norm_modulate
from diffaccel.modules.fused.forward import BlockKind
from diffaccel.modules.fused.plain_parts import is_bare_norm, reason_of_call
from diffaccel.modules.fused.steps import feed_forward_of, normed_streams, reason_of_feed_forward, reason_of_norm


def joint_reason(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> str | None:  # fmt: skip
    """Return why a block is left to its own forward, or None."""
    if block.use_dual_attention:
        return "it has two attentions"
    if block._chunk_size is not None:
        return "its feed-forward runs in chunks"
    is_last = block.context_pre_only
    norms = [block.norm1.norm, block.norm1_context.norm, block.norm2, *([] if is_last else [block.norm2_context])]
    if not all(map(is_bare_norm, norms)) or len({norm.eps for norm in norms}) > 1:
        return "its norms are not the stock ones"
    return (
        reason_of_call(hidden_states)
        or reason_of_norm(block.norm1, AdaLayerNormZero)
        or reason_of_norm(block.norm1_context, AdaLayerNormContinuous if is_last else AdaLayerNormZero)
        or reason_of_feed_forward(block.ff)
        or (None if is_last else reason_of_feed_forward(block.ff_context))
    )


def joint(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None, *, folded: bool,
) -> tuple[Tensor | None, Tensor]:  # fmt: skip
    """Return the streams (text, images) after a block; no text after the last."""
    text, image, norm_of_text = encoder_hidden_states, hidden_states, block.norm1_context
    emb = block.norm1.linear(block.norm1.silu(temb)).chunk(6, dim=1)
    text_emb: tuple[Tensor, ...]
    if block.context_pre_only:
        scale, shift = norm_of_text.linear(norm_of_text.silu(temb).to(text.dtype)).chunk(2, dim=1)
        text_emb = (shift, scale)
    else:
        text_emb = norm_of_text.linear(norm_of_text.silu(temb)).chunk(6, dim=1)
    streams = [(text, text_emb[1], text_emb[0]), (image, emb[1], emb[0])]
    _, (normed_text, normed) = norm_modulate(streams, block.norm1.norm.eps, folded=folded)
    attended, attended_text = block.attn(
        hidden_states=normed, encoder_hidden_states=normed_text, **(joint_attention_kwargs or {})
    )
    streams, gated, feed_forwards = [(image, emb[4], emb[3])], [(attended, emb[2])], [block.ff]
    gates = [emb[5]]
    if not block.context_pre_only:
        streams.insert(0, (text, text_emb[4], text_emb[3]))
        gated.insert(0, (attended_text, text_emb[2]))
        feed_forwards.insert(0, block.ff_context)
        gates.insert(0, text_emb[5])
    readers: list[list[nn.Module]] = [[layers.net[0].proj] for layers in feed_forwards]
    sums, inputs = normed_streams(streams, block.norm2.eps, readers, folded, gated)
    outputs = [feed_forward_of(*parts) for parts in zip(feed_forwards, inputs, sums, strict=True)]
    results = gated_sums(list(zip(outputs, gates, sums, strict=True)))
    return (None if block.context_pre_only else results[0]), results[-1]


KINDS = (BlockKind(JointTransformerBlock, joint_reason, joint),)
