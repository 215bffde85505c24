"""Next-frame diffusion on a GPU: graphs, the attention kernel, long rollouts."""

from __future__ import annotations

import pytest
import torch

from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.samplers import NextFrameSampler

pytestmark = pytest.mark.gpu
STREAM = [1, 1, 1, 2, 2, 0, 0, 0, 0, 3, 3, 1]


def world(dtype: torch.dtype = torch.bfloat16, **options: object) -> NextFrameTransformer:
    torch.manual_seed(0)
    options = {
        "height": 32,
        "width": 32,
        "patch_size": 4,
        "num_layers": 4,
        "num_attention_heads": 4,
        "window": 8,
    } | options
    model = NextFrameTransformer(**options).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    return model.to("cuda", dtype)


def made(model: NextFrameTransformer, **options: object) -> NextFrameSampler:
    sampler = NextFrameSampler(model, 3, **options)
    sampler.reset()
    return sampler


@pytest.mark.parametrize(
    "options", [{"draft": 1}, {"draft": 3}, {"draft": 3, "latency": 1e6}, {"draft": 1, "merged": False}]
)
def test_graphs_draw_what_eager_rounds_draw(options):
    model = world()
    eager = made(model, capture=False, **options).rollout(STREAM).frames
    sampler = made(model, **options)
    captured = sampler.rollout(STREAM).frames
    assert torch.equal(captured, eager)
    recorded = sampler.engine.captures
    assert recorded > 0
    sampler.reset()
    assert torch.equal(sampler.rollout(STREAM).frames, eager) and sampler.engine.captures == recorded


def test_bf16_stays_near_double_precision():
    """Eight frames in bf16 against the same in double precision, which takes PyTorch's attention: above 30 dB."""
    model = world(torch.float64)
    exact = made(model, draft=1).rollout(STREAM[:8]).frames
    near = made(model.to(torch.bfloat16), draft=1).rollout(STREAM[:8]).frames
    assert exact.dtype == torch.float64
    error = (near.double() - exact).square().mean() / exact.square().mean()
    assert float(error) < 1e-3


def test_a_ring_in_bf16_draws_what_the_whole_video_gives():
    """The last frame's velocity on the ring against a full evaluation, both bf16: above 45 dB of the signal."""
    model = world(window=16)
    frames = torch.randn(1, 9, *model.frame_shape, device="cuda").clamp(-1, 1)
    actions = torch.ones(1, 9, dtype=torch.int64)
    sampler = NextFrameSampler(model, 1, draft=1)
    sampler.reset(frames[:, :8], actions[:, :8])
    drawn = sampler.step(1)
    noise = torch.zeros(1, *model.frame_shape, device="cuda")
    sampler.engine.noise.fill(noise, 8, 0)
    sigma = torch.zeros(1, 9, device="cuda")
    sigma[:, -1] = 1
    whole = torch.cat([frames[:, :8], noise[:, None]], 1)
    expected = noise - model(whole, sigma, actions.cuda())[:, -1]
    signal, error = expected.square().mean(), (drawn - expected).square().mean()
    assert float(10 * torch.log10(signal / error)) > 45


def test_prepared_branches_are_the_plain_frames():
    model = world()
    plain, sampler = made(model, draft=1), made(model, draft=1, fan_out=4)
    for action in (1, 3, 0):
        sampler.prepare([0, 1, 2, 3])
        torch.testing.assert_close(sampler.step(action), plain.step(action), rtol=5e-2, atol=5e-2)


def test_a_long_rollout_keeps_its_memory_and_its_graphs():
    sampler = made(world(num_layers=2), draft=2)
    for _ in sampler.frames(STREAM * 10):
        pass
    memory, recorded = torch.cuda.memory_allocated(), sampler.engine.captures
    places = sampler.engine.cache.keys.data_ptr()
    for action in (STREAM * 850)[:10_000]:
        frame = sampler.step(action)
    assert bool(torch.isfinite(frame).all())
    assert torch.cuda.memory_allocated() <= memory + 2**20 and sampler.engine.captures == recorded
    assert sampler.engine.cache.base > 0 and places == sampler.engine.cache.keys.data_ptr()


def test_compiled_layers_draw_nearly_the_same():
    model = world()
    expected = made(model, draft=1).rollout(STREAM[:4]).frames
    torch.compiler.reset()
    model.compile_blocks(fullgraph=True, dynamic=False)
    found = made(model, draft=1).rollout(STREAM[:4]).frames
    model.uncompile_blocks()
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
