"""A bed for quantization-aware training: a small video transformer whose target is known in closed form.

Data is a mixture of Gaussians around fixed patterns, so that the velocity of the linear path is exact at every level;
a network of the Wan architecture learns it, and is then trained with few bits.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from diffaccel.distill import NetworkTeacher
from diffaccel.quant.qvgen.data import CleanSamples

SHAPE = (4, 2, 8, 8)  # channels, frames, rows, columns
SPREAD = 0.3
PATTERNS = 6


@functools.cache
def patterns() -> Tensor:
    """Return the centres ``(PATTERNS, *SHAPE)``: waves of other directions, speeds and channels."""
    draw = torch.Generator().manual_seed(11)
    frames, rows, columns = (torch.arange(n, dtype=torch.float32) for n in SHAPE[1:])
    waves = []
    for _ in range(PATTERNS):
        speed, down, right = torch.randint(0, 3, (3,), generator=draw).tolist()
        phase = torch.rand(SHAPE[0], 1, 1, 1, generator=draw) * 2 * math.pi
        angle = speed * frames[:, None, None] + (down * rows[:, None] + (right + 1) * columns) * (2 * math.pi / 8)
        waves.append(torch.sin(angle + phase))
    return torch.stack(waves)


def data(count: int, generator: torch.Generator) -> Tensor:
    """Draw clean samples."""
    index = torch.randint(PATTERNS, (count,), generator=generator)
    return patterns()[index] + SPREAD * torch.randn(count, *SHAPE, generator=generator)


def exact_velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """Return ``E[eps - x0 | x]`` at levels ``(B,)``."""
    s = sigma.reshape(-1, *[1] * len(SHAPE))
    a = 1 - s
    variance = a * a * SPREAD**2 + s * s  # (B, 1, 1, 1, 1)
    distance = x[:, None] - a[:, None] * patterns()[None]
    weight = torch.softmax(-distance.square().flatten(2).sum(-1) / (2 * variance.reshape(-1, 1)), dim=1)
    x0 = torch.zeros_like(x)
    for index, centre in enumerate(patterns()):
        mean = centre + a * SPREAD**2 / variance * (x - a * centre)
        x0 += weight[:, index].reshape(s.shape) * mean
    return (x - x0) / s


def network(seed: int = 0, heads: int = 4, layers: int = 2) -> WanTransformer3DModel:
    """Return a network of the Wan architecture with random weights."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=16, in_channels=SHAPE[0],
        out_channels=SHAPE[0], text_dim=16, freq_dim=32, ffn_dim=heads * 32, num_layers=layers, rope_max_seq_len=32,
    )  # fmt: skip


def call(net: Any, x: Tensor, sigma: Tensor, _: Any) -> Tensor:
    """Ask the network at levels of the linear path; it reads no text."""
    text = torch.zeros(len(x), 1, 16, dtype=x.dtype, device=x.device)
    return net(hidden_states=x, timestep=1000 * sigma.to(x), encoder_hidden_states=text, return_dict=False)[0]


@functools.cache
def trained(steps: int = 1500, seed: int = 0) -> WanTransformer3DModel:
    """Return a network that has learnt the exact velocity."""
    net, draw = network(seed).train(), torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(net.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for step in range(steps):
        x0, sigma = data(16, draw), torch.rand(16, generator=draw).clamp(1e-2, 1 - 1e-3)
        s = sigma.reshape(-1, 1, 1, 1, 1)
        x = (1 - s) * x0 + s * torch.randn(x0.shape, generator=draw)
        for group in adam.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3)
        loss = (call(net, x, sigma, None) - exact_velocity(x, sigma)).square().mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
    return net.eval()


def teacher(net: Any) -> NetworkTeacher:
    """Return a network as what is followed."""
    return NetworkTeacher(net, call, "velocity", SHAPE)


def samples(count: int = 256, seed: int = 3) -> CleanSamples:
    """Return clean samples without prompts."""
    return CleanSamples(data(count, torch.Generator().manual_seed(seed)), ("",) * count)


@torch.no_grad()
def error(net: Any, count: int = 128, seed: int = 5) -> float:
    """Return the mean square distance to the exact velocity, on points of the path."""
    draw = torch.Generator().manual_seed(seed)
    x0, sigma = data(count, draw), torch.rand(count, generator=draw).clamp(1e-2, 1 - 1e-3)
    s = sigma.reshape(-1, 1, 1, 1, 1)
    x = (1 - s) * x0 + s * torch.randn(x0.shape, generator=draw)
    return float((call(net, x, sigma, None) - exact_velocity(x, sigma)).square().mean())
