"""Best of N under a step cache: every sample has a history of its own, whatever is drawn beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from search_bed import latent_reward
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import RBF, BoN, DiffusersCache, Euler, FirstBlockCache, SeaCache, Spectrum, TaylorSeer

STEPS, SAMPLES = 5, 3
CACHE = TaylorSeer(interval=3, warmup=2)  # real at 0, 1 and 4 of 5 steps
REWARD = latent_reward(lambda x0: x0.flatten(1).mean(1))
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def drawn(pipe: Any, *methods: Any, **changes: Any) -> Tensor:
    diffaccel.accelerate(pipe, *methods)
    try:
        return pipe(**{**tiny.call_kwargs("flux", steps=STEPS), **changes}).images.clone()
    finally:
        drawn.cost = diffaccel.summary(pipe).last_run  # type: ignore[attr-defined]
        diffaccel.remove(pipe)


def test_one_sample_is_euler_with_the_cache() -> None:
    pipe = tiny.make("flux")
    stock = drawn(pipe, Euler())
    expected = drawn(pipe, Euler(), CACHE)
    cost = drawn.cost["caches"]
    assert torch.equal(drawn(pipe, BoN(reward=REWARD, budget=STEPS), CACHE), expected)
    assert {key: drawn.cost["caches"][key] for key in ("real_calls", "skipped_calls")} == {
        key: cost[key] for key in ("real_calls", "skipped_calls")
    }
    assert not torch.equal(expected, stock)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [CACHE, Spectrum(warmup=2), FirstBlockCache(real_steps=(0, 1, 3))])
def test_a_sample_does_not_depend_on_those_beside_it(cache: Any) -> None:
    """Waves, and rows of a network call, change how samples share calls and nothing else."""
    pipe = tiny.make("flux")
    whole = drawn(pipe, BoN(reward=REWARD, budget=SAMPLES * STEPS), cache)
    skipped = drawn.cost["caches"]["skipped_calls"]
    assert skipped > 0 and drawn.cost["caches"]["real_calls"] > 0
    for options in ({"wave": 1}, {"wave": 2}, {"max_batch": 1}, {"max_batch": 4}):
        found = drawn(pipe, BoN(reward=REWARD, budget=SAMPLES * STEPS, **options), cache)
        torch.testing.assert_close(found, whole, **CLOSE)
        assert drawn.cost["caches"]["skipped_calls"] >= skipped
    plain = drawn(pipe, BoN(reward=REWARD, budget=SAMPLES * STEPS))
    assert not torch.allclose(plain, whole, **CLOSE)


def test_a_cache_with_real_steps_only_is_the_search_without_it() -> None:
    pipe = tiny.make("flux")
    config = BoN(reward=REWARD, budget=SAMPLES * STEPS, wave=2)
    assert torch.equal(drawn(pipe, config, TaylorSeer(interval=1)), drawn(pipe, config))


@pytest.mark.slow
def test_a_killed_search_is_resumed_to_the_bit(tmp_path: Path) -> None:
    """Samples that were on their way are drawn again from noise, since their history is gone; rewards are not."""
    pipe, rounds = tiny.make("flux"), []

    def config(folder: Path) -> BoN:
        return BoN(reward=REWARD, budget=SAMPLES * STEPS, wave=1, folder=str(folder))

    whole = drawn(pipe, config(tmp_path / "whole"), CACHE)

    class Killed(BaseException):
        pass

    def kill(module: Any, args: Any) -> None:
        rounds.append(1)
        if len(rounds) == 2 * STEPS + 3:  # in the third wave
            raise Killed

    handle = pipe.transformer.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        drawn(pipe, config(tmp_path / "killed"), CACHE)
    handle.remove()
    assert torch.equal(drawn(pipe, config(tmp_path / "killed"), CACHE), whole)
    with pytest.raises(DiffAccelError, match="beside"):
        drawn(pipe, config(tmp_path / "killed"))


@pytest.mark.parametrize(
    ("search", "cache", "match"),
    [
        (BoN(reward=REWARD, budget=10), SeaCache(), "'seacache' decides for all rows of a network call together"),
        (BoN(reward=REWARD, budget=10), FirstBlockCache(), "'firstblock' decides for all rows"),
        (BoN(reward=REWARD, budget=10), DiffusersCache(), "'diffusers_cache' decides for all rows"),
        (RBF(reward=REWARD, budget=40), Spectrum(), "'rbf' calls the network for other rows from step to step"),
    ],
)
def test_refusals(search: Any, cache: Any, match: str) -> None:
    pipe = tiny.make("flux")
    for methods in ((search, cache), (cache, search)):
        with pytest.raises(DiffAccelError, match=match):
            diffaccel.accelerate(pipe, *methods)
