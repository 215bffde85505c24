"""The blocks of FLUX: double ones on text and image tokens, single ones on both as one stream."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from diffaccel.kernels.activate_rows import gelu_codes, gelu_joined
from diffaccel.kernels.quantize_rows import quantize_rows
from diffaccel.kernels.rope import Projections, joint_heads
from diffaccel.kernels.streams import gated_sums, joined_tokens
from diffaccel.modules.fused.codes import codes_of, product
from diffaccel.modules.fused.forward import BlockKind
from diffaccel.modules.fused.plain_parts import (
    is_bare_norm,
    is_head_norm,
    is_idle_dropout,
    is_plain,
    reason_of_call,
    reason_of_processor,
)
from diffaccel.modules.fused.steps import (
    feed_forward_of,
    normed_streams,
    products_of,
    reason_of_feed_forward,
    reason_of_norm,
)

Rotary = tuple[Tensor, Tensor]
_HALF_LARGEST = 65504


def _reason_of_attention(attention: Any) -> str | None:
    if type(attention) is not FluxAttention or not is_plain(attention):
        return "its attention is not the stock one"
    norms = [attention.norm_q, attention.norm_k]
    if attention.added_kv_proj_dim is not None:
        norms += [attention.norm_added_q, attention.norm_added_k]
    if not all(map(is_head_norm, norms)) or len({norm.eps for norm in norms}) > 1:
        return "the norms of its heads are not the stock ones"
    return reason_of_processor(attention, FluxAttnProcessor)


def double_reason(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    image_rotary_emb: Rotary | None = None, joint_attention_kwargs: dict[str, Any] | None = None,
) -> str | None:  # fmt: skip
    """Return why a double block is left to its own forward, or None."""
    if joint_attention_kwargs:
        return f"its attention is given {', '.join(sorted(joint_attention_kwargs))}"
    norms = [block.norm2, block.norm2_context, block.norm1.norm, block.norm1_context.norm]
    if not all(map(is_bare_norm, norms)) or len({norm.eps for norm in norms}) > 1:
        return "its norms are not the stock ones"
    return (
        reason_of_call(hidden_states)
        or reason_of_norm(block.norm1, AdaLayerNormZero)
        or reason_of_norm(block.norm1_context, AdaLayerNormZero)
        or _reason_of_attention(block.attn)
        or (None if is_idle_dropout(block.attn.to_out[1]) else "its dropout is on")
        or reason_of_feed_forward(block.ff)
        or reason_of_feed_forward(block.ff_context)
    )


def single_reason(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    image_rotary_emb: Rotary | None = None, joint_attention_kwargs: dict[str, Any] | None = None,
) -> str | None:  # fmt: skip
    """Return why a single block is left to its own forward, or None."""
    if joint_attention_kwargs:
        return f"its attention is given {', '.join(sorted(joint_attention_kwargs))}"
    if type(block.act_mlp) is not nn.GELU or block.act_mlp.approximate != "tanh" or not is_plain(block.act_mlp):
        return "its activation is not the stock one"
    return (
        reason_of_call(hidden_states)
        or reason_of_norm(block.norm, AdaLayerNormZeroSingle)
        or _reason_of_attention(block.attn)
    )


def _readers(attention: Any, added: bool) -> list[nn.Module]:
    """Return the layers that make q, k and v of one stream."""
    if attention.fused_projections:
        return [attention.to_added_qkv if added else attention.to_qkv]
    if added:
        return [attention.add_q_proj, attention.add_k_proj, attention.add_v_proj]
    return [attention.to_q, attention.to_k, attention.to_v]


def _heads_in(products: list[Tensor]) -> Projections:
    q, k, v = products if len(products) == 3 else products[0].chunk(3, dim=-1)
    return q, k, v


def _attend(attention: Any, heads: Projections) -> Tensor:
    """Return attention of heads ``(B, T, H, Dh)`` as tokens ``(B, T, H Dh)``."""
    query, key, value = heads
    processor = attention.processor
    tokens = dispatch_attention_fn(
        query, key, value, attn_mask=None, backend=processor._attention_backend, parallel_config=None
    )
    return tokens.flatten(2, 3).to(query.dtype)


def double(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    image_rotary_emb: Rotary | None = None, joint_attention_kwargs: dict[str, Any] | None = None, *, folded: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the streams (text, images) after a double block."""
    text, image, attention = encoder_hidden_states, hidden_states, block.attn
    emb = block.norm1.linear(block.norm1.silu(temb)).chunk(6, dim=1)
    text_emb = block.norm1_context.linear(block.norm1_context.silu(temb)).chunk(6, dim=1)
    readers = [_readers(attention, True), _readers(attention, False)]
    streams = [(text, text_emb[1], text_emb[0]), (image, emb[1], emb[0])]
    _, normed = normed_streams(streams, block.norm1.norm.eps, readers, folded)
    inputs = zip(readers, normed, (text, image), strict=True)
    heads = joint_heads(
        [_heads_in(products_of(linears, x, like)) for linears, x, like in inputs],
        [(attention.norm_added_q.weight, attention.norm_added_k.weight),
         (attention.norm_q.weight, attention.norm_k.weight)],
        image_rotary_emb, attention.head_dim, attention.norm_q.eps,
    )  # fmt: skip
    attended = _attend(attention, heads).split_with_sizes([text.shape[1], image.shape[1]], dim=1)
    attended_text, attended_image = (_projected(attention.to_add_out, attended[0]),
                                     _projected(attention.to_out[0], attended[1]))  # fmt: skip
    streams = [(text, text_emb[4], text_emb[3]), (image, emb[4], emb[3])]
    readers = [[block.ff_context.net[0].proj], [block.ff.net[0].proj]]
    gated = [(attended_text, text_emb[2]), (attended_image, emb[2])]
    (text, image), normed = normed_streams(streams, block.norm2.eps, readers, folded, gated)
    outputs = (feed_forward_of(block.ff_context, normed[0], text), feed_forward_of(block.ff, normed[1], image))
    text, image = gated_sums([(outputs[0], text_emb[5], text), (outputs[1], emb[5], image)])
    return _clipped(text), image


def _projected(linear: nn.Module, x: Tensor) -> Tensor:
    """Return a linear layer of tokens, which it is given as codes of contiguous rows where it takes codes."""
    codes = codes_of([linear])
    if codes is None:
        output: Tensor = linear(x.contiguous())
        return output
    return product(linear, quantize_rows(x.reshape(-1, x.shape[2]), codes), x)


def single(
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor,
    image_rotary_emb: Rotary | None = None, joint_attention_kwargs: dict[str, Any] | None = None, *, folded: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the streams (text, images) after a single block."""
    length, attention = encoder_hidden_states.shape[1], block.attn
    tokens = joined_tokens(encoder_hidden_states, hidden_states)
    shift, scale, gate = block.norm.linear(block.norm.silu(temb)).chunk(3, dim=1)
    readers = _readers(attention, False)
    streams = [(tokens, scale, shift)]
    _, (normed,) = normed_streams(streams, block.norm.norm.eps, [[*readers, block.proj_mlp]], folded)
    (hidden,) = products_of([block.proj_mlp], normed, tokens)
    heads = joint_heads(
        [_heads_in(products_of(readers, normed, tokens))], [(attention.norm_q.weight, attention.norm_k.weight)],
        image_rotary_emb, attention.head_dim, attention.norm_q.eps,
    )  # fmt: skip
    attended = _attend(attention, heads)
    codes = codes_of([block.proj_out])
    if codes is None:
        output = block.proj_out(gelu_joined(attended, hidden))
    else:
        output = product(block.proj_out, gelu_codes(attended, hidden, codes, "tanh"), tokens)
    (tokens,) = gated_sums([(output, gate, tokens)])
    tokens = _clipped(tokens)
    return tokens[:, :length], tokens[:, length:]


def _clipped(x: Tensor) -> Tensor:
    return x.clip(-_HALF_LARGEST, _HALF_LARGEST) if x.dtype == torch.float16 else x


KINDS = (
    BlockKind(FluxTransformerBlock, double_reason, double),
    BlockKind(FluxSingleTransformerBlock, single_reason, single),
)
