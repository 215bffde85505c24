"""What a pipeline and its scheduler say about the number and the index of steps, while a sampler makes them."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_variants
import torch
import toy
from diffusers import DEISMultistepScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, PNDMScheduler
from diffusers.callbacks import SDCFGCutoffCallback

import diffaccel
from diffaccel.samplers import DPMpp2M, Euler, Heun, Scheduler

MULTIPLE_ENTRIES = {"heun": HeunDiscreteScheduler, "kdpm2": KDPM2DiscreteScheduler, "pndm": PNDMScheduler}


def wrapped(scheduler: str, sampler: Any) -> Any:
    pipe = tiny.make("sd", scheduler=MULTIPLE_ENTRIES[scheduler](**tiny.TRAINED))
    return diffaccel.accelerate(pipe, sampler)


@pytest.mark.parametrize("scheduler", MULTIPLE_ENTRIES)
def test_the_number_of_steps_is_the_samplers(scheduler: str, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = wrapped(scheduler, Euler())
    pipe.set_progress_bar_config(disable=False, ascii=True)
    seen: list[tuple[int, int]] = []

    def look(pipe, i, t, kwargs):
        seen.append((i, pipe.num_timesteps))
        return kwargs

    pipe(**tiny.call_kwargs("sd", batch=1, steps=5), callback_on_step_end=look)
    count = len(seen)
    assert count == diffaccel.summary(pipe).last_run["steps"] and seen == [(i, count) for i in range(count)]
    bars = capsys.readouterr().err
    assert f"{count}/{count}" in bars and f"/{2 * count - 1}" not in bars


@pytest.mark.parametrize("sampler", [Euler(), DPMpp2M(), Heun()], ids=lambda sampler: sampler.name)
@pytest.mark.parametrize("scheduler", ["heun", "kdpm2"])
def test_a_cutoff_at_a_share_of_the_steps(scheduler: str, sampler: Any) -> None:
    pipe, rows = wrapped(scheduler, sampler), []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: rows.append(_rows(args, kwargs)), with_kwargs=True)
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=0.4)
    pipe(**tiny.call_kwargs("sd", batch=1, steps=10), callback_on_step_end=cutoff)
    assert rows.count(2) / len(rows) == pytest.approx(0.5, abs=0.04)  # through the step with index 0.4 n


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return len(args[0] if args else kwargs["sample"])


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_the_scheduler_shows_the_index_of_the_step(name: str) -> None:
    seen: list[int] = []

    def look(pipe, i, t, kwargs):
        seen.append(pipe.scheduler.step_index)
        return kwargs

    for sampler in (None, Euler(), Scheduler()):
        pipe = tiny.make(name)
        if sampler is not None:
            diffaccel.accelerate(pipe, sampler)
        pipe(**tiny.call_kwargs(name), callback_on_step_end=look)
        assert seen == [1, 2, 3, 4] and pipe.scheduler.step_index == 4
        seen.clear()


def test_the_index_of_a_call_that_starts_in_the_middle() -> None:
    seen: list[list[int]] = []

    def look(pipe, i, t, kwargs):
        seen[-1].append(pipe.scheduler.step_index)
        return kwargs

    for sampler in (None, Euler()):
        pipe = tiny_variants.img2img("sd3")
        if sampler is not None:
            diffaccel.accelerate(pipe, sampler)
        seen.append([])
        pipe(**tiny_variants.img2img_kwargs("sd3"), callback_on_step_end=look)
    assert seen[0] == seen[1] and seen[0][0] > 1


@pytest.mark.parametrize("kind", [HeunDiscreteScheduler, KDPM2DiscreteScheduler])
def test_the_index_where_the_scheduler_has_a_level_twice(kind: type) -> None:
    """It is that of the entry at which the solver itself stands after a whole step."""
    seen: list[int] = []

    def look(pipe, i, t, kwargs):
        seen.append(pipe.scheduler.step_index)
        return kwargs

    pipe = tiny.make("sd", scheduler=kind(**tiny.TRAINED))
    pipe(**tiny.call_kwargs("sd"), callback_on_step_end=look)
    whole_steps = [*seen[1::2], seen[-1]]
    seen.clear()
    diffaccel.accelerate(pipe, Euler())
    pipe(**tiny.call_kwargs("sd"), callback_on_step_end=look)
    assert seen == whole_steps == [2, 4, 6, 7]


@pytest.mark.parametrize("kind", [PNDMScheduler, DEISMultistepScheduler])
def test_two_predictions_a_step_down_to_a_level_above_zero(kind: type) -> None:
    """Levels on the scheduler's device change the rounding alone."""
    options = {"skip_prk_steps": True} if kind is PNDMScheduler else {}
    images = []
    for state in ("float32", "stock"):
        pipe = diffaccel.accelerate(tiny.make("sd", scheduler=kind(**tiny.TRAINED, **options)), Heun(state=state))
        images.append(pipe(**tiny.call_kwargs("sd")).images)
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", [Euler(), Heun()])
def test_the_index_in_the_pipelines_own_loop(sampler: Any) -> None:
    """After the call the scheduler stands where the stock loop leaves it, whatever entries the sampler asked at."""
    seen: list[int] = []

    def look(pipe, i, t, kwargs):
        seen.append(pipe.scheduler.step_index)
        return kwargs

    pipe = toy.make()
    pipe(**toy.call_kwargs("inpainting", callback_on_step_end=look))
    stock, timesteps, sigmas = seen.copy(), pipe.scheduler.timesteps, pipe.scheduler.sigmas
    seen.clear()
    diffaccel.accelerate(pipe, sampler)
    pipe.scheduler.set_timesteps(3)
    pipe(**toy.call_kwargs("inpainting" if sampler == Euler() else "rescaled", callback_on_step_end=look))
    assert seen[: len(stock)] == stock == [1, 2, 3, 4, 5, 6]
    assert diffaccel.summary(pipe).last_run["path"] == "stock loop"
    assert pipe.scheduler.step_index == 6
    assert torch.equal(pipe.scheduler.timesteps, timesteps) and torch.equal(pipe.scheduler.sigmas, sigmas)
    assert "step" not in vars(pipe.scheduler)
