"""The ring under the stock pipeline of chunks: the same frames, memory that does not grow, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.quant import W8A8
from diffaccel.samplers import NFD, ChunkSampler, Euler, RollingContext
from tests.support.chunked import TEXT, draw, numbers, tiny_chunked, tiny_network
from tests.support.replayed_calls import replayed_calls  # noqa: F401

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def report(pipe):
    return diffaccel.summary(pipe).reports["rolling_context"]


@pytest.mark.slow  # the stock network makes masks of all tokens by all
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 2.0, "negative_prompt_embeds": numbers(1, 3, TEXT, seed=9)},
        {"video_latents": numbers(1, 3, 4, 4, 4, seed=8)},
    ],
    ids=["text", "guided", "continued"],
)
def test_frames_are_those_of_the_pipeline_while_the_window_holds_all(options):
    pipe = tiny_chunked()
    plain = draw(pipe, **options)
    assert diffaccel.accelerate(pipe, RollingContext()) is pipe
    for _ in range(2):  # in the memory of the call before
        torch.testing.assert_close(draw(pipe, **options), plain, **CLOSE)
    told = report(pipe)
    assert told["context_frames"] == 7 and told["window"] == 7 and told["captures"] == 0
    assert "rolling_context" in str(diffaccel.summary(pipe))
    assert torch.equal(draw(diffaccel.remove(pipe), **options), plain)


def test_a_long_video_has_the_memory_of_a_short_one():
    pipe = diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext())
    draw(pipe, num_inference_steps=1)
    short = report(pipe)
    video = draw(pipe, 31, num_inference_steps=1)
    assert video.shape[2] == 31 and bool(torch.isfinite(video).all())
    long = report(pipe)
    assert long["bytes"] == short["bytes"] and long["context_frames"] == 29
    # 1 step a chunk, 1 + 2 writes of the first two chunks, and of each later one its two and the one that leaves
    assert long["evaluations"] == 16 + 1 + 2 + 3 * 13


def test_a_call_takes_no_memory_of_layers_and_leaves_nothing():
    pipe = diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext())
    network, seen = pipe.transformer, []

    def look(pipe, step, t, values):
        seen.append((pipe.transformer.config.num_layers, pipe.transformer.config.full_chunk_limit))
        assert isinstance(pipe.transformer, type(network))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=look)
    assert seen[0] == (0, 3)
    assert pipe.transformer is network and network.config.num_layers == 1
    assert not {"_forward_inference", "_forward_cache"} & vars(network).keys()
    processors = {type(block.attn1.processor).__name__ for block in network.blocks}
    assert processors == {"AnyFlowCausalAttnProcessor"}
    assert draw(pipe).shape[2] == 9


@pytest.mark.parametrize(("frames", "steps"), [(11, 1), pytest.param(20, 2, marks=pytest.mark.slow)])
def test_graphs_draw_the_same(replayed_calls, frames, steps):  # noqa: F811
    options = {"num_layers": 1, "chunk_partition": (1, 2, 2, 2)}
    more = {"num_inference_steps": steps}
    plain = draw(diffaccel.accelerate(tiny_chunked(**options), RollingContext(window=6, capture=False)), frames, **more)
    pipe = diffaccel.accelerate(tiny_chunked(**options), RollingContext(window=6))
    for _ in range(2):
        drawn = draw(pipe, frames, **more)
        graphs = report(pipe)["captures"]
        assert 0 < graphs <= 6  # chunks that are compressed, whole or drawn, and the shorter ones of these
        torch.testing.assert_close(drawn, plain, **CLOSE)
    weight = pipe.transformer.proj_out.weight
    pipe.transformer.proj_out.weight = torch.nn.Parameter(weight * 2)
    changed = draw(pipe, frames, **more)
    assert report(pipe)["captures"] > graphs  # they read the weights where these were
    assert (changed - plain).abs().max() > 1e-3


def test_other_sizes_and_copies_have_memory_of_their_own():
    pipe = diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext())
    first = draw(pipe)
    assert draw(pipe, height=64, width=64).shape[-1] == 8
    assert torch.equal(draw(pipe), first)
    other = copy.deepcopy(pipe)
    diffaccel.remove(pipe)
    assert torch.equal(draw(other), first)


@pytest.mark.slow
def test_blocks_compile_around_the_ring():
    pipe = diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext(window=6))
    short, long = (draw(pipe, frames, num_inference_steps=1) for frames in (7, 13))
    counter = CompileCounter()
    pipe.transformer.compile_repeated_blocks(backend=counter)
    torch.testing.assert_close(draw(pipe, 7, num_inference_steps=1), short, **CLOSE)
    compiled = counter.frame_count  # by the shapes of chunks, whatever their places in the ring
    torch.testing.assert_close(draw(pipe, 13, num_inference_steps=1), long, **CLOSE)
    assert counter.frame_count - compiled <= 5 < compiled  # far chunks of two frames come first in the long one


@pytest.mark.slow
def test_it_composes_with_quantized_weights():
    pipe = diffaccel.accelerate(tiny_chunked(num_attention_heads=4), W8A8())
    quantized = draw(pipe)
    diffaccel.accelerate(pipe, RollingContext())
    torch.testing.assert_close(draw(pipe), quantized, rtol=1e-2, atol=1e-2)
    diffaccel.remove(pipe)


@pytest.mark.parametrize(
    ("make", "config", "sentence"),
    [
        (lambda: tiny.make("flux"), RollingContext(), "FluxPipeline draws none. Pass diffusers' AnyFlowFARPipeline"),
        (tiny_chunked, RollingContext(window=5), "window is 5 latent frames.*it must be 6 or more"),
        (tiny_chunked, RollingContext(capture=True), "capture=True records CUDA graphs, and the model is on cpu"),
        (tiny_chunked, NFD(), "'nfd' drafts the frames of a world model.*takes 'rolling_context'"),
    ],
)
def test_what_cannot_be_is_refused(make, config, sentence):
    with pytest.raises(DiffAccelError, match=sentence):
        diffaccel.accelerate(make(), config)


def test_other_methods_of_calls_and_compiled_networks_are_refused():
    pipe = diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext())
    with pytest.raises(DiffAccelError, match="'rolling_context' and 'euler' cannot be active together"):
        diffaccel.accelerate(pipe, Euler())
    with pytest.raises(ValueError, match=r"A chunk is \(1, 3, 4, 4, 4\).*give chunk="):
        draw(pipe, chunk_partition=[3, 3, 3])
    diffaccel.remove(pipe)
    pipe.transformer._compiled_call_impl = object()  # as after pipe.transformer.compile()
    with pytest.raises(DiffAccelError, match=r"under torch.compile.*compile_repeated_blocks\(\)"):
        diffaccel.accelerate(pipe, RollingContext())


def test_weights_that_are_elsewhere_are_named(monkeypatch):
    pipe = tiny_chunked(num_layers=1)
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cpu"))
    diffaccel.accelerate(pipe, RollingContext())
    pipe.transformer.patch_embedding.to_empty(device="meta")  # as sequential offload leaves it
    with pytest.raises(DiffAccelError, match=r"weights are on meta and latents on cpu.*enable_model_cpu_offload\(\)"):
        draw(pipe)


@pytest.mark.parametrize(("options", "sentence"), [({"window": 0}, "window is 0"), ({"chunk": -1}, "chunk is -1")])
def test_options_are_checked(options, sentence):
    with pytest.raises(DiffAccelError, match=sentence):
        RollingContext(**options)


def test_one_prompt_counts_for_all_videos_of_a_call():
    both = [torch.Generator().manual_seed(seed) for seed in (2, 3)]
    pipe = diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext())
    video = draw(pipe, 5, num_inference_steps=1, num_videos_per_prompt=2, generator=both)
    one = draw(pipe, 5, num_inference_steps=1, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(video[1:], one, **CLOSE)


def test_a_callback_may_draw_another_video_and_a_removal_within_a_call_is_named():
    pipe = diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext())
    expected, other = draw(pipe, 7, num_inference_steps=1), draw(pipe, 5, num_inference_steps=1)
    drawn = []

    def look(pipe, step, timestep, values):
        if not drawn:
            drawn.append(draw(pipe, 5, num_inference_steps=1))
        return values

    video = draw(pipe, 7, num_inference_steps=1, callback_on_step_end=look)
    assert torch.equal(drawn[0], other) and torch.equal(video, expected)

    def remove(pipe, step, timestep, values):
        diffaccel.remove(pipe)
        return values

    with pytest.raises(DiffAccelError, match="was removed while a call of the pipeline was running"):
        draw(pipe, 7, num_inference_steps=1, callback_on_step_end=remove)


def test_chunks_of_another_length_look_back_as_far_as_the_network_does():
    for chunk, window in ((None, 7), (1, 7), (2, 7), (3, 9)):
        made = ChunkSampler(tiny_network(num_layers=1), 4, 4, chunk=chunk)
        assert made.engine.window.far + made.engine.window.whole == window


def test_short_chunks_look_back_as_far_as_the_window_says():
    """The ring grows to what the window has left of it; the next call has the ring that its own chunks need."""
    short = {"frames": 9, "num_inference_steps": 1, "chunk_partition": [1] * 9}
    expected = draw(diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext(chunk=1)), **short)
    pipe = diffaccel.accelerate(tiny_chunked(num_layers=1), RollingContext())
    long = draw(pipe, 11, num_inference_steps=1)
    kept = report(pipe)["bytes"]
    torch.testing.assert_close(draw(pipe, **short), expected, **CLOSE)
    assert report(pipe)["bytes"] > kept
    assert torch.equal(draw(pipe, 11, num_inference_steps=1), long) and report(pipe)["bytes"] == kept


@pytest.mark.slow
def test_short_chunks_are_those_of_the_pipeline_while_the_window_holds_all():
    options = {"frames": 8, "num_inference_steps": 1, "chunk_partition": [1] * 8}
    stock = draw(tiny_chunked(), **options)
    drawn = draw(diffaccel.accelerate(tiny_chunked(), RollingContext()), **options)
    torch.testing.assert_close(drawn, stock, rtol=1e-4, atol=1e-5)
