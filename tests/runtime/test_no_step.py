"""A call that leaves its scheduler no step is refused with the argument that is the reason."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_variants
from diffusers import DiffusionPipeline

import diffaccel
from diffaccel.errors import DiffAccelError, UnsupportedBySampler
from diffaccel.runtime.probe import arguments_of, no_step, open_session, stock_call
from diffaccel.runtime.stock_loop import generate_stock
from diffaccel.samplers import Euler, Scheduler


def call_kwargs(strength: float, steps: int) -> dict[str, Any]:
    return tiny_variants.img2img_kwargs("sd", strength=strength) | {"num_inference_steps": steps}


@pytest.mark.parametrize("sampler", [Euler(), Scheduler()], ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("scheduler", [None, "ddim"])
def test_a_strength_that_leaves_no_step(sampler: Any, scheduler: str | None) -> None:
    pipe = tiny_variants.img2img("sd", scheduler=scheduler and tiny.ddim())
    diffaccel.accelerate(pipe, sampler)
    with pytest.raises(DiffAccelError, match=r"strength=0.3.*num_inference_steps=4.*at least 0.334"):
        pipe(**call_kwargs(0.3, 3))
    pipe(**call_kwargs(0.3, 4))


def test_in_an_open_session() -> None:
    pipe = tiny_variants.img2img("sd")
    match = r"strength=0.8.*num_inference_steps=2"
    with pytest.raises(DiffAccelError, match=match), open_session(pipe, **call_kwargs(0.8, 1)):
        pass


def test_in_the_stock_loop() -> None:
    pipe = tiny_variants.img2img("sd", scheduler=tiny.ddim())
    call = stock_call(type(pipe))
    with pytest.raises(DiffAccelError, match="strength"):
        generate_stock(pipe, Euler(), call, arguments_of(call, pipe, (), call_kwargs(0.8, 1)))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_inference_steps": 4}, "at least one inference step"),
        ({"num_inference_steps": 4, "strength": 0.5}, "at least one inference step"),
        ({"num_inference_steps": 4, "strength": 0.0}, "strength is 0.0"),
        ({"num_inference_steps": 4, "strength": 0.1, "denoising_start": 1.0}, "denoising_start=1.0"),
        ({"num_inference_steps": 1, "strength": 0.7}, "num_inference_steps=2"),
    ],
)
def test_the_reason(arguments: dict[str, Any], text: str) -> None:
    assert text in str(no_step(object(), arguments))


def test_a_pipeline_that_calls_others() -> None:
    pipe, inner = tiny.sd(), tiny.sd()
    pipe.upsampling_pipe = inner
    assert "steps are those of upsampling_pipe" in str(no_step(pipe, {"num_inference_steps": 4}))


def test_a_pipeline_without_a_scheduler() -> None:
    """Such a one, as an upsampler of latents, has nothing to sample; the stock rule calls it as it is."""
    pipe = _Doubler()
    diffaccel.accelerate(pipe, Scheduler())
    assert pipe(3) == 6
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, Euler())
    with pytest.raises(UnsupportedBySampler, match="_Doubler has no scheduler, so there is nothing to sample"):
        pipe(3)
    diffaccel.remove(pipe)
    assert pipe(3) == 6


class _Doubler(DiffusionPipeline):
    def __init__(self, vae: Any = None) -> None:
        super().__init__()
        self.register_modules(vae=vae)

    def __call__(self, value: int) -> int:
        return 2 * value
