"""Tiny random world models, and clips for them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffaccel.models.next_frame.pipeline import NextFramePipeline
from diffaccel.models.next_frame.transformer import NextFrameTransformer


def tiny_world(dtype: torch.dtype = torch.float64, **options: Any) -> NextFrameTransformer:
    """A network of two layers whose gates and head are not zero, as after training; 8x8 pixels, 4 tokens a frame."""
    options = {
        "height": 8, "width": 8, "patch_size": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16,
        "num_actions": 4, "window": 4, **options,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NextFrameTransformer(**options)
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
    return model.to(dtype).eval()


def clip(model: NextFrameTransformer, frames: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy frames ``(B, T, C, H, W)``, their levels and actions."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, frames, *model.frame_shape, generator=draw, dtype=torch.float64).to(model.dtype)
    sigma = torch.rand(batch, frames, generator=draw, dtype=torch.float64).to(model.dtype)
    return x, sigma, torch.randint(model.null_action, (batch, frames), generator=draw)


def tiny_pipeline(**options: Any) -> NextFramePipeline:
    """A pipeline of :func:`tiny_world` in float32."""
    return NextFramePipeline(tiny_world(torch.float32, **options))


class OnlyRecorded:
    """A stand-in for CUDA graphs on the CPU: recording runs nothing, and a replay calls the function again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_pool(self) -> object:
        return object()

    def warm_up(self, function: Callable[[], Any]) -> None:
        function()

    def record(self, function: Callable[[], Any], pool: Any) -> tuple[Any, None]:
        return SimpleNamespace(replay=function, bytes=0), None
