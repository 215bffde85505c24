"""Image-to-image, inpainting, ControlNet and IP-Adapter: the stock picture to the bit, or one clear refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import tiny_variants as variants
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import diffaccel
from diffaccel import schedules
from diffaccel.errors import DiffAccelError, UnsupportedBySampler
from diffaccel.runtime.probe import open_session
from diffaccel.samplers import Ancestral, DPMpp2M, Euler, Heun, Scheduler

Kwargs = Callable[[], dict[str, Any]]
GUIDED = pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
SINGLE_EVAL = [DPMpp2M(), Ancestral(eta=0.0)]


def grid(cases: Any) -> list[Any]:
    """Every case at three strengths; at one of these also without guidance, and at a larger size."""
    cells = [(32, 0.3, True), (32, 0.6, True), (32, 1.0, True), (32, 0.6, False), (64, 0.6, True)]
    return [
        pytest.param(case, *cell, id=f"{case}-{cell[0]}-{cell[1]}-{'guided' if cell[2] else 'unguided'}")
        for case in cases
        for cell in cells
    ]


def run(pipe: Any, kwargs: Kwargs) -> torch.Tensor:
    torch.manual_seed(3)  # ControlNets of SD 3 encode their picture with torch's own generator
    return pipe(**kwargs()).images


def under(pipe: Any, sampler: Any, kwargs: Kwargs) -> torch.Tensor:
    diffaccel.accelerate(pipe, sampler)
    try:
        return run(pipe, kwargs)
    finally:
        diffaccel.remove(pipe)


def check_parity(pipe: Any, kwargs: Kwargs, sampler: Any = None) -> torch.Tensor:
    stock = run(pipe, kwargs)
    assert torch.equal(under(pipe, sampler or Euler(), kwargs), stock)
    assert torch.equal(run(pipe, kwargs), stock), "after removal"
    return stock


def check_agrees(pipe: Any, samplers: Any, kwargs: Kwargs) -> None:
    euler = under(pipe, Euler(), kwargs)
    for sampler in samplers:
        assert (under(pipe, sampler, kwargs) - euler).norm() < 0.05 * euler.norm(), sampler.name


# -- image to image ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "size", "strength", "guided"), grid(variants.IMG2IMG))
def test_image_to_image_is_the_stock_call(family: str, size: int, strength: float, guided: bool) -> None:
    pipe = variants.img2img(family)
    check_parity(pipe, lambda: variants.img2img_kwargs(family, size, strength, guided=guided, steps=5))


@pytest.mark.parametrize("family", variants.IMG2IMG)
def test_image_to_image_runs_natively_from_its_own_level_on(family: str) -> None:
    pipe = diffaccel.accelerate(variants.img2img(family), Euler())
    pipe(**variants.img2img_kwargs(family, strength=0.6, steps=5))
    last = diffaccel.summary(pipe).last_run
    assert (last["steps"], last["nfe_by_resolution"]) == (3, {"32x32": 6})


@pytest.mark.parametrize("family", variants.IMG2IMG)
def test_image_to_image_in_bf16(family: str) -> None:
    pipe = variants.img2img(family).to(torch.bfloat16)
    check_parity(pipe, lambda: variants.img2img_kwargs(family), Euler(state="stock"))


@pytest.mark.filterwarnings("ignore:You have passed 2 text prompts")
@pytest.mark.parametrize("family", variants.IMG2IMG)
def test_several_images_per_prompt_from_a_picture_file(family: str) -> None:
    pipe = variants.img2img(family)
    image = pipe.image_processor.numpy_to_pil(variants.picture(40, 1, width=48).permute(0, 2, 3, 1).numpy())[0]

    def kwargs() -> dict[str, Any]:
        single = variants.img2img_kwargs(family, batch=1)
        return {
            **single, "image": image, "num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(0),
        }  # fmt: skip

    check_parity(pipe, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("family", variants.IMG2IMG)
def test_samplers_agree_on_image_to_image(family: str) -> None:
    samplers = [Heun(), *SINGLE_EVAL]
    check_agrees(
        variants.img2img(family), samplers, lambda: variants.img2img_kwargs(family, strength=0.6, batch=1, steps=40)
    )


SCHEDULERS = {
    "ddim": tiny.ddim,
    "pndm": lambda: PNDMScheduler(**tiny.TRAINED, skip_prk_steps=True),
    "heun": lambda: HeunDiscreteScheduler(**tiny.TRAINED),
    "karras": lambda: EulerDiscreteScheduler(**tiny.TRAINED, use_karras_sigmas=True),
    "dpm karras": lambda: DPMSolverMultistepScheduler(**tiny.TRAINED, use_karras_sigmas=True),
    "unipc": lambda: UniPCMultistepScheduler(**tiny.TRAINED),
}


@pytest.mark.parametrize("strength", [0.3, 0.45, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_first_level_is_that_at_which_the_image_was_noised(scheduler: str, strength: float) -> None:
    """An image of zeros is only noise: over the level it is the noise that the generators drew."""
    pipe = variants.img2img("sd", scheduler=SCHEDULERS[scheduler]())
    kwargs = {**variants.img2img_kwargs("sd", strength=strength, steps=10), "image": torch.zeros(2, 4, 4, 4)}
    drawn = [torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with open_session(pipe, **kwargs) as session:
        torch.testing.assert_close(session.x / session.sigmas[0], torch.cat(drawn), rtol=1e-5, atol=2e-6)
        assert len(session.sigmas) - 1 in (int(10 * strength), int(10 * strength) + (scheduler == "pndm"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_pipelines_own_solver_from_the_middle_on(scheduler: str) -> None:
    pipe = variants.img2img("sd", scheduler=SCHEDULERS[scheduler]())
    check_parity(pipe, lambda: variants.img2img_kwargs("sd", strength=0.45, steps=8), Scheduler())


def test_the_place_of_a_first_step() -> None:
    """By its memory, else by what the pipeline set, else by its value."""
    scheduler = EulerDiscreteScheduler(**tiny.TRAINED)
    scheduler.set_timesteps(5)
    first = scheduler.timesteps[2:][0]
    assert [schedules.start_index(scheduler, t) for t in (None, first, first.clone(), first.item())] == [0, 2, 2, 2]
    assert torch.equal(schedules.read(scheduler, first).sigmas, scheduler.sigmas[2:])
    with pytest.raises(DiffAccelError, match="none of the 5 of its EulerDiscreteScheduler"):
        schedules.start_index(scheduler, 123.4)
    scheduler.set_begin_index(3)
    assert [schedules.start_index(scheduler, t) for t in (first, first.clone())] == [2, 3]


def test_a_start_inside_a_runge_kutta_step_is_refused() -> None:
    pipe = diffaccel.accelerate(variants.img2img("sd", scheduler=PNDMScheduler(**tiny.TRAINED)), Euler())
    with pytest.raises(DiffAccelError, match="skip_prk_steps=True"):
        pipe(**variants.img2img_kwargs("sd", strength=0.3, steps=10))


@pytest.mark.parametrize("strength", [0.3, 0.6])
def test_first_order_dpm_solver_is_euler(strength: float) -> None:
    pipe = variants.img2img("sdxl", scheduler=DPMSolverMultistepScheduler(**tiny.TRAINED, solver_order=1))

    def kwargs() -> dict[str, Any]:
        return variants.img2img_kwargs("sdxl", strength=strength, steps=10)

    stock = run(pipe, kwargs)
    torch.testing.assert_close(under(pipe, Euler(), kwargs), stock, rtol=1e-4, atol=1e-4)


def test_denoising_start_replaces_strength() -> None:
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    check_parity(
        variants.img2img("sdxl"),
        lambda: {**variants.img2img_kwargs("sdxl", steps=6), "image": latents, "denoising_start": 0.5},
    )


@pytest.mark.parametrize("family", variants.IMG2IMG)
def test_another_resolution_starts_from_the_resized_image(family: str) -> None:
    pipe = variants.img2img(family)
    kwargs = variants.img2img_kwargs(family, 64)
    with open_session(pipe, **kwargs) as session:
        small = session.at(32, 32)
        assert (small.height, small.width) == (32, 32)
        assert torch.equal(small.sigmas[-1], session.sigmas[-1]) and len(small.sigmas) == len(session.sigmas)
        fresh = {**variants.img2img_kwargs(family, 32), "image": kwargs["image"]}
        if family in tiny.UNET:
            fresh["image"] = torch.nn.functional.interpolate(kwargs["image"], size=(32, 32))
        with open_session(pipe, **fresh) as other:
            assert torch.equal(small.x, other.x)
        if family == "sdxl":  # a stage of a larger picture is no thumbnail
            time_ids = small.conds[0].positive["added_cond_kwargs"]["time_ids"]
            assert time_ids[0, :2].tolist() == [64, 64]


@pytest.mark.parametrize("family", variants.IMG2IMG)
def test_latents_as_image_fix_the_resolution(family: str) -> None:
    pipe = variants.img2img(family)
    kwargs = {**variants.img2img_kwargs(family), "image": torch.zeros(2, 4, 4, 4)}
    check_parity(pipe, lambda: {**variants.img2img_kwargs(family), "image": torch.zeros(2, 4, 4, 4)})
    with open_session(pipe, **kwargs) as session, pytest.raises(DiffAccelError, match="Pass the image itself"):
        session.at(64, 64)


# -- inpainting --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("case", "size", "strength", "guided"), grid(variants.INPAINT))
def test_inpainting_is_the_stock_call(case: str, size: int, strength: float, guided: bool) -> None:
    pipe = variants.inpaint(case)
    check_parity(pipe, lambda: variants.inpaint_kwargs(case, size, strength, guided=guided, steps=5))


@pytest.mark.parametrize("case", variants.INPAINT)
def test_inpainting_in_bf16(case: str) -> None:
    pipe = variants.inpaint(case).to(torch.bfloat16)
    check_parity(pipe, lambda: variants.inpaint_kwargs(case), Euler(state="stock"))


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("case", variants.INPAINT)
def test_samplers_with_one_prediction_a_step_inpaint(case: str, strength: float) -> None:
    check_agrees(
        variants.inpaint(case), SINGLE_EVAL, lambda: variants.inpaint_kwargs(case, strength=strength, batch=1, steps=30)
    )


@pytest.mark.parametrize("case", ["flux", "sd3", "sdxl"])
def test_an_edit_between_two_predictions_of_a_step_is_refused(case: str) -> None:
    pipe = variants.inpaint(case)
    stock = run(pipe, lambda: variants.inpaint_kwargs(case, strength=1.0))
    with pytest.raises(UnsupportedBySampler, match="between the predictions of one step of 'heun'"):
        under(pipe, Heun(), lambda: variants.inpaint_kwargs(case, strength=1.0))
    assert torch.equal(run(pipe, lambda: variants.inpaint_kwargs(case, strength=1.0)), stock)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm"])
def test_such_an_edit_is_also_found_where_noise_has_no_step_index(scheduler: str) -> None:
    pipe = variants.inpaint("sdxl", scheduler=SCHEDULERS[scheduler]())
    with pytest.raises(UnsupportedBySampler, match="between the predictions of one step of 'heun'"):
        under(pipe, Heun(), lambda: variants.inpaint_kwargs("sdxl", strength=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["sdxl9", "fill"])
def test_heun_fills_where_the_mask_goes_through_the_network(case: str) -> None:
    pipe = variants.inpaint(case)
    check_agrees(pipe, [Heun()], lambda: variants.inpaint_kwargs(case, strength=1.0, batch=1, steps=30))
    try:
        check_agrees(pipe, [Heun()], lambda: variants.inpaint_kwargs(case, strength=0.6, batch=1, steps=30))
    except UnsupportedBySampler as refusal:
        assert "Use strength=1.0" in str(refusal)


@pytest.mark.parametrize("strength", [0.3, 0.6])
@pytest.mark.parametrize("scheduler", ["heun", "pndm"])
def test_a_scheduler_with_other_entries_than_levels_cannot_be_cut(scheduler: str, strength: float) -> None:
    pipe = variants.inpaint("sdxl", scheduler=SCHEDULERS[scheduler]())
    with pytest.raises(UnsupportedBySampler, match=r"Use strength=1\.0"):
        under(pipe, Euler(), lambda: variants.inpaint_kwargs("sdxl", strength=strength, steps=5))


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_inpainting_with_a_vp_scheduler(scheduler: str, strength: float) -> None:
    first_order = DPMSolverMultistepScheduler(**tiny.TRAINED, solver_order=1)
    pipe = variants.inpaint("sdxl", scheduler=tiny.ddim() if scheduler == "ddim" else first_order)

    def kwargs() -> dict[str, Any]:
        return variants.inpaint_kwargs("sdxl", strength=strength, steps=10)

    stock = run(pipe, kwargs)
    torch.testing.assert_close(under(pipe, Euler(), kwargs), stock, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("name", variants.MIXTURES)
def test_mixtures_are_the_stock_call(name: str, strength: float) -> None:
    pipe = variants.mixture(name)
    check_parity(pipe, lambda: variants.mixture_kwargs(name, strength, steps=5))


def test_a_loop_that_ends_early() -> None:
    pipe = variants.inpaint("sdxl9")

    def kwargs() -> dict[str, Any]:
        return {**variants.inpaint_kwargs("sdxl9", strength=1.0, steps=6), "denoising_end": 0.4}

    check_parity(pipe, kwargs)
    with pytest.raises(UnsupportedBySampler, match="denoising_end"):
        under(pipe, Heun(), kwargs)


@pytest.mark.parametrize("make", ["img2img", "inpaint"])
@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl"])
def test_callbacks_see_the_stock_steps_and_edit(make: str, family: str) -> None:
    pipe = getattr(variants, make)(family)
    seen: list[Any] = []

    def dim(pipe: Any, i: int, t: torch.Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((i, float(t)))
        return {"latents": kwargs["latents"] * 0.9} if i == 1 else {}

    def kwargs() -> dict[str, Any]:
        arguments = getattr(variants, f"{make}_kwargs")(family, steps=5)
        return {**arguments, "callback_on_step_end": dim}

    stock, expected = run(pipe, kwargs), seen.copy()
    seen.clear()
    assert torch.equal(under(pipe, Euler(), kwargs), stock)
    assert seen == expected


# -- ControlNet --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@GUIDED
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("family", variants.CONTROLNET)
def test_a_controlnet_acts_at_every_step(family: str, size: int, guided: bool) -> None:
    pipe = variants.controlnet(family)
    stock = check_parity(pipe, lambda: variants.controlnet_kwargs(family, size, guided=guided))
    free = {"controlnet_conditioning_scale": 0.0}
    without = run(pipe, lambda: {**variants.controlnet_kwargs(family, size, guided=guided), **free})
    assert (stock - without).norm() > 1e-3 * stock.norm()


@pytest.mark.parametrize("family", variants.CONTROLNET)
def test_a_controlnet_starts_and_ends_as_in_the_stock_loop(family: str) -> None:
    pipe = variants.controlnet(family)
    unlimited = run(pipe, lambda: variants.controlnet_kwargs(family, steps=6))
    part = {"control_guidance_start": 0.3, "control_guidance_end": 0.7}
    stock = check_parity(pipe, lambda: {**variants.controlnet_kwargs(family, steps=6), **part})
    assert not torch.equal(stock, unlimited)


@pytest.mark.parametrize("family", variants.CONTROLNET)
def test_a_controlnet_in_bf16(family: str) -> None:
    pipe = variants.controlnet(family).to(torch.bfloat16)
    check_parity(pipe, lambda: variants.controlnet_kwargs(family), Euler(state="stock"))


@pytest.mark.slow
@pytest.mark.parametrize("family", variants.CONTROLNET)
def test_samplers_agree_under_a_controlnet(family: str) -> None:
    samplers = [Heun(), *SINGLE_EVAL]
    check_agrees(variants.controlnet(family), samplers, lambda: variants.controlnet_kwargs(family, batch=1, steps=30))


# -- IP-Adapter --------------------------------------------------------------------------------------------------------


@GUIDED
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("family", variants.IP_ADAPTER)
def test_an_ip_adapter_is_part_of_the_network(family: str, size: int, guided: bool) -> None:
    pipe = variants.with_ip_adapter(family)
    stock = check_parity(pipe, lambda: variants.ip_adapter_kwargs(family, size, guided))
    pipe.set_ip_adapter_scale(0.0)
    assert (run(pipe, lambda: variants.ip_adapter_kwargs(family, size, guided)) - stock).norm() > 1e-3 * stock.norm()


@pytest.mark.parametrize("family", variants.IP_ADAPTER)
def test_rows_of_an_ip_adapter_may_go_one_by_one(family: str) -> None:
    pipe = variants.with_ip_adapter(family)

    def kwargs() -> dict[str, Any]:
        return variants.ip_adapter_kwargs(family)

    together = under(pipe, Euler(), kwargs)
    torch.testing.assert_close(under(pipe, Euler(max_batch=1), kwargs), together, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", variants.IP_ADAPTER)
def test_heun_agrees_with_an_ip_adapter(family: str) -> None:
    check_agrees(
        variants.with_ip_adapter(family), [Heun()], lambda: variants.ip_adapter_kwargs(family, batch=1, steps=30)
    )


@pytest.mark.parametrize("family", variants.IP_ADAPTER)
def test_an_ip_adapter_in_image_to_image(family: str) -> None:
    pipe = variants._pipeline(variants.IMG2IMG[family], variants.with_ip_adapter(family).components)

    def kwargs() -> dict[str, Any]:
        embeds = {k: v for k, v in variants.ip_adapter_kwargs(family).items() if "ip_adapter" in k}
        return {**variants.img2img_kwargs(family), **embeds}

    check_parity(pipe, kwargs)
