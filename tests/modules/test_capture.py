"""Capture on pipelines, on the CPU by a stand-in for graphs: equal to the bit, below caches and under samplers."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import numpy as np
import pytest
import tiny
import tiny_more
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import ControlNetModel, FirstBlockCacheConfig
from PIL import Image
from torch import nn

import diffaccel
from diffaccel import presets
from diffaccel.errors import DiffAccelError
from diffaccel.modules import Capture
from diffaccel.modules.capture.arenas import Store
from diffaccel.modules.capture.interceptor import Interceptor
from diffaccel.runs.generate import generate_run
from diffaccel.runs.request import Request
from diffaccel.samplers import (
    BoN,
    Bottleneck,
    DiffusersCache,
    Euler,
    FirstBlockCache,
    Heun,
    SeaCache,
    Spectrum,
    TaylorSeer,
)
from tests.support.replayed_calls import ReplayedCalls, replayed_calls
from tests.support.small_pipelines import Drifting
from tests.support.small_pipelines import draw as draw_small
from tests.support.small_pipelines import make as make_small

__all__ = ["replayed_calls"]  # a fixture
captures = pytest.mark.usefixtures("replayed_calls")
PATTERN, STEPS = (0, 1, 3, 5), 6


def make(family: str) -> Any:
    return (tiny if family in tiny.FAMILIES else tiny_more).make(family)


def draw(pipe: Any, family: str, steps: int = STEPS, **changes: Any) -> torch.Tensor:
    kwargs = (tiny if family in tiny.FAMILIES else tiny_more).call_kwargs(family, **changes)
    return tiny_more.result(pipe(**{**kwargs, "num_inference_steps": steps})).clone()


def told(pipe: Any) -> dict[str, Any]:
    return diffaccel.summary(pipe).reports["capture"]


def modules(pipe: Any) -> list[nn.Module]:
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return [module for part in parts for module in part.modules()]


# -- under samplers ----------------------------------------------------------------------------------------------------


@captures
@pytest.mark.parametrize("config", [Euler(), Euler(max_batch=1), Heun(), Euler(guidance_stop=0.5)], ids=repr)
def test_under_a_sampler_pictures_are_those_of_the_sampler(config: Any) -> None:
    pipe = make("sd3")
    expected = draw(diffaccel.accelerate(pipe, config), "sd3")
    diffaccel.accelerate(diffaccel.remove(pipe), Capture(), config)
    assert torch.equal(draw(pipe, "sd3"), expected) and torch.equal(draw(pipe, "sd3"), expected)
    assert told(pipe)["graphs"] == (2 if config.guidance_stop < 1 else 1)
    calls = 2 * diffaccel.summary(pipe).last_run["calls"]
    assert told(pipe)["replays"] == calls - 2 * told(pipe)["graphs"]


@captures
def test_stages_have_a_graph_for_each_resolution() -> None:
    stages = Bottleneck(preset="speed", tolerance=0.2, spectrum=(3.0, 1.4))
    pipe = make("flux")
    expected = draw(diffaccel.accelerate(pipe, stages), "flux", size=64)
    sizes = len(diffaccel.summary(pipe).last_run["nfe_by_resolution"])
    diffaccel.accelerate(diffaccel.remove(pipe), Capture(), stages)
    assert torch.equal(draw(pipe, "flux", size=64), expected) and torch.equal(draw(pipe, "flux", size=64), expected)
    assert sizes > 1 and told(pipe)["graphs"] == sizes and told(pipe)["replays"] > 0


@captures
def test_under_a_search_and_in_a_pipelines_own_loop() -> None:
    pipe = make("flux")
    search = BoN(reward=lambda images, prompts: images.mean((1, 2, 3)), budget=24)
    call = functools.partial(tiny.call_kwargs, "flux", guided=False)
    expected = diffaccel.accelerate(pipe, search)(**{**call(), "output_type": "pt"}).images
    diffaccel.accelerate(diffaccel.remove(pipe), search, Capture())
    assert torch.equal(pipe(**{**call(), "output_type": "pt"}).images, expected) and told(pipe)["replays"] > 0
    small = make_small(Drifting)
    stock = draw_small(small)
    diffaccel.accelerate(small, Capture())
    assert torch.equal(draw_small(small), stock) and told(small)["replays"] == 1


@captures
def test_two_networks_and_both_branches() -> None:
    pipe = make("wan22")
    stock = draw(pipe, "wan22")
    diffaccel.accelerate(pipe, Capture())
    assert torch.equal(draw(pipe, "wan22"), stock) and torch.equal(draw(pipe, "wan22"), stock)
    assert told(pipe)["graphs"] == 2 and told(pipe)["replays"] == 2 * 2 * STEPS - 4
    diffaccel.remove(pipe)
    assert not any("forward" in vars(module) for module in modules(pipe))


# -- below caches ------------------------------------------------------------------------------------------------------

CACHES = [Spectrum(real_steps=PATTERN), TaylorSeer(interval=2), SeaCache(), SeaCache.paper()]
CACHES += [FirstBlockCache(threshold=0.3), FirstBlockCache.paper()]


@pytest.mark.slow
@captures
@pytest.mark.parametrize("cache", CACHES, ids=repr)
def test_below_a_cache_blocks_are_captured_and_pictures_are_those_of_the_cache(cache: Any) -> None:
    pipe = make("flux")
    stock = draw(pipe, "flux")
    diffaccel.accelerate(pipe, cache)
    expected = [draw(pipe, "flux", seed=seed) for seed in range(2)]
    pattern = diffaccel.summary(pipe).last_run["caches"]["real_steps"]
    diffaccel.accelerate(diffaccel.remove(pipe), Capture(), cache)
    assert all(torch.equal(draw(pipe, "flux", seed=seed), expected[seed]) for seed in (0, 1, 0, 1))
    assert diffaccel.summary(pipe).last_run["caches"]["real_steps"] == pattern
    assert told(pipe)["graphs"] == 2 and told(pipe)["replays"] > 0
    assert told(pipe)["modules"] == ["FluxSingleTransformerBlock", "FluxTransformerBlock"]
    assert torch.equal(draw(diffaccel.remove(pipe), "flux"), stock)
    assert not any("forward" in vars(module) for module in modules(pipe))


@captures
@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_below_a_cache_on_a_unet_the_whole_network_is_captured(family: str) -> None:
    pipe = make(family)
    expected = draw(diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN)), family)
    diffaccel.accelerate(diffaccel.remove(pipe), Spectrum(real_steps=PATTERN), Capture())
    assert torch.equal(draw(pipe, family), expected) and torch.equal(draw(pipe, family), expected)
    assert told(pipe)["modules"] == ["UNet2DConditionModel"]
    assert told(pipe)["replays"] == 2 * len(PATTERN) - 2 and told(pipe)["graphs"] == 1


@pytest.mark.slow
@captures
@pytest.mark.parametrize("family", ["flux", "sd"])
def test_capture_is_last_also_when_a_cache_comes_later_or_goes(family: str) -> None:
    pipe = make(family)
    stock = draw(pipe, family)
    cached = draw(diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN)), family)
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, Capture())
    assert torch.equal(draw(pipe, family), stock)
    diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN))
    assert [m["name"] for m in diffaccel.summary(pipe).methods] == ["spectrum", "capture"]
    assert torch.equal(draw(pipe, family), cached) and torch.equal(draw(pipe, family), cached)
    assert told(pipe)["replays"] > 0
    diffaccel.accelerate(pipe, Euler(state="stock"))
    assert torch.equal(draw(pipe, family), cached)
    assert torch.equal(draw(diffaccel.remove(pipe), family), stock)
    assert "captur" not in str(diffaccel.summary(pipe))


@captures
def test_a_method_that_fails_leaves_the_graphs_on() -> None:
    pipe = diffaccel.accelerate(make("sd"), Capture())
    stock = draw(pipe, "sd")
    with pytest.raises(DiffAccelError, match="looks at the first of a transformer's blocks"):
        diffaccel.accelerate(pipe, FirstBlockCache())
    assert torch.equal(draw(pipe, "sd"), stock) and told(pipe)["replays"] > 0
    assert [m["name"] for m in diffaccel.summary(pipe).methods] == ["capture"]
    compiled = make("flux")
    compiled.transformer = torch.compile(compiled.transformer, backend="eager")
    diffaccel.accelerate(compiled, Capture())
    with pytest.raises(DiffAccelError, match="compiled as a whole and has a step cache on its blocks"):
        diffaccel.accelerate(compiled, Spectrum())
    assert [m["name"] for m in diffaccel.summary(compiled).methods] == ["capture"]


@pytest.mark.slow
@captures
def test_a_preset_that_drops_a_cache_keeps_capture_last(tmp_path: Path) -> None:
    pipe = make("flux")
    cache = {"name": "spectrum", "real_steps": list(PATTERN)}
    points = {
        "fast": {"methods": [{"name": "capture"}, cache], "call": {"steps": STEPS}},
        "exact": {"methods": [{"name": "capture"}], "call": {"steps": STEPS}},
    }
    presets.write(
        tmp_path / "preset.json", {"default": "fast", "architecture": presets.architecture(pipe), "points": points}
    )
    stock = draw(pipe, "flux")
    cached = draw(diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN)), "flux")
    diffaccel.accelerate(diffaccel.remove(pipe), tmp_path / "preset.json")
    for name, expected in (("fast", cached), ("exact", stock), ("fast", cached)):
        diffaccel.set_quality(pipe, name)
        assert torch.equal(draw(pipe, "flux"), expected) and torch.equal(draw(pipe, "flux"), expected)
        assert told(pipe)["replays"] > 0
        assert told(pipe)["modules"][0] == (
            "FluxTransformer2DModel" if name == "exact" else "FluxSingleTransformerBlock"
        )
    assert torch.equal(draw(diffaccel.remove(pipe), "flux"), stock)


@captures
@pytest.mark.slow
def test_compiled_blocks_below_a_cache() -> None:
    torch.compiler.reset()
    expected = draw(diffaccel.accelerate(make("flux"), Spectrum(real_steps=PATTERN)), "flux", guided=False)
    pipe = make("flux")
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN), Capture())
    assert torch.equal(draw(pipe, "flux", guided=False), expected) and told(pipe)["replays"] > 0
    diffaccel.remove(pipe)
    assert not any(isinstance(vars(m).get("_compiled_call_impl"), Interceptor) for m in modules(pipe))


# -- what users change -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@captures
def test_adapters_and_their_scales_are_recorded_again() -> None:
    case = matrix.Case("flux", Capture())
    pipe, plain = (matrix.with_lora(case, case.make(), "one", 1) for _ in range(2))
    case.wrap(pipe)

    def check(change: Callable[[Any], Any]) -> None:
        for one in (pipe, plain):
            change(one)
        expected = case.call(plain)
        before = told(pipe)["replays"]
        assert torch.equal(case.call(pipe), expected) and torch.equal(case.call(pipe), expected)
        assert told(pipe)["replays"] > before

    check(lambda one: None)
    check(lambda one: one.set_adapters(["one"], [0.5]))
    check(lambda one: one.transformer.disable_adapters())
    check(lambda one: one.transformer.enable_adapters())
    check(lambda one: one.fuse_lora())
    check(lambda one: one.unfuse_lora())
    check(lambda one: one.unload_lora_weights())
    check(lambda one: one.transformer.fuse_qkv_projections())
    assert told(pipe)["graphs"] == 1 and sum(told(pipe)["dropped"].values()) >= 5


@captures
def test_residuals_of_a_controlnet_and_popped_lists() -> None:
    """Tensors in tuples, lists and dicts of the arguments, some of which the network takes out of its list."""
    unet = make("sd").unet
    control = ControlNetModel.from_unet(unet).eval()
    for p in control.parameters():
        p.data.add_(0.05)
    plain = copy.deepcopy(unet)
    interceptor = Interceptor.of(unet, Store(None, False))
    interceptor.put_on()
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        x, text, hint = (
            torch.randn(*shape, generator=generator) for shape in ((2, 4, 4, 4), (2, 7, 32), (2, 3, 32, 32))
        )
        time = torch.tensor(100.0 * (step + 1))
        with torch.no_grad():
            down, mid = control(x, time, text, hint, conditioning_scale=0.5 + step, return_dict=False)
            arguments = {"encoder_hidden_states": text, "cross_attention_kwargs": {"scale": 1.0}, "return_dict": False}
            residuals = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
            assert torch.equal(unet(x, time, **arguments, **residuals)[0], plain(x, time, **arguments, **residuals)[0])
            popped = [[torch.full((2, 8, 2, 2), 0.1), torch.full((2, 16, 2, 2), 0.1)] for _ in range(2)]
            results = [
                net(x, time, **arguments, down_intrablock_additional_residuals=rest)[0]
                for net, rest in zip((unet, plain), popped, strict=True)
            ]
            assert torch.equal(*results)
    assert interceptor.unit.store.account.replays == 2 * 3


@captures
def test_a_callback_may_change_the_network_between_steps() -> None:
    case = matrix.Case("flux", Capture())
    pipe = matrix.with_lora(case, case.make(), "one", 1)

    def rescale(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters(["one"], [1.0 if i < 2 else 0.25])
        return {}

    expected = case.call(pipe, extra={"callback_on_step_end": rescale})
    pipe.set_adapters(["one"], [1.0])
    case.wrap(pipe)
    assert torch.equal(case.call(pipe, extra={"callback_on_step_end": rescale}), expected)
    assert told(pipe)["replays"] > 0


# -- options -----------------------------------------------------------------------------------------------------------


@captures
def test_channels_last_is_the_network_in_that_format_and_goes_again() -> None:
    pipe, plain = make("sd"), make("sd")
    before = {name: p.stride() for name, p in pipe.unet.named_parameters()}
    values = {name: p.clone() for name, p in pipe.unet.named_parameters()}
    plain.unet.to(memory_format=torch.channels_last)
    expected = draw(plain, "sd")
    diffaccel.accelerate(pipe, Capture(memory_format="channels_last"))
    weight = pipe.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    assert torch.equal(draw(pipe, "sd"), expected) and torch.equal(draw(pipe, "sd"), expected)
    diffaccel.remove(pipe)
    assert {name: p.stride() for name, p in pipe.unet.named_parameters()} == before
    assert all(torch.equal(p, values[name]) for name, p in pipe.unet.named_parameters())


@captures
@pytest.mark.parametrize("asked", [True, False])
def test_cudnn_times_its_algorithms_in_the_network_alone(asked: bool) -> None:
    seen = []
    small = make_small(Drifting)
    forward = type(small.unet).forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.backends.cudnn.benchmark)
        return forward(small.unet, *args, **kwargs)

    small.unet.forward = watched
    diffaccel.accelerate(small, Capture(cudnn_benchmark=asked))
    draw_small(small)
    assert set(seen[:4]) == {asked} and not torch.backends.cudnn.benchmark


def test_a_config_says_what_it_takes() -> None:
    with pytest.raises(DiffAccelError, match=r"Capture\.budget_gib is -1"):
        Capture(budget_gib=-1.0)
    with pytest.raises(DiffAccelError, match="memory_format is 'nhwc'; it must be one of 'preserve', 'channels_last'"):
        Capture(memory_format="nhwc")
    assert Capture.paper() == Capture()


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_network_on_the_cpu_is_refused_before_anything_is_done() -> None:
    pipe = make("flux")
    with pytest.raises(DiffAccelError, match=r"FluxTransformer2DModel is on cpu\. Move the pipeline first, by"):
        diffaccel.accelerate(pipe, Capture())
    assert "_diffaccel" not in vars(pipe) and not any("forward" in vars(module) for module in modules(pipe))


@captures
def test_offloading_is_refused_also_when_it_comes_later() -> None:
    pipe = make("flux")
    diffaccel.accelerate(pipe, Capture())
    draw(pipe, "flux")
    add_hook_to_module(pipe.transformer, ModelHook())
    with pytest.raises(DiffAccelError, match="accelerate's offloading moves them"):
        draw(pipe, "flux")
    diffaccel.remove(pipe)
    with pytest.raises(DiffAccelError, match="accelerate's offloading moves them"):
        diffaccel.accelerate(pipe, Capture())


@captures
def test_hooks_and_caches_of_diffusers_are_refused() -> None:
    pipe = diffaccel.accelerate(make("flux"), Capture())
    draw(pipe, "flux")
    with pytest.raises(DiffAccelError, match="'diffusers_cache' cannot be active together"):
        diffaccel.accelerate(pipe, DiffusersCache())
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(DiffAccelError, match=r"would not run the hook '.*' of diffusers in FluxTransformer2DModel"):
        for _ in range(2):
            draw(pipe, "flux")


@captures
def test_what_shards_captures_or_shares_a_network_is_refused() -> None:
    pipe = make("flux")
    other = copy.copy(pipe)
    diffaccel.accelerate(pipe, Capture())
    with pytest.raises(DiffAccelError, match="FluxTransformer2DModel is captured already"):
        diffaccel.accelerate(other, Capture())
    pipe = make("sd")
    pipe.unet.compile(mode="reduce-overhead")
    with pytest.raises(DiffAccelError, match="compiled with mode='reduce-overhead'"):
        diffaccel.accelerate(pipe, Capture())
    pipe = make("sd")
    pipe.unet.mid_block.to("meta")
    with pytest.raises(DiffAccelError, match="whole UNet2DConditionModel on one device, and it is on cpu, meta"):
        diffaccel.accelerate(pipe, Capture())
    pipe = make("sd")
    pipe.unet.mid_block.__class__ = type("Sharded", (FSDPModule, type(pipe.unet.mid_block)), {})
    with pytest.raises(DiffAccelError, match="FSDP shards it"):
        diffaccel.accelerate(pipe, Capture())
    small = make_small(Drifting)
    with pytest.raises(DiffAccelError, match="for networks of 2-D convolutions, and Net has none"):
        diffaccel.accelerate(small, Capture(memory_format="channels_last"))


class FSDPModule:
    """Named as the class that ``fully_shard`` mixes in."""


# -- copies, summary, records ------------------------------------------------------------------------------------------


@pytest.mark.slow
@captures
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copy_has_graphs_of_its_own(duplicate: Callable[[Any], Any]) -> None:
    pipe = make("flux")
    stock = draw(pipe, "flux")
    diffaccel.accelerate(pipe, Capture(), Euler(state="stock"))
    assert torch.equal(draw(pipe, "flux"), stock)
    other = duplicate(pipe)
    assert told(other)["graphs"] == 0 and torch.equal(draw(other, "flux"), stock) and told(other)["graphs"] == 1
    assert torch.equal(draw(diffaccel.remove(other), "flux"), stock)
    assert torch.equal(draw(pipe, "flux"), stock) and told(pipe)["replays"] == 2 * 2 * STEPS - 2


@captures
def test_summary_and_record_tell_graphs_replays_and_other_calls(tmp_path: Any) -> None:
    pipe = make("flux")
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: None)
    diffaccel.accelerate(pipe, Capture())
    draw(pipe, "flux", guided=False)
    shown = str(diffaccel.summary(pipe))
    assert "graphs      0 in 0.00 GiB, 0 replays" in shown and "without   1: the first call of its kind" in shown
    assert f"without   {STEPS - 1}: a hook is on its transformer_blocks.0" in shown
    json.dumps(diffaccel.summary(pipe).to_dict())
    settings = {"prompts": ("a",), "model": "mine", "steps": 4, "size": (32, 32), "num": 2}
    plain = generate_run(Request(**settings), tmp_path / "plain", pipe=make("flux"))
    captured = diffaccel.accelerate(make("flux"), Capture())
    run = generate_run(Request(**settings), tmp_path / "run", pipe=captured)
    for made, expected in zip(run["images"], plain["images"], strict=True):
        pictures = [Image.open(tmp_path / a / b["file"]) for a, b in (("run", made), ("plain", expected))]
        assert np.array_equal(*map(np.asarray, pictures))
    graphs = run["cost"]["graphs"]  # the run's own hooks around the network do not keep it from being replayed
    assert (graphs["graphs"], graphs["replays"], sum(graphs["eager_calls"].values())) == (1, 6, 2)


def test_the_stand_in_is_no_part_of_the_package(replayed_calls: type[ReplayedCalls]) -> None:
    from diffaccel.modules.capture.graphs import BACKENDS, CudaGraphs

    assert BACKENDS == {"cuda": CudaGraphs, "cpu": replayed_calls}
