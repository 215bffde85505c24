"""Videos drawn chunk by chunk on a GPU: the stock call's frames, graphs, memory that does not grow."""

from __future__ import annotations

import pytest
import torch

import diffaccel
from diffaccel.samplers import ChunkSampler, RollingContext
from tests.support.chunked import TEXT, draw, numbers, tiny_chunked, tiny_network

pytestmark = pytest.mark.gpu
OPTIONS = {"num_attention_heads": 4, "attention_head_dim": 32, "num_layers": 3}


def drawn(pipe, frames=21, **options):
    return draw(pipe, frames, prompt_embeds=numbers(1, 3, TEXT, seed=1).cuda(), **options)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_frames_are_those_of_the_pipeline(dtype, close):
    pipe = tiny_chunked(**OPTIONS).to("cuda", dtype)
    plain = drawn(pipe, 9).float()
    ring = drawn(diffaccel.accelerate(pipe, RollingContext()), 9).float()
    assert float((ring - plain).abs().mean()) < close * float(plain.abs().mean())
    assert torch.equal(drawn(diffaccel.remove(pipe), 9).float(), plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_graphs_draw_what_eager_evaluations_draw(compiled):
    pipe = tiny_chunked(**OPTIONS).to("cuda", torch.bfloat16)
    eager = drawn(diffaccel.accelerate(pipe, RollingContext(window=6, capture=False)))
    diffaccel.remove(pipe)
    if compiled:
        pipe.transformer.compile_repeated_blocks(dynamic=False)
    diffaccel.accelerate(pipe, RollingContext(window=6))
    for _ in range(2):
        captured = drawn(pipe)
        graphs = diffaccel.summary(pipe).reports["rolling_context"]["captures"]
        assert graphs > 0
        error = float((captured.float() - eager.float()).abs().mean() / eager.float().abs().mean())
        assert error == 0 if not compiled else error < 0.1
    drawn(pipe)
    assert diffaccel.summary(pipe).reports["rolling_context"]["captures"] == graphs


def test_a_thousand_frames_have_the_memory_of_a_few():
    sampler = ChunkSampler(tiny_network(**OPTIONS).to("cuda", torch.bfloat16), 4, 4, 2, window=6)
    sampler.reset(numbers(1, 3, TEXT, seed=1))
    for _ in sampler.chunks(10):
        pass
    torch.cuda.synchronize()
    memory, captures = torch.cuda.memory_allocated(), sampler.engine.captures
    for _ in sampler.chunks(500):
        pass
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == memory and sampler.engine.captures == captures > 0
    assert sampler.frames > 1000 and bool(torch.isfinite(sampler.step()).all())
