"""Pipelines of a class of the user's whose call passes its arguments on."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Euler, Scheduler


class PassingOn(StableDiffusionPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("num_inference_steps", 3)
        return super().__call__(*args, **kwargs)


class PassingTheRestOn(StableDiffusionPipeline):
    def __call__(self, prompt: Any, *rest: Any, **kwargs: Any) -> Any:
        return super().__call__(prompt, *rest, **kwargs)


class Flux(FluxPipeline):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


def made(cls: Any, family: str) -> Any:
    options = {"requires_safety_checker": False} if family == "sd" else {}
    pipe = cls(**tiny.make(family).components, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> dict[str, Any]:
    return {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}


@pytest.mark.parametrize("sampler", [Euler(), Scheduler()], ids=lambda sampler: sampler.name)
def test_arguments_by_position_and_by_name(sampler: Any) -> None:
    pipe = made(PassingOn, "sd")

    def draw() -> list[torch.Tensor]:
        return [pipe("a cat", 32, 32, **seeded()).images, pipe(prompt="a cat", height=32, width=32, **seeded()).images]

    before = draw()
    diffaccel.accelerate(pipe, sampler)
    assert all(torch.equal(a, b) for a, b in zip(draw(), before, strict=True))
    last = diffaccel.summary(pipe).last_run
    assert last is not None and (last["path"], last["steps"]) == ("native", 3)  # the steps are those of the class


def test_arguments_without_a_name_are_refused() -> None:
    pipe = diffaccel.accelerate(made(PassingTheRestOn, "sd"), Euler())
    assert pipe("a cat", height=32, width=32, num_inference_steps=2, **seeded()).images.shape == (1, 4, 4, 4)
    with pytest.raises(DiffAccelError, match=r"'\*rest', and 2 arguments .* Pass them by name"):
        pipe("a cat", 32, 32, **seeded())


def test_what_a_sampler_must_know_is_asked_for() -> None:
    call = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2}
    pipe = made(Flux, "flux")
    before = pipe(**call, **seeded()).images
    diffaccel.accelerate(pipe, Euler())
    with pytest.raises(DiffAccelError, match="does not say 'true_cfg_scale'"):
        pipe(**call, **seeded())
    assert torch.equal(pipe(**call, true_cfg_scale=1.0, **seeded()).images, before)
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(pipe(**call, **seeded()).images, before)
