"""One evaluation of the chunk-causal network on a ring: all of it but the self-attention is the network's own.

The frames of a chunk have one noise level, so its embedding has one row and none a token: the same numbers, computed
and added once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffaccel.models.anyflow_far.memory import ChunkMemory, ChunkPlace, LayerEvaluation, ring_attention

_ONE_ROW = {"num_full_frames": 1, "full_token_per_frame": 1, "compressed_token_per_frame": 1}


def evaluate(
    model: Any, memory: ChunkMemory, place: ChunkPlace, latents: Tensor, level: Tensor, next_level: Tensor, text: Tensor
) -> Tensor | None:
    """Return the mean velocity of a drawn chunk ``(B, T, C, H, W)``; None where frames are written into the ring.

    Args:
        model: the network.
        memory: whose keys and values are seen and written.
        place: of the frames.
        latents: ``(B, T, C, H, W)``.
        level: timesteps ``(B,)``, in thousandths.
        next_level: timesteps ``(B,)`` at which the step ends.
        text: embedded prompts ``(B, L, text channels)``.
    """
    embed = model.far_patch_embedding if place.compressed else model.patch_embedding
    x = embed(latents.transpose(1, 2)).flatten(2).transpose(1, 2).contiguous()  # (B, T n, d)
    time, rows, text, _ = model.condition_embedder(level[:, None], next_level[:, None], text, None, far_cfg=_ONE_ROW)
    rows = rows.unflatten(2, (6, -1))  # (B, 1, 6, d)
    evaluation = memory.evaluation(place)
    with ring_attention(model):
        for number, block in enumerate(model.blocks):
            x = block(x, text, rows, None, None, LayerEvaluation(evaluation, number), {})
    return head(model, x, time, latents) if place.kind == "drawn" else None


def head(model: Any, x: Tensor, time: Tensor, latents: Tensor) -> Tensor:
    """Return tokens as latents of the drawn chunk's shape."""
    shift, scale = (part.squeeze(2) for part in (model.scale_shift_table + time[:, :, None]).chunk(2, 2))
    out = model.proj_out((model.norm_out(x.float()) * (1 + scale) + shift).type_as(x))
    batch, frames, _, height, width = latents.shape
    _, p, q = model.config.patch_size
    cut = out.reshape(batch, frames, height // p, width // q, p, q, -1)
    return cut.permute(0, 1, 6, 2, 4, 3, 5).reshape(batch, frames, -1, height, width)
