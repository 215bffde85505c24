"""Text encoders in train mode draw from torch's global generator: what is drawn after them is as in the stock call."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_others
import torch

import diffaccel
from diffaccel.samplers import Euler, Scheduler
from tests.support.small_pipelines import Drifting, Small, make


class WithDropout(Small):
    """A text pipeline of no family whose encoder drops values."""

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        return torch.nn.functional.dropout(super().encode_prompt(prompt), 0.5, training=True)


class DriftingWithDropout(WithDropout, Drifting):
    """The same, in its own loop."""


def chroma() -> Any:
    pipe = tiny_others.make("chroma")
    pipe.text_encoder.train()
    for module in pipe.text_encoder.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    return pipe


def two_calls(pipe: Any, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Return the latents of two calls, and the state of the generator after them."""
    torch.manual_seed(7)
    latents = [tiny_others.latents_of(pipe(**arguments)) if "height" in arguments else pipe()[0] for _ in range(2)]
    return [*latents, torch.random.get_rng_state()]


@pytest.mark.parametrize(
    ("cls", "config"), [(WithDropout, Euler()), (WithDropout, Scheduler()), (DriftingWithDropout, Euler())]
)
def test_calls_without_a_generator_are_those_of_the_stock_pipeline(cls: type, config: Any) -> None:
    stock = two_calls(make(cls), {})
    wrapped = two_calls(diffaccel.accelerate(make(cls), config), {})
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(stock, wrapped, strict=True))


@pytest.mark.parametrize("name", ["chroma", "flux"])
def test_encoders_of_pipelines(name: str) -> None:
    def in_train_mode() -> Any:
        pipe = chroma() if name == "chroma" else tiny.make("flux")
        pipe.text_encoder.train()
        return pipe

    arguments = (tiny_others if name == "chroma" else tiny).call_kwargs(name, steps=3)
    arguments["generator"] = None
    stock = two_calls(in_train_mode(), arguments)
    wrapped = two_calls(diffaccel.accelerate(in_train_mode(), Euler()), arguments)
    assert all(torch.equal(theirs, ours) for theirs, ours in zip(stock, wrapped, strict=True))
