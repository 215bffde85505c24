"""Models and measurements of ``scripts.bench_nfd``: random weights, windows that are full, clocks that wait."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

import diffaccel
from diffaccel.models.next_frame.block import modulate
from diffaccel.models.next_frame.pipeline import NextFramePipeline
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.modules.capture.graphs import BACKENDS
from diffaccel.quant import W8A8
from diffaccel.samplers import NextFrameSampler
from scripts.timing import timed, wait

LATENTS = {"in_channels": 16, "patch_size": 1}
BEDS: dict[str, dict[str, Any]] = {
    "310M": {**LATENTS, "height": 14, "width": 24, "num_layers": 16, "num_attention_heads": 16, "window": 32},
    "310M-8": {**LATENTS, "height": 14, "width": 24, "num_layers": 16, "num_attention_heads": 16, "window": 9},
    "774M": {**LATENTS, "height": 30, "width": 52, "num_layers": 18, "num_attention_heads": 24, "window": 32},
    "demo": {"height": 64, "width": 64, "patch_size": 8, "num_layers": 12, "modulation": "shared", "window": 16},
    "tiny": {"height": 8, "width": 8, "patch_size": 4, "num_layers": 2, "num_attention_heads": 2, "window": 9,
             "attention_head_dim": 16, "in_channels": 16, "num_actions": 4},
}  # fmt: skip


@dataclass
class Bed:
    """One model with random weights on one device.

    Attributes:
        compile_mode: how ``torch.compile`` compiles its layers, and the stack that they are compared with.
    """

    name: str
    model: NextFrameTransformer
    device: torch.device
    compile_mode: str = "default"

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def window(self) -> int:
        return int(self.model.config.window)

    @property
    def actions(self) -> int:
        return self.model.null_action

    def facts(self) -> dict[str, Any]:
        """Return parameters, tokens, and FLOPs of one evaluation of one frame with a full window."""
        config = self.model.config
        dim, tokens, layers = (
            config.num_attention_heads * config.attention_head_dim,
            self.model.tokens,
            config.num_layers,
        )
        linear = 24 * dim**2 * layers * tokens
        attention = 4 * dim * layers * tokens * tokens * self.window
        return {
            "name": self.name, "parameters": sum(p.numel() for p in self.model.parameters()), "tokens": tokens,
            "window": self.window, "dtype": str(self.model.dtype), "gflops_linear": linear / 1e9,
            "gflops_attention": attention / 1e9, "gflops_of_a_recomputed_window": self.window * (
                linear + attention * (self.window + 1) / 2 / self.window) / 1e9,
        }  # fmt: skip

    def describe(self) -> str:
        facts = self.facts()
        return (
            f"{facts['parameters'] / 1e6:.0f}M random weights, {facts['tokens']} tokens a frame, {facts['dtype']}, "
            f"{facts['gflops_linear']:.0f} + {facts['gflops_attention']:.0f} GFLOP (linear, attention) an evaluation, "
            f"{facts['gflops_of_a_recomputed_window']:.0f} for a whole window"
        )

    @contextlib.contextmanager
    def prepared(self, way: str) -> Iterator[NextFrameTransformer]:
        """Give the model with its layers compiled, or quantized, as the way's name says."""
        pipe = NextFramePipeline(self.model)
        if "w8a8" in way:
            diffaccel.accelerate(pipe, W8A8())
        if "compiled" in way:
            torch._dynamo.config.recompile_limit = 64  # one program for each number of frames of an evaluation
            self.model.compile_blocks(fullgraph=True, dynamic=False, mode=self.compile_mode)
        try:
            yield self.model
        finally:
            self.model.uncompile_blocks()
            diffaccel.remove(pipe)
            torch.compiler.reset()


def make(name: str, device: torch.device, compile_mode: str = "default") -> Bed:
    """Return a model whose gates and head are drawn, too."""
    torch.manual_seed(0)
    with device:
        model = NextFrameTransformer(**BEDS[name]).eval().requires_grad_(False)
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return Bed(name, model.to(torch.bfloat16) if device.type == "cuda" else model, device, compile_mode)


def sampler(model: NextFrameTransformer, bed: Bed, steps: int, draft: int = 1, **options: Any) -> NextFrameSampler:
    made = NextFrameSampler(model, steps, draft=draft, **options)
    made.reset()
    return made


def full(made: NextFrameSampler) -> None:
    """Draw until the window is full."""
    for _ in made.frames([1] * (made.window + 2)):
        pass
    wait(made.engine.x.device)


def captured(function: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Return a function as one graph, where the device has graphs."""
    if device.type not in BACKENDS:
        return function
    backend = BACKENDS[device.type](device)
    backend.warm_up(function)
    return backend.record(function, backend.new_pool())[0].replay


@torch.no_grad()
def recomputed(bed: Bed, steps: int) -> dict[str, float]:
    """Return the milliseconds of a frame without a ring: K evaluations of the whole window, eager and in one graph."""
    shape = (1, bed.window, *bed.model.frame_shape)
    frames = torch.randn(shape, device=bed.device, dtype=torch.float32)
    sigma = torch.full(shape[:2], 0.5, device=bed.device, dtype=torch.float32)
    actions = torch.ones(shape[:2], device=bed.device, dtype=torch.int64)

    def frame() -> None:
        for _ in range(steps):
            bed.model(frames, sigma, actions)

    repeats = 10 if bed.is_cuda else 1
    rows = {"whole window recomputed, eager": timed(frame, repeats)}
    if bed.is_cuda:
        rows["whole window recomputed, captured"] = timed(captured(frame, bed.device), repeats)
    return rows


@torch.no_grad()
def block_stack(bed: Bed, steps: int) -> float:
    """Return the milliseconds of a frame in a bare compiled stack of the layers, one graph: the baseline.

    PyTorch's attention on keys of a full window that lie in one piece; the last frame's keys and values are copied into
    place by the first of K evaluations, which has two frames. Modulation rows, embeddings, head, noise and masks are
    left out.
    """
    model, config = bed.model, bed.model.config
    dim, heads = config.num_attention_heads * config.attention_head_dim, config.num_attention_heads
    make_zeros = lambda *shape: torch.zeros(*shape, dtype=model.dtype, device=bed.device)  # noqa: E731
    rows = [torch.randn(1, 2, 6 * dim, dtype=model.dtype, device=bed.device) * 0.1 for _ in range(config.num_layers)]
    room = (1, heads, (bed.window + 1) * model.tokens, config.attention_head_dim)
    keys = [make_zeros(room) for _ in rows]
    values = [make_zeros(room) for _ in rows]

    def stack(x: Tensor) -> Tensor:
        count = x.shape[1]
        for block, row, key, value in zip(model.transformer_blocks, rows, keys, values, strict=True):
            shift, scale = row[:, :count].chunk(6, -1)[:2]
            parts = block.attn.normed(block.attn(modulate(x, shift, scale)))
            query, new_key, new_value = (part.flatten(1, 2).transpose(1, 2) for part in parts)
            key[:, :, -count * model.tokens :].copy_(new_key)
            value[:, :, -count * model.tokens :].copy_(new_value)
            seen = slice(model.tokens, None)
            out = torch.nn.functional.scaled_dot_product_attention(query, key[:, :, seen], value[:, :, seen])
            x = block.after(x, row[:, :count], out.transpose(1, 2).unflatten(1, (count, model.tokens)))
        return x

    compiled = torch.compile(stack, mode=bed.compile_mode, fullgraph=True, dynamic=False)
    one, two = (torch.randn(1, count, model.tokens, dim, dtype=model.dtype, device=bed.device) for count in (1, 2))

    def frame() -> None:
        compiled(two)
        for _ in range(steps - 1):
            compiled(one)

    try:
        return timed(captured(frame, bed.device), 30)
    finally:
        torch.compiler.reset()


def action_to_frame(made: NextFrameSampler, changes: int) -> dict[str, float]:
    """Return p50 and p99 of the milliseconds from an action to its frame, and the milliseconds of a frame.

    The action changes at a random time in the steady loop; :meth:`NextFrameSampler.step` hears of it between two steps,
    or, where rounds are not given up, when it returns.
    """
    full(made)
    made.warm_up(poll=made.latency is not None)
    device, draw = made.engine.x.device, random.Random(0)
    frame = timed(lambda: (made.step(1), wait(device)), 20) / 1000
    waits, action = [], 1
    for _ in range(changes):
        for _ in range(draw.randint(1, 4)):
            made.step(action)
        wait(device)
        other = (action + 1) % made.model.null_action
        waits.append(1000 * _wait_of(made, action, other, draw.uniform(0, frame)))
        action = other
    cuts = statistics.quantiles(waits, n=100) if len(waits) > 1 else waits * 99
    return {"p50": cuts[49], "p99": cuts[98], "frame_ms": 1000 * frame, "p99_in_frames": cuts[98] / (1000 * frame)}


def _wait_of(made: NextFrameSampler, action: int, other: int, delay: float) -> float:
    """Return the seconds from another action, which arrives after a delay, to the first frame under it."""
    arrives = time.perf_counter() + delay

    def wanted() -> int:
        return other if time.perf_counter() >= arrives else action

    while True:
        made.step(wanted(), poll=None if made.latency is None else wanted)
        wait(made.engine.x.device)
        if made.action == [other]:
            return time.perf_counter() - arrives


@torch.no_grad()
def with_decoder(made: NextFrameSampler, bed: Bed, frames: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of a tiny autoencoder of 16x alone, and FPS with it in line and on a stream of its own."""
    torch.manual_seed(0)
    with bed.device:
        widths = (64,) * 5
        tiny = AutoencoderTiny(
            latent_channels=bed.model.config.in_channels, encoder_block_out_channels=widths,
            decoder_block_out_channels=widths, num_encoder_blocks=(1, 3, 3, 3, 3), num_decoder_blocks=(3, 3, 3, 3, 1),
        ).eval()  # fmt: skip
    tiny.to(bed.model.dtype)
    source = made.step(1).to(bed.model.dtype)
    run = captured(lambda: tiny.decoder(source), bed.device)
    alone = timed(run, frames)
    rows: dict[str, dict[str, float]] = {"AutoencoderTiny (16x, random, one graph) alone": {"ms": alone}}
    side = torch.cuda.Stream(bed.device) if bed.is_cuda else None
    for way in ("decoded in line", "decoded on a stream of its own")[: 2 if bed.is_cuda else 1]:
        made.reset()
        full(made)
        start = time.perf_counter()
        for frame in made.frames([1] * frames):
            if way == "decoded in line" or side is None:
                source.copy_(frame)
                run()
            else:
                side.wait_stream(torch.cuda.current_stream(bed.device))
                with torch.cuda.stream(side):
                    source.copy_(frame)
                    frame.record_stream(side)
                    run()
        wait(bed.device)
        rows[way] = {"fps": frames / (time.perf_counter() - start)}
    return rows
