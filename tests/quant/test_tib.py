"""TIB as tables: images to the bit, nothing stale, weights away and back, no waiting for the device."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import matrix
import pytest
import tiny
import tiny_others
import torch
from torch import Tensor, nn

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.modules import Capture
from diffaccel.modules.temporal import generation
from diffaccel.quant import TIB, W8A8
from diffaccel.samplers import FirstBlockCache, Heun
from tests.support.replayed_calls import ReplayedCalls, replayed_calls

__all__ = ["replayed_calls"]  # a fixture
FEW = (("flux", torch.bfloat16), ("wan5b", torch.float32), ("dit", torch.float32))
DTYPES = (torch.float32, torch.bfloat16)
FAMILIES = [
    pytest.param(family, dtype, marks=[pytest.mark.slow] * ((family, dtype) not in FEW), id=f"{family}-{dtype}")
    for family in matrix.FAMILIES
    for dtype in DTYPES
]


def made(family: str = "flux", **options: Any) -> tuple[matrix.Case, Any]:
    case = matrix.Case(family, TIB(**options))
    return case, case.wrap(case.make())


def told(pipe: Any) -> dict[str, Any]:
    return diffaccel.summary(pipe).reports["tib"]["tables"][0]


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the CPU be a device that the host waits for."""
    monkeypatch.setattr(generation, "WAITING", ["cuda", "cpu"])
    yield


# -- equal to the bit --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), FAMILIES)
def test_two_schedules_batches_and_prompts_in_one_process(family: str, dtype: torch.dtype) -> None:
    case = matrix.Case(family, TIB())
    pipe = case.make().to(dtype)
    calls = [{}, {"steps": 3}, {"batch": 1}, {"guided": False}, {}, {"steps": 3}]
    calls = [call for call in calls if not (family in ("ddpm", "ddim") and "guided" in call)]
    expected = [case.call(pipe, **call) for call in calls]
    case.wrap(pipe)
    for call, value in zip(calls, expected, strict=True):
        assert torch.equal(case.call(pipe, **call), value)
    assert told(pipe)["plain"] == {} and told(pipe)["answered"] > 0
    assert torch.equal(case.call(diffaccel.remove(pipe)), expected[0])


def test_another_prompt_has_a_table_of_its_own() -> None:
    case, pipe = made()
    plain = case.make()
    for prompt in (["a dog", "a tree"], ["a cup", "a hat"], ["a dog", "a tree"]):
        assert torch.equal(case.call(pipe, extra={"prompt": prompt}), case.call(plain, extra={"prompt": prompt}))
    assert told(pipe)["rows"] == 12 == told(pipe)["computed"]  # 4 steps of 2 prompts and the negative one


def test_both_branches_share_rows_where_only_the_timestep_enters() -> None:
    case, pipe = made("wan")
    case.call(pipe)
    assert told(pipe)["rows"] == told(pipe)["computed"] == 4 and told(pipe)["answered"] == 7  # of 8 calls


@pytest.mark.parametrize("name", ["qwen", "lumina2", "kandinsky5", "z_image"])
def test_pipelines_that_nobody_listed(name: str) -> None:
    pipe = tiny_others.make(name)
    size = tiny_others.SIZES[name][0]

    def call() -> Tensor:
        return tiny_others.latents_of(pipe(**tiny_others.call_kwargs(name, size))).clone()

    expected = call()
    diffaccel.accelerate(pipe, TIB())
    assert torch.equal(call(), expected) and torch.equal(call(), expected)
    assert told(pipe)["modules"] > 0 and told(pipe)["host_bytes"] > 0
    assert torch.equal((diffaccel.remove(pipe), call())[1], expected)


def test_no_temporal_module_computes_after_the_first_call() -> None:
    case, pipe = made("dit")
    expected = case.call(pipe)
    network = case.network(pipe)
    seen: list[str] = []
    linears = [m for name, m in network.named_modules() if name.endswith(("norm1.linear", "linear_1", "linear_2"))]

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        if bool(output.isnan().any()):  # it has computed with what stands for its weights
            seen.append("computed")

    for linear in linears:
        linear.register_forward_hook(note)
    assert torch.equal(case.call(pipe), expected) and not seen
    parameters = sum(p.numel() for linear in linears for p in linear.parameters())
    assert told(pipe)["parameters"] == parameters + _others(network)


def _others(network: Any) -> int:
    """Parameters of DiT's temporal information block beside the linears: labels and the output's modulation."""
    labels = sum(p.numel() for name, p in network.named_parameters() if "embedding_table" in name)
    return labels + sum(p.numel() for p in network.proj_out_1.parameters())


# -- nothing is stale --------------------------------------------------------------------------------------------------


def _adapter(network: Any, name: str, seed: int) -> None:
    from peft import LoraConfig

    targets = ["norm1.linear", "norm_out.linear", "time_text_embed.timestep_embedder.linear_1"]
    network.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name=name)
    draw = torch.Generator().manual_seed(seed)
    for key, p in network.named_parameters():
        if f"lora_B.{name}" in key or f"lora_A.{name}" in key:
            p.data = torch.randn(p.shape, generator=draw)


@pytest.mark.slow
def test_adapters_on_modulation() -> None:
    case, pipe = made()
    plain = case.make()
    first = case.call(pipe)
    assert told(pipe)["host_bytes"] > 0
    for network in (plain.transformer, pipe.transformer):
        _adapter(network, "one", 1)
    adapted = case.call(plain)
    assert not torch.equal(adapted, first) and torch.equal(case.call(pipe), adapted)
    assert torch.equal(case.call(pipe), adapted) and told(pipe)["host_bytes"] > 0
    for network in (plain.transformer, pipe.transformer):
        network.set_adapters(["one"], [0.5])
    assert torch.equal(case.call(pipe), case.call(plain))
    for network in (plain.transformer, pipe.transformer):
        network.fuse_lora()
    assert torch.equal(case.call(pipe), case.call(plain)) and not torch.equal(case.call(pipe), adapted)
    for network in (plain.transformer, pipe.transformer):
        network.unfuse_lora()
        network.unload_lora()
    assert torch.equal(case.call(pipe), case.call(plain))
    torch.testing.assert_close(case.call(pipe), first, rtol=1e-4, atol=1e-4)


def test_adapters_elsewhere_keep_the_tables() -> None:
    case, pipe = made()
    case.call(pipe)
    matrix.with_lora(case, pipe, "one", 1)
    expected = case.call(matrix.with_lora(case, case.make(), "one", 1))
    assert torch.equal(case.call(pipe), expected)
    assert told(pipe)["forgotten"] == {} and told(pipe)["computed"] == 8


def test_weights_changed_in_place_and_casts() -> None:
    case, pipe = made(weights="device")
    plain = case.make()
    case.call(pipe)
    for one in (plain, pipe):
        with torch.no_grad():
            one.transformer.norm_out.linear.weight.mul_(2)
    assert torch.equal(case.call(pipe), case.call(plain)) and told(pipe)["forgotten"] == {"weights": 1}
    for one in (plain, pipe):
        one.to(torch.bfloat16)
    assert torch.equal(case.call(pipe), case.call(plain))


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["device", "host"])
def test_weights_changed_by_writes_that_are_not_counted(weights: str) -> None:
    """Through ``.data``, all numbers or one, and through a view that was taken while they were in their place."""
    case, pipe = made(weights=weights)
    plain = case.make()
    views = [one.transformer.norm_out.linear.weight.data for one in (plain, pipe)]
    case.call(pipe)
    changes = [lambda w: w.mul_(2), lambda w: w.view(-1)[7:8].add_(1)]
    for number, change in enumerate(changes, 1):
        for view in views:
            change(view)
        assert torch.equal(case.call(pipe), case.call(plain)) and told(pipe)["forgotten"] == {"weights": number}
    kept = told(pipe)["computed"]
    assert torch.equal(case.call(pipe), case.call(plain)) and told(pipe)["computed"] == kept  # looked up again
    if weights == "host":
        pipe.transformer.state_dict()  # after which they are in their places
    for one in (plain, pipe):
        weight = one.transformer.norm_out.linear.weight
        version = weight._version
        weight.data.neg_()
        assert weight._version == version
    assert torch.equal(case.call(pipe), case.call(plain))


def test_the_state_of_a_part_has_its_weights() -> None:
    case, pipe = made()
    network = pipe.transformer
    before = {name: p.clone() for name, p in network.named_parameters()}
    for name in ("norm_out", "norm_out.linear", "transformer_blocks", "time_text_embed"):
        expected = case.call(pipe)
        assert told(pipe)["host_bytes"]
        for key, value in network.get_submodule(name).state_dict().items():
            assert torch.equal(value, before[f"{name}.{key}"]), f"{name}.{key}"
        assert torch.equal(case.call(pipe), expected) and told(pipe)["forgotten"] == {}
    diffaccel.remove(pipe)
    assert not any(part._state_dict_pre_hooks for part in network.modules())


def test_weights_written_while_they_are_away() -> None:
    case, pipe = made()
    expected = case.call(pipe)
    linear = pipe.transformer.norm_out.linear
    with pytest.raises(RuntimeError):  # a single element stands for all
        linear.weight.data.mul_(2)
    linear.weight.data = torch.zeros_like(linear.weight)
    with pytest.raises(DiffAccelError, match="changed while they rested"):
        case.call(pipe)
    assert torch.equal(case.call(pipe), expected)


@pytest.mark.parametrize("late", [False, True], ids=["before the first call", "after it"])
def test_hooks_and_forwards_of_somebody_else_act_once_in_every_call(late: bool) -> None:
    case, pipe = made()
    plain = case.make()
    if late:
        case.call(pipe)
    for one in (plain, pipe):
        network = one.transformer
        network.transformer_blocks[0].norm1.linear.register_forward_hook(lambda module, args, output: 2 * output)
        linear, embedding = network.norm_out.linear, network.time_text_embed
        linear.forward = lambda x, own=linear: 3 * nn.functional.linear(x, own.weight, own.bias)
        embedding.forward = lambda *args, own=embedding.forward: 4 * own(*args)
    expected = case.call(plain)
    assert torch.equal(case.call(pipe), expected) and torch.equal(case.call(pipe), expected)
    assert told(pipe)["host_bytes"] > 0 and not told(pipe)["plain"]
    assert torch.equal(case.call(diffaccel.remove(pipe)), expected)


@pytest.mark.parametrize("late", [False, True], ids=["before the first call", "after it"])
def test_weights_that_are_cast_in_every_call(late: bool) -> None:
    case, pipe = made()
    plain = case.make()
    if late:
        case.call(pipe)
    for one in (plain, pipe):
        one.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    expected = case.call(plain)
    assert torch.equal(case.call(pipe), expected) and torch.equal(case.call(pipe), expected)
    assert torch.equal(case.call(diffaccel.remove(pipe)), expected)


def test_calls_with_gradients_and_in_train_mode_are_plain() -> None:
    case, pipe = made()
    case.call(pipe)
    calls: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, kw: calls.append(kw), with_kwargs=True)
    case.call(pipe)
    handle.remove()
    expected = case.make().transformer(**calls[0])[0]
    assert torch.equal(pipe.transformer(**calls[0])[0], expected)
    assert told(pipe)["plain"] == {"gradients are recorded": 1} and told(pipe)["host_bytes"] == 0


# -- weights away and back ---------------------------------------------------------------------------------------------


def test_weights_rest_and_come_back_to_the_bit(tmp_path: Any) -> None:
    case, pipe = made()
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}
    case.call(pipe)
    assert told(pipe)["host_bytes"] == 4 * told(pipe)["parameters"]
    assert bool(pipe.transformer.norm_out.linear.weight.isnan().all())
    saved = pipe.transformer.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in before.items())
    case.call(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    loaded = type(pipe.transformer).from_pretrained(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
    case.call(pipe)
    diffaccel.remove(pipe)
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())
    assert not any("_diffaccel_temporal" in vars(part) for part in pipe.transformer.modules())
    assert type(pipe.transformer).__mro__[0].__module__.startswith("diffusers")


def test_an_interrupt_while_weights_come_back_loses_none(monkeypatch: pytest.MonkeyPatch) -> None:
    case, pipe = made()
    expected = case.call(pipe)
    resting = list(pipe.transformer._diffaccel_temporal.owner.weights._resting.values())
    host, rest = resting[2].host, resting[2]

    class Interrupted:
        def __get__(self, instance: Any, owner: Any = None) -> Any:
            if instance is rest:
                raise KeyboardInterrupt
            return vars(instance)["host"]

        def __set__(self, instance: Any, value: Any) -> None:
            vars(instance)["host"] = value

    with monkeypatch.context() as patch:
        patch.setattr(type(rest), "host", Interrupted(), raising=False)
        with pytest.raises(KeyboardInterrupt):
            diffaccel.remove(pipe)
    assert torch.equal(case.call(pipe), expected)
    diffaccel.remove(pipe)
    assert rest.parameter.data_ptr() == host.data_ptr() and torch.equal(case.call(pipe), expected)


@pytest.mark.slow
def test_copies_and_pickles() -> None:
    case, pipe = made()
    expected = case.call(pipe)
    copied = copy.deepcopy(pipe)
    pickled = pickle.loads(pickle.dumps(pipe))
    for other in (copied, pickled, pipe):
        assert torch.equal(case.call(other), expected) and told(other)["answered"] > 0
        assert torch.equal(case.call(diffaccel.remove(other)), expected)


def test_a_second_pipeline_of_the_same_network_is_refused() -> None:
    _, pipe = made()
    other = type(pipe)(**pipe.components)
    with pytest.raises(DiffAccelError, match="has tables already"):
        diffaccel.accelerate(other, TIB())


def test_a_budget_that_is_too_small_leaves_the_network_as_it_is() -> None:
    case, pipe = made(budget_gib=1e-6)
    assert torch.equal(case.call(pipe), case.call(case.make()))
    (reason,) = told(pipe)["plain"]
    assert "larger than its budget" in reason and told(pipe)["host_bytes"] == 0


@pytest.mark.parametrize(("options", "sentence"), [({"keep": 0}, "keep"), ({"budget_gib": 0.0}, "budget_gib")])
def test_bad_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DiffAccelError, match=sentence):
        TIB(**options)


# -- no waiting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["flux", *(pytest.param(f, marks=pytest.mark.slow) for f in ("wan5b", "sdxl"))])
def test_a_known_schedule_is_not_read_again(family: str, waiting: None) -> None:
    case, pipe = made(family)
    expected = case.call(case.make())
    assert torch.equal(case.call(pipe), expected)
    waited = told(pipe)["waited"]
    assert waited > 0
    assert torch.equal(case.call(pipe), expected)
    of_prompt = told(pipe)["waited"] - waited
    assert of_prompt <= 6  # conditions of each branch, once a call
    assert torch.equal(case.call(pipe, steps=3), case.call(case.make(), steps=3))  # a warm-up of another plan
    waited = told(pipe)["waited"]
    for steps in (4, 3, 4):
        assert torch.equal(case.call(pipe, steps=steps), case.call(case.make(), steps=steps))
    assert told(pipe)["waited"] - waited <= 3 * of_prompt


def test_a_new_prompt_on_a_known_schedule(waiting: None) -> None:
    case, pipe = made()
    case.call(pipe)
    waited = told(pipe)["waited"]
    prompt = {"prompt": ["a dog", "a tree"]}
    assert torch.equal(case.call(pipe, extra=prompt), case.call(case.make(), extra=prompt))
    assert told(pipe)["waited"] - waited < 16  # rows of the plan are read once, and no step


def test_a_timestep_that_was_not_expected_is_an_error_and_then_known(waiting: None) -> None:
    case, pipe = made("sd")
    factor = [1.0]

    def shift(module: Any, args: Any, kwargs: Any) -> Any:
        return (args[0], args[1] * factor[0], *args[2:]), kwargs

    class Shifting:
        def __init__(self, network: Any) -> None:
            self.network = network

        def __getattr__(self, name: str) -> Any:
            return getattr(self.network, name)

        def __call__(self, sample: Any, timestep: Any, **kwargs: Any) -> Any:
            return self.network(sample, timestep * factor[0], **kwargs)

    network = pipe.unet
    object.__setattr__(pipe, "unet", Shifting(network))
    case.call(pipe)
    case.call(pipe)
    factor[0] = 0.5
    with pytest.raises(DiffAccelError, match="earlier calls with the same schedule did not have"):
        case.call(pipe)
    shifted = case.call(pipe)
    object.__setattr__(pipe, "unet", network)
    plain = case.make()
    object.__setattr__(plain, "unet", Shifting(plain.unet))
    assert torch.equal(shifted, case.call(plain))


# -- with others -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*(pytest.param(f, marks=pytest.mark.slow) for f in ("flux", "sd")), "wan5b"])
@pytest.mark.parametrize("first", [TIB(), Capture()], ids=lambda config: config.name)
def test_under_capture(family: str, first: Any, replayed_calls: type[ReplayedCalls]) -> None:
    case = matrix.Case(family, first)
    expected = [case.call(case.make(), steps=steps) for steps in (4, 3)]
    pipe = case.wrap(case.make())
    diffaccel.accelerate(pipe, Capture() if isinstance(first, TIB) else TIB())
    for _ in range(3):
        for steps, value in zip((4, 3), expected, strict=True):
            assert torch.equal(case.call(pipe, steps=steps), value)
    report = diffaccel.summary(pipe).reports["capture"]
    assert report["replays"] > 12 and told(pipe)["host_bytes"] > 0
    assert torch.equal(case.call(diffaccel.remove(pipe)), expected[0])


@pytest.mark.slow
def test_under_a_quantizer_a_cache_and_a_loop_in_any_order() -> None:
    case = matrix.Case("flux", None)
    methods = (W8A8(), FirstBlockCache(threshold=1e6), Heun())
    expected = case.call(diffaccel.accelerate(case.make(), *methods))
    before, after = case.make(), case.make()
    diffaccel.accelerate(before, TIB())
    case.call(before)
    diffaccel.accelerate(before, *methods)
    diffaccel.accelerate(after, *methods)
    diffaccel.accelerate(after, TIB())
    for pipe in (before, after):
        assert torch.equal(case.call(pipe), expected) and told(pipe)["answered"] > 0
        diffaccel.remove(pipe)
    assert torch.equal(case.call(before), case.call(case.make()))


def test_offloading_is_refused() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe = tiny.make("flux")
    add_hook_to_module(pipe.transformer, ModelHook())
    with pytest.raises(DiffAccelError, match="offloading hooks"):
        diffaccel.accelerate(pipe, TIB())
