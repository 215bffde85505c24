"""What the driver tells methods on the network: step, context and trajectory of every call, and where it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from diffusers import FluxPipeline

import diffaccel
from diffaccel.config import Config
from diffaccel.errors import DiffAccelError, UnsupportedBySampler
from diffaccel.modules import network_call
from diffaccel.samplers import RBF, BoN, Euler, Heun


@dataclass(frozen=True, kw_only=True)
class Listen(Config):
    """A block method for these tests: notes what it is told."""

    name: ClassVar[str] = "listen"
    touches: ClassVar[Any] = "blocks"
    needs_steps: ClassVar[bool] = True

    def apply(self, pipe: Any) -> Any:
        denoiser = getattr(pipe, "transformer", None) or pipe.unet
        return denoiser.register_forward_pre_hook(lambda *_: TOLD.append(network_call.current()))


TOLD: list[network_call.NetworkCall | None] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    TOLD.clear()


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_without_a_loop_the_call_is_stock_to_the_bit_and_told_its_steps(family: str) -> None:
    pipe = tiny.make(family)

    def draw() -> torch.Tensor:
        return pipe(**tiny.call_kwargs(family)).images

    stock = draw()
    diffaccel.accelerate(pipe, Listen())
    assert torch.equal(draw(), stock)
    steps = [call.step for call in TOLD]
    assert sorted(set(steps)) == list(range(TOLD[0].steps)) and steps == sorted(steps)
    assert len({call.trajectory for call in TOLD}) == 1
    contexts = {call.context for call in TOLD}
    assert contexts == ({"cond", "uncond"} if family == "flux" else {"cond_uncond"})
    last = diffaccel.summary(pipe).last_run
    assert last["caches"]["real_calls"] == len(TOLD) and last["caches"]["skipped_calls"] == 0
    assert "scheduler" in str(diffaccel.summary(pipe)) and diffaccel.summary(pipe).implied == "scheduler"
    first = TOLD[0].trajectory
    draw()
    assert TOLD[-1].trajectory > first and network_call.current() is None
    diffaccel.remove(pipe)
    assert torch.equal(draw(), stock) and "_diffaccel" not in vars(pipe)


@pytest.mark.parametrize("order", ["loop first", "loop last", "together"])
def test_a_loop_method_is_told_too_whatever_the_order(order: str) -> None:
    pipe = tiny.make("flux")
    configs = {"loop first": [Heun(), Listen()], "loop last": [Listen(), Heun()]}.get(order, [])
    for config in configs:
        diffaccel.accelerate(pipe, config)
    if not configs:
        diffaccel.accelerate(pipe, Listen(), Heun())
    pipe(**tiny.call_kwargs("flux", guided=False))
    steps = [call.step for call in TOLD]
    assert steps == [0, 0, 1, 1, 2, 2, 3][: len(steps)] and diffaccel.summary(pipe).implied is None
    diffaccel.remove(pipe)
    assert type(pipe) is FluxPipeline


def test_rows_of_several_calls_have_contexts_of_their_own() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Listen(), Euler(max_batch=1))
    pipe(**tiny.call_kwargs("flux"))
    assert {call.context for call in TOLD} == {"cond/0.0", "cond/0.1", "uncond/0.0", "uncond/0.1"}


def test_a_call_that_cannot_be_followed_names_the_method_and_the_reason() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Listen())

    def edit(pipe: Any, i: int, t: Any, values: Any) -> dict:
        return {}

    match = "'listen' must be told the step of every network call, and this call of FluxPipeline cannot be followed"
    pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, "other"]
    with pytest.raises(UnsupportedBySampler, match=match):
        pipe(**tiny.call_kwargs("flux"), callback_on_step_end=edit)
    assert TOLD == []


def test_a_search_calls_the_network_for_other_rows() -> None:
    with pytest.raises(DiffAccelError, match="'rbf' calls the network for other rows from step to step"):
        diffaccel.accelerate(tiny.make("flux"), Listen(), RBF())
    with pytest.raises(DiffAccelError, match="'listen' decides for all rows of a network call together"):
        diffaccel.accelerate(tiny.make("flux"), Listen(), BoN())
