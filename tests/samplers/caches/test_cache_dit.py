"""cache-dit through its own API: put on, taken off to the bit, and refused by name; the package is optional."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import tiny
import tiny_more
import torch

import diffaccel
from diffaccel.config import Machine
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import BoN, CacheDiT, DiffusersCache, Euler, Heun, Spectrum

STEPS = 6
installed = pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="cache-dit is not installed")
SKIPS = CacheDiT(first_blocks=1, warmup=2, threshold=10.0)


def drawn(pipe: Any) -> torch.Tensor:
    return pipe(**tiny.call_kwargs("flux", steps=STEPS)).images.clone()


@installed
@pytest.mark.parametrize("order", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_it_is_cache_dit_s_own_result_alone_and_under_samplers(order: int) -> None:
    import cache_dit

    pipe = tiny.make("flux")
    stock, kind, call = drawn(pipe), type(pipe), type(pipe).__call__
    options = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 2, "residual_diff_threshold": 10.0}
    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(pipe, cache_config=cache_dit.DBCacheConfig(**options), calibrator_config=calibrator)
    expected = drawn(pipe)
    cache_dit.disable_cache(pipe)
    pipe = tiny.make("flux")  # cache-dit leaves a forward on the network
    config = CacheDiT(first_blocks=1, warmup=2, threshold=10.0, order=order)
    for methods in ((config,), (config, Euler()), (Euler(), config), ("scheduler", config)):
        for method in methods:  # one by one, in this order
            diffaccel.accelerate(pipe, method)
        assert torch.equal(drawn(pipe), expected) and not torch.equal(expected, stock)
        diffaccel.remove(pipe)
        assert type(pipe) is kind and kind.__call__ is call and not hasattr(kind, "_is_cached")
        assert "forward" not in vars(pipe.transformer)
        assert torch.equal(drawn(pipe), stock)


@installed
def test_a_threshold_of_0_is_the_plain_pipeline() -> None:
    pipe = tiny.make("flux")
    stock = drawn(pipe)
    assert torch.equal(drawn(diffaccel.accelerate(pipe, CacheDiT(first_blocks=1, warmup=1, threshold=0.0))), stock)
    diffaccel.remove(pipe)


@installed
def test_a_cache_of_diffusers_works_after_it_and_branches_are_apart() -> None:
    pipe = tiny.make("flux")
    diffaccel.accelerate(pipe, Euler(), DiffusersCache())
    expected = drawn(pipe)
    diffaccel.remove(pipe)
    apart = CacheDiT(first_blocks=1, warmup=2, threshold=10.0, two_calls=True)
    diffaccel.accelerate(pipe, apart)
    drawn(pipe)
    skipped = list(range(2, STEPS))
    assert pipe.transformer._cached_steps == pipe.transformer._cfg_cached_steps == skipped
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, Euler(), DiffusersCache())
    assert torch.equal(drawn(pipe), expected)
    diffaccel.remove(pipe)


@installed
def test_refusals() -> None:
    pipe, other = tiny.make("flux"), tiny.make("flux")
    stock = drawn(other)
    diffaccel.accelerate(pipe, SKIPS)
    with pytest.raises(DiffAccelError, match="cache-dit is on a FluxPipeline already"):
        diffaccel.accelerate(other, SKIPS)
    diffaccel.remove(pipe)
    assert torch.equal(drawn(other), stock)
    with pytest.raises(DiffAccelError, match="FluxTransformer2DModel has 2: nothing would be skipped"):
        diffaccel.accelerate(other, CacheDiT.paper())
    with pytest.raises(DiffAccelError, match="'cache_dit' caches a transformer's blocks"):
        diffaccel.accelerate(tiny.make("sd"), CacheDiT())
    with pytest.raises(DiffAccelError, match="'cache_dit' would run 5 blocks at every step"):
        diffaccel.accelerate(tiny_more.make("dit"), CacheDiT(first_blocks=5))


@pytest.mark.parametrize("method", [Spectrum(), Heun(), BoN(reward="compress")])
def test_what_it_cannot_be_with_is_refused_by_name(method: Any) -> None:
    names = rf"('{method.name}'.*'cache_dit'|'cache_dit'.*'{method.name}') cannot be active together"
    with pytest.raises(DiffAccelError, match=names):
        diffaccel.accelerate(tiny.make("flux"), SKIPS, method)


def test_without_the_package_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pipe = tiny.make("flux")
    with pytest.raises(DiffAccelError, match="Install it: pip install cache-dit"):
        diffaccel.accelerate(pipe, SKIPS)
    level, why = CacheDiT.support(Machine(device="cpu"))
    assert level == "unsupported" and "pip install cache-dit" in why
    with pytest.raises(DiffAccelError, match="first_blocks is 0; it must be at least 1"):
        CacheDiT(first_blocks=0)
