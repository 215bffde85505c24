"""Other tools replace ``__call__`` on the pipeline's class, or its class: ``remove`` takes away what is ours only."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import diffaccel
from diffaccel import compose
from diffaccel.samplers import Euler, Heun
from tests.support.small_pipelines import Small, draw, make


def enable(pipe: Any) -> None:
    """Replace the network's forward by one that works within calls of the class only, as cache-dit does."""
    network, inside = pipe.unet, []
    original_call, original_forward = type(pipe).__call__, network.forward

    @functools.wraps(original_call)
    def call_in_context(self: Any, *args: Any, **kwargs: Any) -> Any:
        inside.append(True)
        try:
            return original_call(self, *args, **kwargs)
        finally:
            inside.pop()

    def halved(*args: Any, **kwargs: Any) -> Any:
        if len(inside) != 1:
            raise RuntimeError("outside of its context, or twice inside")
        return (original_forward(*args, **kwargs)[0] * 0.5,)

    type(pipe).__call__, type(pipe)._original_call, type(pipe)._is_cached = call_in_context, original_call, True
    network.forward, network._original_forward = halved, original_forward


def disable(pipe: Any) -> None:
    type(pipe).__call__ = type(pipe)._original_call
    del type(pipe)._original_call, type(pipe)._is_cached
    del pipe.unet.forward, pipe.unet._original_forward


@pytest.fixture
def own_class() -> type[Small]:
    class Own(Small):
        """A class of the test's own, since it is patched."""

    return Own


def test_what_was_put_on_the_class_stays(own_class: type[Small]) -> None:
    stock, cached = make(own_class), make(own_class)
    plain = draw(stock)
    pipe = diffaccel.accelerate(make(own_class), Heun())
    heun = draw(pipe)
    enable(pipe)
    cached_heun = draw(pipe)
    assert not torch.equal(cached_heun, heun)
    assert torch.equal(
        compose.call(pipe, {"prompt": "a cat", "generator": seed()}, folder=Path("none"))[0], cached_heun
    )
    diffaccel.remove(pipe)
    assert diffaccel.summary(pipe).methods == []
    enable(cached)
    assert torch.equal(draw(pipe), draw(cached)) and not torch.equal(draw(pipe), plain)
    diffaccel.accelerate(pipe, Heun())
    assert torch.equal(draw(pipe), cached_heun) and torch.equal(draw(copy.copy(pipe)), cached_heun)
    diffaccel.remove(pipe)
    assert torch.equal(draw(pipe), draw(cached))
    disable(pipe)
    assert torch.equal(draw(pipe), plain)
    diffaccel.remove(pipe)
    assert type(pipe) is own_class


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_what_is_put_on_and_taken_off_leaves_the_methods(own_class: type[Small]) -> None:
    pipe = diffaccel.accelerate(make(own_class), Heun())
    heun = draw(pipe)
    enable(pipe)
    disable(pipe)
    assert torch.equal(draw(pipe), heun)
    diffaccel.remove(pipe)
    assert type(pipe) is own_class


def test_a_class_put_over_ours_stays() -> None:
    pipe = diffaccel.accelerate(make(Small), Euler())

    class Louder(type(pipe)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return (2 * super().__call__(*args, **kwargs)[0],)

    pipe.__class__ = Louder
    assert torch.equal(draw(pipe), 2 * draw(diffaccel.accelerate(make(Small), Euler())))
    diffaccel.remove(pipe)
    assert type(pipe) is Louder and torch.equal(draw(pipe), 2 * draw(make(Small)))


def test_a_class_that_is_patched_later_is_called_as_it_is_now(own_class: type[Small]) -> None:
    pipe, other = diffaccel.accelerate(make(own_class), Euler()), make(own_class)
    wrapped, calls = draw(pipe), []
    original = own_class.__call__
    own_class.__call__ = functools.wraps(original)(lambda self, *a, **k: calls.append(self) or original(self, *a, **k))
    assert torch.equal(draw(pipe), wrapped) and set(calls) == {pipe}  # it is watched first
    draw(other)
    assert calls[-1] is other
