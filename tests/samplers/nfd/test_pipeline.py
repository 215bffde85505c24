"""NFD on a pipeline of a world model: what it leaves as it is, what it changes, with whom it composes."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from torch import Tensor

import diffaccel
from diffaccel import registry
from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.pipeline import NextFramePipeline
from diffaccel.modules.capture.graphs import BACKENDS
from diffaccel.quant import W8A8
from diffaccel.samplers import NFD, Euler
from tests.support.replayed_calls import replayed_calls  # noqa: F401
from tests.support.worlds import OnlyRecorded, tiny_pipeline, tiny_world

HELD = [1, 1, 1, 1, 2, 2, 0]


def draw(pipe: NextFramePipeline, actions: object = HELD, **options: object) -> Tensor:
    return pipe(actions, num_inference_steps=2, **options).frames


@pytest.mark.parametrize("config", [NFD(draft=1), NFD(draft=1, merged=False), NFD(draft=1, latency=1e6)])
def test_one_draft_is_the_plain_video_to_the_bit(config):
    pipe = tiny_pipeline()
    plain = draw(pipe)
    assert plain.shape == (1, 7, 3, 8, 8)
    if config.merged:
        assert torch.equal(draw(diffaccel.accelerate(pipe, config)), plain)
    else:
        torch.testing.assert_close(draw(diffaccel.accelerate(pipe, config)), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(draw(diffaccel.remove(pipe)), plain)


def test_drafts_change_the_video_and_are_counted():
    pipe = tiny_pipeline()
    plain = draw(pipe)
    result = diffaccel.accelerate(pipe, NFD(draft=2))(HELD, num_inference_steps=2)
    assert result.stats["rounds"] == 4 and result.stats["discarded"] == 0
    assert diffaccel.summary(pipe).reports["nfd"]["accepted"] == 7
    torch.testing.assert_close(result.frames[:, 0], plain[:, 0], rtol=1e-4, atol=1e-4)
    assert (result.frames - plain).abs().max() > 1e-3
    assert torch.equal(draw(pipe), result.frames)
    assert torch.equal(draw(diffaccel.remove(pipe)), plain)


def test_rounds_as_graphs_draw_the_same(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", OnlyRecorded)
    for latency in (None, 1e6):
        pipe = tiny_pipeline()
        plain = draw(diffaccel.accelerate(pipe, NFD(draft=2, capture=False, latency=latency)))
        diffaccel.remove(pipe)
        diffaccel.accelerate(pipe, NFD(draft=2, latency=latency))
        for _ in range(2):
            assert torch.equal(draw(pipe), plain)
        engine = pipe.draw_frames.sampler(2, (0,)).engine
        recorded = engine.captures
        assert recorded > 0
        draw(pipe)
        assert engine.captures == recorded
        pipe.transformer.proj_out.weight = torch.nn.Parameter(pipe.transformer.proj_out.weight * 2)
        changed = draw(pipe)
        assert engine.captures > recorded  # they read the weights where these were
        assert torch.equal(draw(diffaccel.accelerate(diffaccel.remove(pipe), NFD(draft=2, capture=False))), changed)


@pytest.mark.parametrize("first", [True, False])
def test_it_composes_with_quantized_weights(first):
    pipe = tiny_pipeline(num_attention_heads=4)
    plain = draw(pipe)
    methods = [NFD(draft=2), W8A8()]
    drawn = draw(diffaccel.accelerate(pipe, *(methods if first else reversed(methods))))
    assert {method["name"] for method in diffaccel.summary(pipe).methods} == {"nfd", "w8a8"}
    diffaccel.remove(pipe)
    quantized = draw(diffaccel.accelerate(pipe, W8A8()))
    torch.testing.assert_close(drawn[:, :1], quantized[:, :1], rtol=1e-4, atol=1e-4)
    assert (quantized - plain).abs().max() > 1e-4
    assert torch.equal(draw(diffaccel.remove(pipe)), plain)


def test_it_composes_with_captured_networks(replayed_calls):  # noqa: F811
    pipe = tiny_pipeline()
    expected = draw(diffaccel.accelerate(pipe, NFD(draft=2, capture=False)))
    diffaccel.accelerate(pipe, "capture")
    assert torch.equal(draw(pipe), expected)
    reasons = diffaccel.summary(pipe).reports["capture"]["eager_calls"]
    assert list(reasons) == ["an argument is a CachedAttention"]
    diffaccel.remove(pipe)


@pytest.mark.parametrize("name", NFD.conflicts)
def test_it_refuses_other_loops_and_caches_by_name(name):
    pipe = tiny_pipeline()
    other = registry.config_class(name)
    try:
        config = other()
    except (DiffAccelError, TypeError):
        pytest.skip("needs options")
    with pytest.raises(DiffAccelError, match=f"'nfd'.*'{name}'|'{name}'.*'nfd'"):
        diffaccel.accelerate(pipe, NFD(draft=1), config)


def test_every_method_composes_or_is_refused_by_name():
    kinds = {name: registry.config_class(name).touches for name in registry.METHODS}
    composes = {name for name, touches in kinds.items() if touches in ("weights", "graphs")}
    assert set(kinds) - composes - {"nfd"} == set(NFD.conflicts)


def test_other_pipelines_are_refused():
    pipe = tiny.make("flux")
    with pytest.raises(DiffAccelError, match="'nfd' drafts the frames of a world model, and FluxPipeline is none"):
        diffaccel.accelerate(pipe, "nfd")
    assert diffaccel.summary(pipe).methods == []


def test_graphs_need_a_cuda_device():
    with pytest.raises(DiffAccelError, match="capture=True records CUDA graphs"):
        diffaccel.accelerate(tiny_pipeline(), NFD(draft=1, capture=True))


def test_too_many_drafts_for_the_window_are_refused_at_once():
    pipe = tiny_pipeline()
    with pytest.raises(DiffAccelError, match="window is 4 with 4 drafts"):
        diffaccel.accelerate(pipe, NFD(draft=4))
    assert diffaccel.summary(pipe).methods == []


def test_the_published_form():
    config = NFD.paper()
    assert config.draft > 1 and not config.merged and NFD.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(("options", "sentence"), [({"draft": 0}, "draft is 0"), ({"latency": 0.0}, "latency is 0")])
def test_options_that_cannot_be_are_named(options, sentence):
    with pytest.raises(DiffAccelError, match=sentence):
        NFD(**options)


def test_saved_and_loaded(tmp_path):
    pipe = NextFramePipeline(tiny_world(torch.float32), FlowMatchLCMScheduler(shift=2.0), context_noise=0.1)
    pipe.save_pretrained(tmp_path / "pipeline")
    loaded = NextFramePipeline.from_folder(tmp_path / "pipeline")
    assert loaded.settings(3) == pipe.settings(3) and loaded.settings(3).rule == "consistency"
    assert torch.equal(draw(loaded), draw(pipe))
    assert torch.equal(draw(diffaccel.load(tmp_path / "pipeline")), draw(pipe))
    pipe.transformer.save_pretrained(tmp_path / "network")
    alone = NextFramePipeline.from_folder(tmp_path / "network")
    assert torch.equal(draw(alone), draw(NextFramePipeline(pipe.transformer)))
    with pytest.raises(DiffAccelError, match=r"neither model_index.json nor config.json"):
        NextFramePipeline.from_folder(tmp_path)


@pytest.mark.slow
def test_what_is_kept_between_calls_follows_the_pipeline():
    plain, pipe = tiny_pipeline(), diffaccel.accelerate(tiny_pipeline(), NFD(draft=1))
    other = tiny_world(torch.float32)
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    changes = [
        lambda one: setattr(one, "scheduler", FlowMatchEulerDiscreteScheduler(shift=3.0)),
        lambda one: setattr(one, "scheduler", FlowMatchLCMScheduler()),
        lambda one: one.register_to_config(context_noise=0.2),
        lambda one: setattr(one, "transformer", copy.deepcopy(other)),
        lambda one: one.transformer.proj_out.weight.data.mul_(0.5),
    ]
    before = draw(pipe)
    for change in changes:
        change(plain), change(pipe)
        now = draw(pipe)
        assert torch.equal(now, draw(plain)) and not torch.equal(now, before)
        before = now


def test_a_call_in_inference_mode_and_one_outside():
    pipe = tiny_pipeline()
    plain = draw(pipe)
    diffaccel.accelerate(pipe, NFD(draft=1))
    with torch.inference_mode():
        assert torch.equal(draw(pipe), plain)
    assert torch.equal(draw(pipe), plain)


def test_copies_draw_alone():
    pipe = diffaccel.accelerate(tiny_pipeline(), NFD(draft=2))
    other = copy.deepcopy(pipe)
    expected = draw(pipe)
    assert torch.equal(draw(other), expected)
    diffaccel.remove(other)
    assert torch.equal(draw(pipe), expected) and not torch.equal(draw(other), expected)


@pytest.mark.slow
def test_a_compiled_network_draws_the_same():
    pipe = tiny_pipeline()
    expected = draw(pipe)
    torch.compiler.reset()
    pipe.transformer.compile(backend="eager")
    torch.testing.assert_close(draw(pipe, HELD[:2]), expected[:, :2], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_layers_compile_around_their_attention_under_quantized_weights():
    pipe = diffaccel.accelerate(tiny_pipeline(num_attention_heads=4), W8A8(), NFD(draft=2))
    expected = draw(pipe, HELD[:3])
    torch.compiler.reset()
    pipe.transformer.compile_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(draw(pipe, HELD[:3]), expected, rtol=1e-3, atol=1e-3)


def test_arguments_of_a_call():
    pipe = tiny_pipeline()
    frames = torch.zeros(2, 3, 8, 8)
    both = draw(pipe, [HELD, HELD[::-1]], frames=frames, frame_actions=[0, 1], seeds=(3, 4))
    assert both.shape == (2, 7, 3, 8, 8)
    alone = draw(pipe, HELD[::-1], frames=frames, frame_actions=[0, 1], seeds=4)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    images = draw(pipe, HELD, output_type="np")
    assert images.shape == (1, 7, 8, 8, 3) and images.dtype == "uint8"
    for options, sentence in [
        ({"output_type": "pil"}, "output_type"), ({"seeds": (1, 2)}, "2 seeds for 1 videos"),
        ({"frames": torch.zeros(9, 3, 8, 8)}, "window is 4"),
        ({"frames": torch.full((1, 3, 8, 8), 255.0)}, r"go up to 255; they must be in \[-1, 1\]"),
    ]:  # fmt: skip
        with pytest.raises(DiffAccelError, match=sentence):
            draw(pipe, **options)


GREY = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_inference_steps": 2.0}, "num_inference_steps is 2.0; it must be a whole number"),
        ({"num_inference_steps": -1}, "num_inference_steps is -1; it must be a whole number, 1 or more"),
        ({"num_inference_steps": None}, "steps is None"),
        ({"frames": np.zeros((1, 8, 8, 3), np.uint8)}, r"\(1, 8, 8, 3\) in uint8; .* Bytes .* become floats by"),
        ({"frames": np.zeros((1, 3, 8, 4), np.float32)}, r"\(1, 3, 8, 4\) in torch.float32; they must be floats"),
        ({"frames": np.array([None])}, "in object; they must be floats"),
        ({"frames": [[1.0]]}, "frames are a list; they must be a tensor or an array of floats"),
        ({"frames": "a.png"}, "frames are a str"),
        ({"frames": torch.zeros(3, 1, 3, 8, 8)}, "frames are of 3 videos and actions of 1"),
        ({"actions": 3}, r"actions have the shape \(\)"),
        ({"actions": [0.5]}, "actions are torch.float32; they must be integers from 0 to 3"),
        ({"actions": ["up"]}, "actions are no table of integers"),
        ({"actions": None}, "actions are no table of integers"),
        ({"actions": [-1]}, "actions hold -1"),
        ({"actions": np.array([9], np.uint16)}, "actions hold 9"),
        ({"frames": GREY, "frame_actions": [0.5]}, "frame_actions are torch.float32"),
        ({"seeds": 1.5}, "seeds is 1.5; it must be a list of whole numbers"),
        ({"seeds": None}, "seeds is None"),
        ({"seeds": True}, "seeds is True"),
        ({"seeds": -1}, "seeds holds -1"),
        ({"output_type": 3}, "Unknown output_type '3'"),
    ],
    ids=str,
)
def test_arguments_of_a_wrong_kind_are_named_before_any_work(options, sentence):
    pipe = tiny_pipeline()
    pipe.draw_frames = None  # which would be the work
    with pytest.raises(DiffAccelError, match=sentence):
        pipe(**{"actions": [0], **options})


def test_arrays_of_any_integer_and_float_are_taken():
    pipe = tiny_pipeline()
    expected = draw(pipe, [1, 2], frames=GREY)
    for floats, integers in ((np.float64, np.uint16), (np.float32, np.int8)):
        frames = GREY.numpy().astype(floats)[:, ::-1]
        assert torch.equal(draw(pipe, np.array([1, 2], integers), frames=frames), expected)


@pytest.mark.parametrize("noise", [-0.1, 0.5, math.nan, "a"])
def test_a_noise_of_the_context_that_cannot_be_is_named_at_once(noise):
    with pytest.raises(DiffAccelError, match=f"context_noise is {noise!r}"):
        NextFramePipeline(tiny_world(torch.float32), context_noise=noise)


def test_a_scheduler_without_sigmas_is_refused():
    with pytest.raises(DiffAccelError, match="DDIMScheduler, whose levels are not the sigmas of flow matching"):
        NextFramePipeline(tiny_world(torch.float32), DDIMScheduler())


def test_levels_are_those_of_the_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    settings = NextFramePipeline(tiny_world(torch.float32), scheduler).settings(4)
    assert settings.shift == 3.0 and settings.rule == "euler"


def test_samplers_of_one_sample_are_refused():
    pipe = tiny_pipeline()
    with pytest.raises(DiffAccelError, match=r"draws frame after frame\. Use 'nfd'"):
        diffaccel.accelerate(pipe, Euler())
    assert type(pipe) is NextFramePipeline  # as it was


def test_other_models_are_no_world_models(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(DiffAccelError, match="holds a FluxPipeline, which is no world model"):
        NextFramePipeline.from_folder(tmp_path)
