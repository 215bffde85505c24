"""A pipeline with any method takes one call at a time, so that threads draw what one thread draws."""

from __future__ import annotations

import os
import threading
import time
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import mixdq_bed
import pytest
import tiny
import torch

import diffaccel
from diffaccel import registry
from diffaccel.config import Config
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Euler
from tests.support.small_pipelines import Small, draw, make

THREADS = 4
KINDS = {name: registry.config_class(name) for name in registry.METHODS}
ON_NETWORKS = [name for name, cls in KINDS.items() if cls.touches != "loop" and not getattr(cls, "needs_steps", False)]
NOT_HERE = ("capture", "rolling_context", "nfd")  # want a GPU, or another pipeline


@dataclass(frozen=True, kw_only=True)
class Halve(Config):
    """A method that puts no loop on the pipeline."""

    name: ClassVar[str] = "halve"
    touches: ClassVar[Any] = "blocks"

    def apply(self, pipe: Any) -> Any:
        return pipe.unet.register_forward_hook(lambda module, args, out: (out[0] / 2,))


def in_threads(function: Any) -> list[Any]:
    """Return ``function(number)`` of all threads, each of which begins when all are there; errors are results."""
    results: list[Any] = [None] * THREADS
    gate = threading.Barrier(THREADS)

    def work(number: int) -> None:
        gate.wait(60)
        try:
            results[number] = function(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def slowly(pipe: Any) -> Any:
    """Give a pipeline a network during whose calls other threads run."""
    forward = pipe.unet.forward

    def called(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.005)
        return forward(*args, **kwargs)

    pipe.unet.forward = called
    return pipe


def test_calls_of_a_pipeline_without_a_loop_of_ours_take_turns() -> None:
    pipe, stock = slowly(make(Small)), draw(make(Small))
    races = in_threads(lambda _: draw(pipe))
    assert any(isinstance(result, Exception) or not torch.equal(result, stock) for result in races)  # as in diffusers
    pipe = diffaccel.accelerate(slowly(make(Small)), Halve())
    alone = draw(pipe)
    together = in_threads(lambda _: draw(pipe))
    assert all(isinstance(result, torch.Tensor) for result in together), together
    assert all(torch.equal(picture, alone) for picture in together) and not torch.equal(alone, stock)
    diffaccel.remove(pipe)
    assert type(pipe) is Small and torch.equal(draw(pipe), stock)


def test_a_second_call_of_a_pipeline_without_a_loop_of_ours_can_be_refused() -> None:
    pipe = diffaccel.accelerate(slowly(make(Small)), Halve(), on_busy="refuse")
    alone, results = draw(pipe), in_threads(lambda _: draw(pipe))
    drawn = [result for result in results if isinstance(result, torch.Tensor)]
    refused = [result for result in results if isinstance(result, DiffAccelError)]
    assert drawn and refused and len(drawn) + len(refused) == THREADS
    assert all(torch.equal(picture, alone) for picture in drawn)
    assert all(str(error).startswith("The pipeline is busy: ") for error in refused)


def in_child(function: Any) -> bool:
    """Return whether ``function()`` is true in a forked process, which is given 20 s."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, from Python 3.12 on
        child = os.fork()
    if not child:
        try:
            os._exit(0 if function() else 1)
        finally:
            os._exit(2)  # after an error
    end = time.monotonic() + 20
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_process_forked_while_another_thread_calls_a_pipeline_can_call_it() -> None:
    pipe = make(Small)
    stock, reached, go_on = draw(pipe), threading.Event(), threading.Event()
    diffaccel.accelerate(pipe, Euler())
    forward, drawn = pipe.unet.forward, []

    def held(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is other:
            reached.set()
            go_on.wait(60)
        return forward(*args, **kwargs)

    pipe.unet.forward = held
    other = threading.Thread(target=lambda: drawn.append(draw(pipe)))
    other.start()
    assert reached.wait(60)
    try:
        assert in_child(lambda: torch.equal(draw(pipe), stock))
        assert in_child(lambda: torch.equal(draw(diffaccel.remove(pipe)), stock))
    finally:
        go_on.set()
        other.join(60)
    assert torch.equal(drawn[0], stock)  # in this process the call went on undisturbed


def check_turns(family: str, config: Any) -> None:
    """Compare pictures of four threads with those of one, and the picture after removal with the stock one."""
    pipe = tiny.make(family)
    cls = type(pipe)

    def picture(number: int) -> torch.Tensor:
        return pipe(**tiny.call_kwargs(family, batch=1, steps=2, seed=number % 2)).images

    stock = picture(0)
    diffaccel.accelerate(pipe, config)
    alone = [picture(0), picture(1)] * (THREADS // 2)
    together = in_threads(picture)
    assert all(isinstance(result, torch.Tensor) for result in together), together
    assert all(map(torch.equal, together, alone))
    diffaccel.remove(pipe)
    assert type(pipe) is cls and torch.equal(picture(0), stock)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_NETWORKS)
def test_calls_of_every_method_that_works_without_a_sampler_take_turns(name: str) -> None:
    if name == "cache_dit":
        pytest.importorskip("cache_dit")
    config = mixdq_bed.uniform("flux") if name == "mixdq" else registry.config_class(name)()
    if name not in NOT_HERE:
        check_turns("flux", config)
        return
    pipe = tiny.make("flux")
    with pytest.raises(DiffAccelError, match=f"^'{name}' "):
        diffaccel.accelerate(pipe, config)
    assert vars(pipe).keys() == vars(tiny.make("flux")).keys() and type(pipe) is type(tiny.make("flux"))
