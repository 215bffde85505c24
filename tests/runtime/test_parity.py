"""Wrapped Euler is the stock call, to the bit; removal restores it, to the bit."""

from __future__ import annotations

import pytest
import tiny
import torch

import diffaccel
from diffaccel.samplers import Ancestral, DPMpp2M, Euler, Heun


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_euler_equals_the_stock_call(family: str, size: int, guided: bool) -> None:
    pipe = tiny.make(family)
    stock = pipe(**tiny.call_kwargs(family, size, guided)).images
    diffaccel.accelerate(pipe, Euler())
    wrapped = pipe(**tiny.call_kwargs(family, size, guided)).images
    diffaccel.remove(pipe)
    again = pipe(**tiny.call_kwargs(family, size, guided)).images
    assert torch.equal(wrapped, stock)
    assert torch.equal(again, stock)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_euler_equals_the_stock_call_in_pixels(family: str) -> None:
    pipe = tiny.make(family)
    kwargs = {**tiny.call_kwargs(family), "output_type": "pt"}
    stock = pipe(**kwargs).images
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**{**tiny.call_kwargs(family), "output_type": "pt"}).images, stock)
    images = pipe(**{**tiny.call_kwargs(family), "output_type": "pil"}, return_dict=False)[0]
    assert [image.size for image in images] == [(32, 32)] * 2


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_euler_in_stock_state_equals_the_stock_call_in_bf16(family: str) -> None:
    pipe = tiny.make(family).to(torch.bfloat16)
    stock = pipe(**tiny.call_kwargs(family)).images
    diffaccel.accelerate(pipe, Euler(state="stock"))
    assert torch.equal(pipe(**tiny.call_kwargs(family)).images, stock)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_euler_in_stock_state_equals_the_stock_call_in_float64(family: str) -> None:
    """Its scheduler begins every step at fp32, and the network is asked at float64."""
    pipe = tiny.make(family).to(torch.float64)
    stock = pipe(**tiny.call_kwargs(family, 64)).images
    diffaccel.accelerate(pipe, Euler(state="stock"))
    assert torch.equal(pipe(**tiny.call_kwargs(family, 64)).images, stock) and stock.dtype == torch.float64
    diffaccel.remove(pipe)
    assert torch.equal(pipe(**tiny.call_kwargs(family, 64)).images, stock)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_euler_equals_the_stock_call_for_other_prediction_types(prediction: str) -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**tiny.TRAINED, steps_offset=1, prediction_type=prediction)
    pipe = tiny.make("sd", scheduler=scheduler)
    stock = pipe(**tiny.call_kwargs("sd")).images
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**tiny.call_kwargs("sd")).images, stock)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_euler_equals_ddim_on_a_vp_schedule(zero_snr: bool) -> None:
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr, "timestep_spacing": "trailing"}
    pipe = tiny.make("sd", scheduler=tiny.ddim(**changes))
    stock = pipe(**tiny.call_kwargs("sd", steps=5)).images
    diffaccel.accelerate(pipe, Euler())
    wrapped = pipe(**tiny.call_kwargs("sd", steps=5)).images
    # the same map in other coordinates: equal up to fp32 rounding, relative to latents of size 1 to 10
    torch.testing.assert_close(wrapped, stock, rtol=1e-4, atol=1e-4)


def test_flux_with_embedded_guidance() -> None:
    pipe = tiny.make("flux", guidance_embeds=True)
    kwargs = {**tiny.call_kwargs("flux", guided=False), "guidance_scale": 4.0}
    stock = pipe(**kwargs).images
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**{**tiny.call_kwargs("flux", guided=False), "guidance_scale": 4.0}).images, stock)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_guidance_rescale_is_exact(family: str) -> None:
    pipe = tiny.make(family)
    stock = pipe(**tiny.call_kwargs(family), guidance_rescale=0.7).images
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**tiny.call_kwargs(family), guidance_rescale=0.7).images, stock)


@pytest.mark.parametrize("images_per_prompt", [1, 3])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_one_generator_and_several_images_per_prompt(family: str, images_per_prompt: int) -> None:
    def kwargs() -> dict:
        arguments = tiny.call_kwargs(family)
        return {**arguments, "generator": torch.Generator().manual_seed(5), "num_images_per_prompt": images_per_prompt}

    pipe = tiny.make(family)
    stock = pipe(**kwargs()).images
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**kwargs()).images, stock)


def test_positional_arguments_and_the_global_generator() -> None:
    pipe = tiny.make("sd")
    kwargs = {"num_inference_steps": 3, "output_type": "latent", "height": 32, "width": 32}
    torch.manual_seed(7)
    stock = pipe("a red apple", **kwargs).images
    diffaccel.accelerate(pipe, Euler())
    torch.manual_seed(7)
    assert torch.equal(pipe("a red apple", **kwargs).images, stock)


def test_latents_and_embeddings_passed_by_the_user() -> None:
    pipe = tiny.make("flux")
    embeds, pooled, _ = pipe.encode_prompt("a red apple", None, max_sequence_length=24)
    latents = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(3))
    kwargs = dict(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=latents, height=32, width=32, num_inference_steps=3,
        output_type="latent",
    )  # fmt: skip
    stock = pipe(**kwargs).images
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(pipe(**kwargs).images, stock)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_samplers_agree_when_steps_are_many(family: str) -> None:
    """All deterministic samplers walk the same ordinary differential equation."""
    pipe = tiny.make(family)
    diffaccel.accelerate(pipe, Euler())
    kwargs = {"batch": 1, "steps": 60}
    euler = pipe(**tiny.call_kwargs(family, **kwargs)).images
    for sampler in (Heun(), DPMpp2M(), Ancestral(eta=0.0)):
        diffaccel.accelerate(diffaccel.remove(pipe), sampler)
        other = pipe(**tiny.call_kwargs(family, **kwargs)).images
        assert (other - euler).norm() < 0.05 * euler.norm(), sampler.name
