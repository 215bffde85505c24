"""``callback_on_step_end`` under a sampler: the stock loop's own contract."""

from __future__ import annotations

import pytest
import tiny
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Euler


@pytest.fixture(params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


def both(family: str, callback, batch: int = 2, **extra) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the same call stock and wrapped."""
    pipe = tiny.make(family)
    results = []
    for wrap in (False, True):
        if wrap:
            diffaccel.accelerate(pipe, Euler())
        results.append(pipe(**tiny.call_kwargs(family, batch=batch), callback_on_step_end=callback, **extra).images)
    return results[0], results[1]


def test_a_callback_that_zeroes_latents(family: str) -> None:
    def zero(pipe, i, t, kwargs):
        return {"latents": torch.zeros_like(kwargs["latents"])} if i == 2 else {}

    stock, wrapped = both(family, zero)
    assert torch.equal(stock, wrapped)


def test_a_callback_sees_what_the_stock_loop_shows(family: str) -> None:
    seen: list = []

    def look(pipe, i, t, kwargs):
        seen.append((i, t.clone(), kwargs["latents"].clone(), kwargs["prompt_embeds"].clone(), pipe.num_timesteps))
        return kwargs

    stock, wrapped = both(family, look, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    assert torch.equal(stock, wrapped) and len(seen) == 8
    for a, b in zip(seen[:4], seen[4:], strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1]) and a[4] == b[4]
        assert torch.equal(a[2], b[2]) and torch.equal(a[3], b[3])


def test_a_callback_that_edits_the_prompt(family: str) -> None:
    def swap(pipe, i, t, kwargs):
        return {"prompt_embeds": kwargs["prompt_embeds"].flip(1)} if i == 1 else {}

    stock, wrapped = both(family, swap, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert torch.equal(stock, wrapped)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_guidance_switched_off_half_way(name: str) -> None:
    """The documented dynamic-guidance recipe, through diffusers' own callback classes."""
    from diffusers.callbacks import SD3CFGCutoffCallback, SDCFGCutoffCallback, SDXLCFGCutoffCallback

    cutoff = {"sd": SDCFGCutoffCallback, "sdxl": SDXLCFGCutoffCallback, "sd3": SD3CFGCutoffCallback}[name]
    stock, wrapped = both(name, cutoff(cutoff_step_ratio=0.5), batch=1)  # diffusers' classes keep one row only
    plain = tiny.make(name)(**tiny.call_kwargs(name, batch=1)).images
    assert torch.equal(stock, wrapped) and not torch.equal(stock, plain)


def test_interruption_keeps_the_latents_of_that_step(family: str) -> None:
    def stop(pipe, i, t, kwargs):
        pipe._interrupt = i >= 1
        return kwargs

    stock, wrapped = both(family, stop)
    assert torch.equal(stock, wrapped)


def test_after_an_interruption_the_next_call_is_whole(family: str) -> None:
    pipe = tiny.make(family)
    expected = pipe(**tiny.call_kwargs(family)).images
    diffaccel.accelerate(pipe, Euler())

    def stop(pipe, i, t, kwargs):
        pipe._interrupt = True
        return kwargs

    pipe(**tiny.call_kwargs(family), callback_on_step_end=stop)
    assert torch.equal(pipe(**tiny.call_kwargs(family)).images, expected)


def test_a_tensor_that_means_nothing_here_is_refused() -> None:
    pipe = tiny.make("sd")
    diffaccel.accelerate(pipe, Euler())
    with pytest.raises(DiffAccelError, match="asked for 'negative_prompt_embeds'"):
        pipe(
            **tiny.call_kwargs("sd"),
            callback_on_step_end=lambda pipe, i, t, kwargs: kwargs,
            callback_on_step_end_tensor_inputs=["negative_prompt_embeds"],
        )


def test_the_progress_bar_is_the_pipelines(capsys, family: str) -> None:
    pipe = tiny.make(family)
    pipe.set_progress_bar_config(disable=False, desc="drawing", ascii=True)
    diffaccel.accelerate(pipe, Euler())
    pipe(**tiny.call_kwargs(family))
    output = capsys.readouterr().err
    assert "drawing" in output and "4/4" in output
