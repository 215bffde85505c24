"""Contracts of step caches on pipelines: exact without skips, histories apart where they must be, and off again."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import tiny
import tiny_more
import tiny_others
import torch

import diffaccel
from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.modules.block_stack import BlockStack
from diffaccel.samplers import DPMpp2M, Euler, FirstBlockCache, Heun, SeaCache, Spectrum, TaylorSeer

FAST, SLOW = ("flux", "sd", "wan22", "cogvideox"), ("sd3", "hunyuan", "pixart", "dit", "ddim", "wan5b", "cogvideox15")
FAMILIES = [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
PATTERN = (0, 1, 3, 5)
STEPS = 6


def make(family: str) -> Any:
    return (tiny if family in tiny.FAMILIES else tiny_more).make(family)


def draw(pipe: Any, family: str, steps: int = STEPS, **changes: Any) -> torch.Tensor:
    kwargs = (tiny if family in tiny.FAMILIES else tiny_more).call_kwargs(family, **changes)
    return tiny_more.result(pipe(**{**kwargs, "num_inference_steps": steps})).clone()


def modules(pipe: Any) -> list[torch.nn.Module]:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return [module for part in parts for module in part.modules()]


def counts(pipe: Any) -> dict[str, Any]:
    return diffaccel.summary(pipe).last_run["caches"]


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_without_skips_and_after_removal_and_told_in_the_record(family: str) -> None:
    pipe = make(family)
    stock = draw(pipe, family)
    diffaccel.accelerate(pipe, TaylorSeer(interval=1))
    assert torch.equal(draw(pipe, family), stock) and counts(pipe)["skipped_calls"] == 0
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN))
    cached = draw(pipe, family)
    run = diffaccel.summary(pipe).last_run
    branches = run["calls"] // STEPS
    assert run["caches"]["skipped_calls"] == (STEPS - len(PATTERN)) * branches or family == "wan22"
    assert run["caches"]["history_bytes"] > 0 and 0 < run["caches"]["skipped_share_of_seconds"] < 1
    if family != "wan22":  # whose second network begins without a history
        assert all(tuple(steps) == PATTERN for steps in run["caches"]["real_steps"].values())
    assert not torch.equal(cached, stock) and torch.equal(draw(pipe, family), cached)
    diffaccel.remove(pipe)
    assert torch.equal(draw(pipe, family), stock)
    assert not any("_diffaccel_place" in vars(module) for module in modules(pipe))


@pytest.mark.parametrize("config", [SeaCache(threshold=0.0), FirstBlockCache(threshold=0.0), SeaCache.paper()])
def test_a_threshold_of_zero_is_no_cache_and_infinity_skips_what_it_may(config: Any) -> None:
    pipe = make("flux")
    stock = draw(pipe, "flux")
    diffaccel.accelerate(pipe, config)
    if config.threshold == 0:
        assert torch.equal(draw(pipe, "flux"), stock) and counts(pipe)["skipped_calls"] == 0
        return
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, SeaCache(threshold=1e9, payload="last", same_step=True, most_skips=0))
    draw(pipe, "flux")
    assert counts(pipe)["real_steps"] == {"cond": [0, STEPS - 1], "uncond": [0, STEPS - 1]}


def block_calls(pipe: Any) -> list[int]:
    """Calls of every block, counted by their forward hooks."""
    network = pipe.transformer
    blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
    calls = [0] * len(blocks)

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            calls[number] += 1

        return hook

    for number, block in enumerate(blocks):
        block.register_forward_hook(count(number))
    return calls


def test_skipped_blocks_do_not_run_and_the_first_does_where_it_is_looked_at() -> None:
    pipe = make("flux")
    calls = block_calls(pipe)
    diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN))
    draw(pipe, "flux", guided=False)
    assert calls == [4, 4]
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, FirstBlockCache(real_steps=(0, 4)))
    draw(pipe, "flux", guided=False)
    assert calls == [4 + STEPS, 4 + 2]


def test_branches_and_chunks_have_histories_of_their_own() -> None:
    """With guidance, rows and chunks apart, every row is what it is alone."""
    pipe = make("flux")
    diffaccel.accelerate(pipe, Euler(), Spectrum(real_steps=PATTERN))
    both = draw(pipe, "flux")
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, Euler(max_batch=1), Spectrum(real_steps=PATTERN))
    apart = draw(pipe, "flux")
    assert set(counts(pipe)["real_steps"]) == {"cond/0.0", "cond/0.1", "uncond/0.0", "uncond/0.1"}
    torch.testing.assert_close(apart, both, rtol=1e-4, atol=1e-4)
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, Euler(), Spectrum(real_steps=PATTERN))
    torch.testing.assert_close(draw(pipe, "flux", batch=1), both[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_every_call_size_and_prompt_begins_anew() -> None:
    pipe = make("flux")
    first = {size: draw(pipe, "flux", steps=1, size=size) for size in (32, 48)}
    diffaccel.accelerate(pipe, TaylorSeer(real_steps=(0,), payload="last"))
    for size in (32, 48, 32):
        assert torch.equal(draw(pipe, "flux", steps=1, size=size), first[size])
        draw(pipe, "flux", size=size)
        assert counts(pipe)["real_steps"] == {"cond": [0], "uncond": [0]}


def test_samplers_with_two_predictions_a_step_keep_two_histories() -> None:
    pipe = make("flux")
    diffaccel.accelerate(pipe, Heun(), TaylorSeer(real_steps=(0, 2)))
    draw(pipe, "flux", steps=4, guided=False)
    assert counts(pipe)["real_steps"] == {"cond": [0, 2], "cond#1": [0, 2]}
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, DPMpp2M(), TaylorSeer(real_steps=(0, 2)))
    draw(pipe, "flux", steps=4, guided=False)
    assert counts(pipe)["real_steps"] == {"cond": [0, 2]}


def test_a_network_whose_blocks_are_not_known() -> None:
    with pytest.raises(DiffAccelError, match="'spectrum' cannot skip blocks of ZImageTransformer2DModel, which are"):
        diffaccel.accelerate(tiny_others.make("z_image"), Spectrum())


@pytest.mark.parametrize("payload", ["last", "linear", "newton", "taylor", "chebyshev"])
def test_every_payload_goes_with_every_decision(payload: Any) -> None:
    pipe = make("flux")
    for config in (Spectrum, SeaCache, TaylorSeer, FirstBlockCache):
        diffaccel.accelerate(pipe, config(payload=payload, order=2))
        assert draw(pipe, "flux", guided=False, steps=9).isfinite().all(), config.name
        assert counts(pipe)["skipped_calls"] or config is FirstBlockCache
        diffaccel.remove(pipe)


@pytest.mark.slow
def test_one_cache_at_a_time_and_errors_that_say_so() -> None:
    pipe = diffaccel.accelerate(make("flux"), Spectrum())
    with pytest.raises(DiffAccelError, match="'spectrum' and 'seacache' cannot be active together"):
        diffaccel.accelerate(pipe, SeaCache())
    with pytest.raises(DiffAccelError, match="'firstblock' looks at the first of a transformer's blocks, and UNet2D"):
        diffaccel.accelerate(make("sd"), FirstBlockCache())
    with pytest.raises(DiffAccelError, match="'firstblock' hooked no block of CogVideoXTransformer3DModel: it has 1"):
        diffaccel.accelerate(make("cogvideox"), FirstBlockCache())
    with pytest.raises(DiffAccelError, match="the levels of this scheduler cannot be read"):
        draw(diffaccel.accelerate(make("ddim"), SeaCache()), "ddim")
    for wrong in ({"growth": -1.0}, {"real_steps": ()}, {"history": 1}, {"blend": 1.5}):
        with pytest.raises(DiffAccelError, match=f"Spectrum.{next(iter(wrong))} is"):
            Spectrum(**wrong)


def test_a_network_outside_of_a_driven_call_is_plain() -> None:
    pipe = make("flux")
    network = pipe.transformer
    inputs = {}
    network.register_forward_pre_hook(lambda m, args, kwargs: inputs.update(kwargs), with_kwargs=True)
    draw(pipe, "flux", steps=1, guided=False)
    with torch.no_grad():
        plain = network(**inputs)[0]
        diffaccel.accelerate(pipe, Spectrum(real_steps=(0,)))
        assert torch.equal(network(**inputs)[0], plain)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["before", "after"])
def test_compiled_blocks(order: str) -> None:
    torch.compiler.reset()
    expected = draw(diffaccel.accelerate(make("flux"), Spectrum(real_steps=PATTERN)), "flux", guided=False)
    pipe = make("flux")
    compile_blocks = lambda: pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)  # noqa: E731
    if order == "before":
        compile_blocks()
    diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN))
    if order == "after":
        compile_blocks()
    assert torch.equal(draw(pipe, "flux", guided=False), expected)
    assert counts(pipe)["skipped_calls"] == STEPS - len(PATTERN)


def test_stacks_of_other_blocks_are_kept() -> None:
    pipe = make("flux")
    classes = [type(b) for b in pipe.transformer.transformer_blocks]
    names = [*pipe.transformer.state_dict()]
    diffaccel.accelerate(pipe, Spectrum())
    block = pipe.transformer.transformer_blocks[0]
    assert isinstance(block, classes[0]) and type(block).__name__ == classes[0].__name__
    assert [*pipe.transformer.state_dict()] == names
    with pytest.raises(DiffAccelError, match="on these blocks already"):
        BlockStack(vars(block)["_diffaccel_place"].stack.cache, [block]).install()
    diffaccel.remove(pipe)
    assert [type(b) for b in pipe.transformer.transformer_blocks] == classes


def test_a_callback_that_changes_the_prompt_begins_a_new_history() -> None:
    pipe = diffaccel.accelerate(make("flux"), Euler(), TaylorSeer(real_steps=(0,), payload="last"))

    def change(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] * 2} if i == 2 else {}

    kwargs = {**tiny.call_kwargs("flux", guided=False), "num_inference_steps": STEPS}
    pipe(**kwargs, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert counts(pipe)["real_steps"] == {"cond": [0, 3]}


@pytest.mark.slow
@pytest.mark.skipif("emoji-flux" not in zoo.names(), reason="no trained weights are in this checkout")
def test_a_trained_model_skips_as_told_and_stays_close() -> None:
    pipe = diffaccel.load("emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 64, "width": 64, "num_inference_steps": 9, "max_sequence_length": 32, "output_type": "latent"}

    def run() -> torch.Tensor:
        return pipe("red apple, fluent 3d", generator=torch.Generator().manual_seed(0), **call).images

    full = run()
    errors = {}
    for payload in ("last", "linear"):
        diffaccel.accelerate(pipe, TaylorSeer(interval=2, payload=payload))
        errors[payload] = float((run() - full).pow(2).mean() / full.pow(2).mean())
        assert counts(pipe)["real_steps"] == {"cond": [0, 1, 2, 4, 6, 8]}
        diffaccel.remove(pipe)
    assert 0 < errors["linear"] < errors["last"] < 0.05 and torch.equal(run(), full)


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_has_a_cache_of_its_own(duplicate: Any) -> None:
    pipe = make("flux")
    stock = draw(pipe, "flux")
    cached = draw(diffaccel.accelerate(pipe, Spectrum(real_steps=PATTERN)), "flux")
    other = duplicate(pipe)
    assert torch.equal(draw(other, "flux"), cached)
    diffaccel.remove(other)
    assert torch.equal(draw(other, "flux"), stock) and torch.equal(draw(pipe, "flux"), cached)
    diffaccel.remove(pipe)
    assert type(other.transformer.transformer_blocks[0]) is type(pipe.transformer.transformer_blocks[0])
