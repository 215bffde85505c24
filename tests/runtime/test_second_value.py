"""Pipelines that use the second value of ``scheduler.step``, a clean sample, as consistency models' do."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
import toy
from diffusers import LatentConsistencyModelImg2ImgPipeline, LatentConsistencyModelPipeline, LCMScheduler

import diffaccel
from diffaccel.runtime.probe import arguments_of, stock_call
from diffaccel.runtime.stock_loop import generate_stock
from diffaccel.samplers import Euler, Scheduler

PIPELINES = [LatentConsistencyModelPipeline, LatentConsistencyModelImg2ImgPipeline]


def make(cls: type) -> Any:
    scheduler = LCMScheduler(**tiny.TRAINED, clip_sample=False, steps_offset=1)
    parts = tiny.make("sd", scheduler=scheduler, time_cond_proj_dim=16).components
    parts.pop("image_encoder", None)
    pipe = cls(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(cls: type, output_type: str = "latent") -> dict[str, Any]:
    kwargs = {k: v for k, v in tiny.call_kwargs("sd").items() if k != "negative_prompt"} | {"output_type": output_type}
    if cls is LatentConsistencyModelImg2ImgPipeline:
        del kwargs["height"], kwargs["width"]
        picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        kwargs |= {"image": picture, "strength": 0.8, "num_inference_steps": 4}
    return kwargs


@pytest.mark.parametrize("output_type", ["latent", "pt"])
@pytest.mark.parametrize("cls", PIPELINES)
def test_its_own_scheduler_equals_the_stock_call(cls: type, output_type: str) -> None:
    pipe = make(cls)
    stock = pipe(**call_kwargs(cls, output_type)).images
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(pipe(**call_kwargs(cls, output_type)).images, stock)


def test_a_callback_that_edits_latents_equals_the_stock_call() -> None:
    def edit(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] * 0.9}

    cls, results = LatentConsistencyModelPipeline, []
    for wrap in (False, True):
        pipe = make(cls)
        if wrap:
            diffaccel.accelerate(pipe, Scheduler())
        results.append(pipe(**call_kwargs(cls), callback_on_step_end=edit).images)
    assert torch.equal(*results)


@pytest.mark.parametrize("cls", PIPELINES)
def test_another_sampler_gives_its_final_latents_in_both_drivers(cls: type) -> None:
    pipe = diffaccel.accelerate(make(cls), Euler())
    images = pipe(**call_kwargs(cls)).images
    assert images.isfinite().all() and diffaccel.summary(pipe).last_run["steps"] == 4
    pipe = make(cls)
    call = stock_call(type(pipe))
    inside, _ = generate_stock(pipe, Euler(), call, arguments_of(call, pipe, (), call_kwargs(cls)))
    torch.testing.assert_close(inside.images, images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("does", "path"), [("step by index", "native"), ("step by index, inpainting", "stock loop")])
def test_a_loop_that_takes_the_first_value_by_its_index(does: str, path: str) -> None:
    """Kandinsky's ``scheduler.step(...)[0]`` without ``return_dict=False``."""
    pipe = toy.make()
    before = pipe(**toy.call_kwargs(does))["latents"]
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**toy.call_kwargs(does))["latents"], before)
    last = diffaccel.summary(pipe).last_run
    assert last is not None and last["path"] == path
