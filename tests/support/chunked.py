"""A tiny random network that draws chunk by chunk, the stock pipeline around it, and what the network computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AnyFlowFARPipeline, AnyFlowFARTransformer3DModel, FlowMapEulerDiscreteScheduler
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

SIZE = 4  # of a latent frame: 4 whole tokens and a compressed one
TEXT = 8


def tiny_network(**options: Any) -> AnyFlowFARTransformer3DModel:
    options = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": TEXT,
        "freq_dim": 16, "ffn_dim": 16, "num_layers": 2, "chunk_partition": (1, 2, 2, 2, 2), "full_chunk_limit": 3,
        **options,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AnyFlowFARTransformer3DModel(**options).eval()


def tiny_chunked(shift: float = 1.0, **options: Any) -> AnyFlowFARPipeline:
    scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    pipe = AnyFlowFARPipeline(
        tokenizer=None, text_encoder=None, transformer=tiny_network(**options), vae=None, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(pipe: Any, frames: int = 9, **options: Any) -> Tensor:
    """Latent frames ``(B, C, T, H, W)`` of a call."""
    partition = [1, *[2] * ((frames - 1) // 2), *[1] * ((frames - 1) % 2)]
    arguments = {
        "prompt_embeds": numbers(1, 3, TEXT, seed=1), "height": 8 * SIZE, "width": 8 * SIZE,
        "num_frames": 4 * (frames - 1) + 1, "num_inference_steps": 2, "output_type": "latent",
        "generator": torch.Generator().manual_seed(2), "chunk_partition": partition, **options,
    }  # fmt: skip
    return pipe(**arguments).frames


def stock_context(model: Any, chunks: list[Tensor], text: Tensor, far: int) -> tuple[list[dict[str, Tensor]], int]:
    """Keys and values that the stock network writes for clean chunks, compressed frames seeing the last ``far`` ones.

    Returns:
        By layer ``compressed_cache`` and ``full_cache``, ``(2, B, heads, tokens, head_dim)`` and before rotation, and
        the number of compressed frames.
    """
    whole = model.config.full_chunk_limit - 1
    sizes = [chunk.shape[1] for chunk in chunks]
    split = max(0, len(sizes) - whole)
    compressed = sum(sizes[:split])
    tokens, whole_tokens = (SIZE // 4) ** 2, (SIZE // 2) ** 2
    chunk, last, frame = [], [], []  # of each token: number of its chunk, end of that chunk, its frame
    end = 0
    for number, size in enumerate(sizes):
        begin, end = end, end + size
        for i in range(begin, end):
            count = tokens if number < split else whole_tokens
            chunk += [number] * count
            last += [end if number < split else compressed] * count
            frame += [i] * count
    padded = math.ceil(len(chunk) / 128) * 128
    chunk_of, last_of, frame_of = (torch.tensor(x + [0] * (padded - len(x))) for x in (chunk, last, frame))
    real = len(chunk)

    def sees(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (chunk_of[query] >= chunk_of[key]) & (query < real) & (key < real)
        return seen & ((frame_of[key] >= compressed) | (frame_of[key] >= last_of[query] - far))

    latents = torch.cat(chunks, 1)
    heads, dim = model.config.num_attention_heads, model.config.attention_head_dim
    memory = [
        {name: torch.zeros(2, latents.shape[0], heads, count, dim) for name, count in (
            ("compressed_cache", compressed * tokens), ("full_cache", (latents.shape[1] - compressed) * whole_tokens))}
        for _ in model.blocks
    ]  # fmt: skip
    zero = torch.zeros(latents.shape[:2])
    with torch.no_grad():
        model(
            hidden_states=latents, timestep=zero, r_timestep=zero, encoder_hidden_states=text, chunk_partition=sizes,
            attention_mask=create_block_mask(sees, None, None, padded, padded, device="cpu"), kv_cache=memory,
            kv_cache_flag={"is_cache_step": True}, return_dict=False,
        )  # fmt: skip
    return memory, compressed


def stock_velocity(model: Any, chunks: list[Tensor], x: Tensor, level: float, text: Tensor, far: int) -> Tensor:
    """Mean velocity of a chunk from ``level`` to 0 after clean ones, of which the last ``far`` compressed are seen.

    The video that the stock network is told of begins with the first frame that is seen.
    """
    memory, compressed = stock_context(model, chunks, text, far)
    kept = min(compressed, far)
    tokens = (SIZE // 4) ** 2
    for layer in memory:
        layer["compressed_cache"] = layer["compressed_cache"][:, :, :, (compressed - kept) * tokens :]
    whole = [chunk.shape[1] for chunk in chunks[-(model.config.full_chunk_limit - 1) :]]
    far_chunks = [kept] if kept else []
    with torch.no_grad():
        return model(
            hidden_states=x, timestep=torch.full(x.shape[:2], level), r_timestep=torch.zeros(x.shape[:2]),
            encoder_hidden_states=text, chunk_partition=[*far_chunks, *whole, x.shape[1]], kv_cache=memory,
            kv_cache_flag={"is_cache_step": False, "num_cached_chunks": len(far_chunks) + len(whole)},
            return_dict=False,
        )[0]  # fmt: skip
