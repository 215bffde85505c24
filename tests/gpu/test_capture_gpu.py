"""Capture on a GPU: graphs equal the network to the bit, are never stale, wait for nothing, and give memory back."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import matrix
import pytest
import tiny
import tiny_more
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.modules import Capture
from diffaccel.modules.capture.arenas import Store
from diffaccel.modules.capture.interceptor import Interceptor
from diffaccel.samplers import Bottleneck, Euler, FirstBlockCache, SeaCache, Spectrum, TaylorSeer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 6


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    return (tiny if family in tiny.FAMILIES else tiny_more).make(family).to("cuda", dtype)


def draw(pipe: Any, family: str, steps: int = STEPS, **changes: Any) -> Tensor:
    extra = changes.pop("extra", {})
    kwargs = (tiny if family in tiny.FAMILIES else tiny_more).call_kwargs(family, **changes)
    return tiny_more.result(pipe(**{**kwargs, "num_inference_steps": steps, **extra})).clone()


def told(pipe: Any) -> dict[str, Any]:
    return diffaccel.summary(pipe).reports["capture"]


def unet(dtype: torch.dtype = torch.float16) -> UNet2DConditionModel:
    """SDXL's UNet in its structure, small."""
    torch.manual_seed(0)
    config = {
        "sample_size": 32, "in_channels": 4, "out_channels": 4, "block_out_channels": (64, 128, 256),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
        "transformer_layers_per_block": (1, 1, 2), "attention_head_dim": (2, 4, 8), "cross_attention_dim": 128,
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 64 + 6 * 32,
    }  # fmt: skip
    return UNet2DConditionModel(**config).eval().requires_grad_(False).to("cuda", dtype)


def unet_inputs(seed: int, size: int = 32, rows: int = 2, dtype: torch.dtype = torch.float16) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    added = {"text_embeds": random(rows, 64), "time_ids": random(rows, 6)}
    return {
        "sample": random(rows, 4, size, size), "timestep": torch.linspace(1, 999, 40, device="cuda")[seed],
        "encoder_hidden_states": random(rows, 77, 128), "added_cond_kwargs": added, "return_dict": False,
    }  # fmt: skip


def captured(net: nn.Module, budget: int | None = None, benchmarks: bool = False) -> Interceptor:
    interceptor = Interceptor.of(net, Store(budget, benchmarks))
    interceptor.put_on()
    return interceptor


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- one network -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_unet_of_sdxl_equals_itself(dtype: torch.dtype) -> None:
    net = unet(dtype)
    expected = [net(**unet_inputs(seed, dtype=dtype))[0] for seed in range(6)]
    interceptor = captured(net)
    results = [net(**unet_inputs(seed, dtype=dtype))[0] for seed in (*range(6), *range(6))]  # all are kept
    assert all(torch.equal(result, expected[i % 6]) for i, result in enumerate(results))
    assert interceptor.unit.store.account.replays == 10


def test_channels_last_equals_the_network_in_that_format() -> None:
    net = unet()
    net.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    try:
        expected = [net(**unet_inputs(seed))[0] for seed in range(4)]
    finally:
        torch.backends.cudnn.benchmark = False
    interceptor = captured(net, benchmarks=True)
    results = [net(**unet_inputs(seed))[0] for seed in (*range(4), *range(4))]
    assert all(torch.equal(result, expected[i % 4]) for i, result in enumerate(results))
    assert results[-1].stride() == expected[-1].stride() and interceptor.unit.store.account.replays == 6
    assert not torch.backends.cudnn.benchmark


def test_sizes_rows_and_timesteps_on_the_cpu() -> None:
    net = unet()
    cases = [{"size": 32}, {"size": 48}, {"rows": 1}, {"size": 32}]
    expected = [net(**unet_inputs(3, **case))[0] for case in cases]
    interceptor = captured(net)
    for _ in range(4):
        for case, value in zip(cases, expected, strict=True):
            assert torch.equal(net(**unet_inputs(3, **case))[0], value)
    assert interceptor.unit.store.graphs == 3
    on_cpu = {**unet_inputs(3), "timestep": torch.tensor(500.0)}
    before = interceptor.unit.store.account.replays
    for time in (500.0, 20.0, 500.0, 777.0):
        on_cpu["timestep"] = torch.tensor(time)
        on_device = {**on_cpu, "timestep": torch.tensor(time, device="cuda")}
        assert torch.equal(net(**on_cpu)[0], type(net).forward(net, **on_device)[0])
    assert interceptor.unit.store.account.replays == before + 2


def test_a_replay_waits_for_nothing_and_runs_on_any_stream() -> None:
    net = unet()
    inputs = [unet_inputs(seed) for seed in range(4)]
    expected = [net(**one)[0] for one in inputs]
    captured(net)
    for one in inputs:
        net(**one)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = [net(**one)[0] for one in inputs]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, results, expected))
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for one, stream in zip(inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            results.append(net(**one)[0])
    torch.cuda.synchronize()
    assert all(map(torch.equal, results, expected))


def test_weights_that_move_are_recorded_again_and_changes_in_place_are_seen() -> None:
    net, twin = unet(), unet()
    interceptor = captured(net)
    one = unet_inputs(1)

    def check() -> None:
        for _ in range(3):
            assert torch.equal(net(**one)[0], twin(**one)[0])

    check()
    for module in (net, twin):
        module.conv_in.weight.mul_(1.5)
    check()
    assert interceptor.unit.store.account.captures == 1
    net.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    blocker = [torch.empty(2**20, device="cuda") for _ in range(64)]  # where the weights were
    net.to("cuda")
    check()
    assert interceptor.unit.store.account.captures == 2 and len(blocker) == 64


def test_autocast() -> None:
    net = unet(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        expected = [net(**unet_inputs(seed, dtype=torch.float32))[0] for seed in range(4)]
    interceptor = captured(net)
    for seed in (*range(4), *range(4)):
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(net(**unet_inputs(seed, dtype=torch.float32))[0], expected[seed])
        torch.empty(2**24, device="cuda").fill_(7.0)  # where cast weights were
    assert interceptor.unit.store.account.replays == 6


def test_tables_that_a_function_keeps_outlive_their_cache() -> None:
    tables: dict[str, Tensor] = {}

    def scaled(x: Tensor) -> Tensor:
        if "table" not in tables:
            tables["table"] = torch.linspace(0, 1, 64, device="cuda")
        return x * tables["table"]

    net = Net(scaled).to("cuda")
    x = torch.randn(8, 64, device="cuda")
    expected = net(x)
    interceptor = captured(net)
    for _ in range(3):
        assert torch.equal(net(x), expected)
    tables.clear()
    gc.collect()
    others = [torch.full((64,), 9.0, device="cuda") for _ in range(1000)]
    assert torch.equal(net(x), expected) and len(others) == 1000
    assert interceptor.unit.store.account.replays == 2


class Net(nn.Module):
    def __init__(self, inside: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64, bias=False)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(self.proj(x))


BAD: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "host constant": lambda x: x * torch.tensor([2.0] * 64, device="cuda"),
    "synchronize": lambda x: (torch.cuda.synchronize(), x + 1)[1],
    "nonzero": lambda x: x[x > 0],
    "random": lambda x: x + torch.randn(64, device="cuda"),
    "error": lambda x: x + torch.ones(3, device="cuda") if torch.cuda.is_current_stream_capturing() else x,
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_graph_can_hold_runs_without_one_and_leaves_the_device_in_order(case: str) -> None:
    net, good = (Net(inside).to("cuda") for inside in (BAD[case], torch.relu))
    x = torch.randn(8, 64, device="cuda")
    interceptor = captured(net)
    for _ in range(3):
        torch.manual_seed(0)
        result = net(x)
        torch.manual_seed(0)
        assert torch.equal(result, type(net).forward(net, x))
    assert interceptor.unit.store.account.replays == 0 and interceptor.unit.store.graphs == 0
    torch.manual_seed(0)
    first = torch.randn(100, device="cuda")  # the generator is outside of any recording
    torch.manual_seed(0)
    assert torch.equal(torch.randn(100, device="cuda"), first)
    other = captured(good)
    for seed in range(4):
        x = torch.randn(8, 64, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        assert torch.equal(good(x), type(good).forward(good, x))
    assert other.unit.store.account.replays == 2
    before = torch.cuda.memory_allocated()
    for _ in range(50):
        torch.empty(2**22, device="cuda")
    assert torch.cuda.memory_allocated() == before


def test_two_threads_record_at_once() -> None:
    nets = [unet(), unet()]
    expected = [nets[0](**unet_inputs(seed))[0] for seed in range(4)]
    failures: list[str] = []

    def work(net: nn.Module) -> None:
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
            captured(net)
            for seed in (*range(4), *range(4)):
                result = net(**unet_inputs(seed))[0]
                torch.cuda.current_stream().synchronize()
                if not torch.equal(result, expected[seed]):
                    failures.append(f"seed {seed}")

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# -- memory ------------------------------------------------------------------------------------------------------------


def reserved() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def test_memory_returns_after_removal_and_over_the_budget() -> None:
    net = unet()
    net(**unet_inputs(0, size=64))
    before = reserved()
    interceptor = captured(net)
    for _ in range(3):
        net(**unet_inputs(0, size=64))
    store = interceptor.unit.store
    one = store.bytes
    type(net).forward(net, **unet_inputs(0, size=64))  # workspaces of cuBLAS are there, as before
    assert store.graphs == 1 and one > 0 and reserved() >= before + one // 2
    interceptor.remove()
    assert reserved() <= before + 2**21
    interceptor = captured(net, budget=int(1.2 * one))
    store = interceptor.unit.store
    for size in (64, 56, 64, 48):
        for _ in range(3):
            net(**unet_inputs(0, size=size))
        assert store.bytes <= store.budget
    assert store.account.dropped["over the budget"] >= 2
    interceptor.remove()
    assert reserved() <= before + 2**21
    interceptor = captured(net, budget=1024)
    for _ in range(4):
        net(**unet_inputs(0))
    assert interceptor.unit.store.account.replays == 0 and interceptor.unit.store.bytes == 0


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", matrix.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pictures_equal_and_most_calls_are_replays(family: str, dtype: torch.dtype) -> None:
    pipe = make(family, dtype)
    expected = draw(pipe, family)
    if not torch.equal(draw(pipe, family), expected):
        pytest.skip("the stock call itself differs from run to run")
    diffaccel.accelerate(pipe, Capture())
    assert torch.equal(draw(pipe, family), expected) and torch.equal(draw(pipe, family), expected)
    report = told(pipe)
    assert report["replays"] > sum(report["eager_calls"].values()), report
    assert torch.equal(draw(diffaccel.remove(pipe), family), expected)


@pytest.mark.parametrize("cache", [Spectrum(), TaylorSeer(), SeaCache(), FirstBlockCache(threshold=0.3)], ids=repr)
@pytest.mark.parametrize("family", ["flux", "wan", "sdxl"])
def test_below_a_cache(family: str, cache: Any) -> None:
    if family == "sdxl" and cache.probes:
        pytest.skip("the method needs a transformer's blocks")
    pipe = make(family)
    expected = draw(diffaccel.accelerate(pipe, cache), family, steps=12)
    skipped = diffaccel.summary(pipe).last_run["caches"]["skipped_calls"]
    diffaccel.accelerate(diffaccel.remove(pipe), Capture(), cache)
    assert torch.equal(draw(pipe, family, steps=12), expected) and torch.equal(draw(pipe, family, steps=12), expected)
    assert diffaccel.summary(pipe).last_run["caches"]["skipped_calls"] == skipped and told(pipe)["replays"] > 0


def test_channels_last_pictures_equal_those_of_the_pipeline_in_that_format() -> None:
    pipe, plain = make("sdxl", torch.float16), make("sdxl", torch.float16)
    plain.unet.to(memory_format=torch.channels_last)
    torch.backends.cudnn.benchmark = True
    try:
        expected = draw(plain, "sdxl")
    finally:
        torch.backends.cudnn.benchmark = False
    stock = draw(pipe, "sdxl")
    diffaccel.accelerate(pipe, Capture(memory_format="channels_last", cudnn_benchmark=True))
    assert torch.equal(draw(pipe, "sdxl"), expected) and torch.equal(draw(pipe, "sdxl"), expected)
    assert told(pipe)["replays"] > 0 and torch.equal(draw(diffaccel.remove(pipe), "sdxl"), stock)


def test_stages_guidance_that_stops_and_chunks() -> None:
    for family, config, size in (
        ("flux", Bottleneck(preset="speed", tolerance=0.2, spectrum=(3.0, 1.4)), 64),
        ("sdxl", Euler(guidance_stop=0.5), 32),
        ("sd3", Euler(max_batch=1), 32),
    ):
        pipe = make(family)
        expected = draw(diffaccel.accelerate(pipe, config), family, size=size)
        diffaccel.accelerate(diffaccel.remove(pipe), config, Capture())
        assert torch.equal(draw(pipe, family, size=size), expected)
        assert torch.equal(draw(pipe, family, size=size), expected) and told(pipe)["replays"] > 0


def test_adapters_swapped_scaled_and_unloaded() -> None:
    case = matrix.Case("flux", Capture(), "cuda")
    pipe, plain = (matrix.with_lora(case, matrix.with_lora(case, case.make(), "one", 1), "two", 2) for _ in range(2))
    case.wrap(pipe)
    changes: list[Callable[[Any], Any]] = [
        lambda one: one.set_adapters(["one"]), lambda one: one.set_adapters(["two"]),
        lambda one: one.set_adapters(["one", "two"], [0.5, 0.25]), lambda one: one.fuse_lora(),
        lambda one: one.unfuse_lora(), lambda one: one.unload_lora_weights(),
    ]  # fmt: skip
    for change in changes:
        for one in (pipe, plain):
            change(one)
        expected = case.call(plain)
        replays = told(pipe)["replays"]
        assert torch.equal(case.call(pipe), expected) and torch.equal(case.call(pipe), expected)
        assert told(pipe)["replays"] > replays


def test_compiled_blocks_are_captured_and_a_mode_with_graphs_is_refused() -> None:
    pipe = make("flux", torch.bfloat16)
    pipe.transformer.compile_repeated_blocks(fullgraph=True)
    expected = draw(pipe, "flux")
    diffaccel.accelerate(pipe, Capture())
    assert torch.equal(draw(pipe, "flux"), expected) and torch.equal(draw(pipe, "flux"), expected)
    assert told(pipe)["replays"] > 0, told(pipe)
    other = make("flux", torch.bfloat16)
    other.transformer.compile(mode="reduce-overhead")
    with pytest.raises(DiffAccelError, match="compiled with mode='reduce-overhead'"):
        diffaccel.accelerate(other, Capture())


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offloading_is_refused(offload: str) -> None:
    pipe = tiny.make("flux")
    if offload == "model":
        pipe.enable_model_cpu_offload()
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
        pipe.enable_group_offload(**devices, offload_type="leaf_level")
    with pytest.raises(DiffAccelError, match="'capture'"):
        diffaccel.accelerate(pipe, Capture())
    expected = draw(pipe, "flux")
    later = make("flux")
    diffaccel.accelerate(later, Capture())
    draw(later, "flux")
    if offload == "model":
        later.enable_model_cpu_offload()
        with pytest.raises(DiffAccelError, match="'capture'"):
            draw(later, "flux")
        diffaccel.remove(later)
        torch.testing.assert_close(draw(later, "flux").cpu(), expected.cpu(), rtol=1e-3, atol=1e-3)
