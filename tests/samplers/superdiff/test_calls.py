"""Superposition beside other options of a call: what composes, what is refused, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from density_bed import A, B, superpose
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR, VE_PATH
from diffaccel.samplers import Spectrum, SuperDiff
from diffaccel.samplers.superdiff import formulas

PAIRS = ["a cat | a teapot", "red | two blue houses"]


def call(pipe: Any, family: str, **changes: Any) -> Tensor:
    arguments = tiny.call_kwargs(family) | {"prompt": PAIRS, "negative_prompt": ["", ""]}
    return pipe(**arguments | changes).images.clone()


def test_langevin_moves_end_their_guidance_with_the_steps() -> None:
    pipe = diffaccel.accelerate(tiny.make("sd"), SuperDiff(op="mcmc", guidance_stop=0.5))
    call(pipe, "sd")
    moves = [3, 3, 2]  # rows of a move after each step but the last: no prompt is left out of the third's
    assert diffaccel.summary(pipe).last_run["forwards"] == 2 * (3 + 3 + 2 + 2 + sum(moves))


@pytest.mark.parametrize("options", [{"curvature": True}, {"eta": 0.0}, {"op": "or", "eta": 0.0}])
def test_a_cache_is_refused_beside_finite_differences(options: dict[str, Any]) -> None:
    """Under guidance it would skip nothing, and without the difference would be one of two forecasts."""
    with pytest.raises(DiffAccelError, match="'spectrum' keeps what each row"):
        diffaccel.accelerate(tiny.make("flux"), SuperDiff(**options), Spectrum())


def test_calls_of_few_rows_and_images_of_one_prompt_are_the_same_pictures() -> None:
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    whole = call(diffaccel.accelerate(tiny.make("flux"), SuperDiff()), "flux", num_images_per_prompt=2, generator=seeds)
    pipe = diffaccel.accelerate(tiny.make("flux"), SuperDiff(max_batch=1))
    prompt = {"prompt": PAIRS[1], "negative_prompt": "", "num_images_per_prompt": 2}
    seeds = [torch.Generator().manual_seed(i) for i in (2, 3)]
    torch.testing.assert_close(call(pipe, "flux", generator=seeds, **prompt), whole[2:], rtol=1e-4, atol=1e-4)
    assert diffaccel.summary(pipe).last_run["calls"] == 2 * 3 * 4


def test_a_product_of_a_picture_begins_at_that_picture() -> None:
    """A product begins in that of its first densities only where the call begins at noise."""
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pipe(tiny.make("sd"))
    pipe.set_progress_bar_config(disable=True)
    diffaccel.accelerate(pipe, SuperDiff(op="product", weights=(1e-9, 4.0), data_std=0.5))
    inputs: list[Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: inputs.append(args[0]), with_kwargs=True)
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    arguments = tiny.call_kwargs("sd", steps=10, guided=False) | {"prompt": PAIRS, "image": image, "strength": 0.6}
    del arguments["height"], arguments["width"]
    pipe(**arguments)
    diffaccel.remove(pipe)
    stock: list[Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: stock.append(args[0]), with_kwargs=True)
    pipe(**arguments | {"generator": [torch.Generator().manual_seed(i) for i in range(2)]})
    torch.testing.assert_close(inputs[0][:2], stock[0][:2], rtol=1e-5, atol=1e-5)


def test_another_first_level_has_the_noise_of_that_level() -> None:
    times = torch.tensor([10.0, 5.0, 2.0], dtype=torch.float64)
    begin = 10 * torch.randn(4, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = superpose(SuperDiff(op="or", first_sigma=6.0), [A, B], VE_PATH, times, 4, begin=begin)
    torch.testing.assert_close(run.evals[0].x, 0.6 * begin)


def test_vaes_that_differ_by_rounding_are_one() -> None:
    """A checkpoint in half precision, loaded in fp32, is still that VAE; other weights are not."""
    first, second = tiny.make("flux"), tiny.make("flux")
    second.vae.to(torch.float16).to(torch.float32)
    diffaccel.accelerate([first, second], SuperDiff())
    diffaccel.remove(first)
    next(second.vae.encoder.parameters()).data *= 1.01
    with pytest.raises(DiffAccelError, match="different weights"):
        diffaccel.accelerate([first, second], SuperDiff())


def test_inpainting_in_its_own_loop_is_refused_for_what_it_lacks() -> None:
    from diffusers import StableDiffusionInpaintPipeline

    pipe = StableDiffusionInpaintPipeline.from_pipe(tiny.make("sd"))
    diffaccel.accelerate(pipe, SuperDiff())
    mask, image = torch.zeros(2, 1, 32, 32), torch.rand(2, 3, 32, 32)
    mask[..., 16:] = 1
    with pytest.raises(DiffAccelError, match="needs the conditions of the call one by one"):
        call(pipe, "sd", image=image, mask_image=mask)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"true_cfg_scale": -2.0}, "true_cfg_scale is -2.0; it must be 0 or more"),
        ({"sigmas": [0.5, 1.0, 0.2], "num_inference_steps": 3}, "do not fall from step to step"),
    ],
)
def test_calls_that_make_no_sense_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(DiffAccelError, match=why):
        call(diffaccel.accelerate(tiny.make("flux"), SuperDiff()), "flux", **changes)


def test_a_folder_that_takes_no_file_is_found_before_anything_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    pipe = diffaccel.accelerate(tiny.make("flux"), SuperDiff(folder=str(tmp_path / "file")))
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(DiffAccelError, match=r"cannot be written: .* is a file\. Give another"):
        call(pipe, "flux")


def test_latents_of_another_shape_are_refused() -> None:
    first, second = tiny.make("sd"), tiny.make("sd")
    second.unet.register_to_config(in_channels=8)
    diffaccel.accelerate([first, second], SuperDiff())
    with pytest.raises(DiffAccelError, match="Superpose models of one latent shape"):
        call(first, "sd")


def test_more_components_than_dimensions_are_refused() -> None:
    with pytest.raises(DiffAccelError, match="AND of 4 components needs 3 dimensions, and latents have 2"):
        superpose(SuperDiff(), [A, B, A, B], LINEAR, torch.linspace(1, 0, 4, dtype=torch.float64), 3)


# -- formulas ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", ["not " * 6000 + "p1", "(" * 600 + "p1" + ")" * 600, " ", "p1\0", "p1 | p2", "cat"])
def test_what_is_no_formula_is_refused_by_the_config(formula: str) -> None:
    """Before a model is loaded, in one short sentence."""
    with pytest.raises(DiffAccelError, match=r"cannot be read\. Write components p1, p2, \.\.\.") as error:
        SuperDiff(op="dombi", formula=formula)
    assert len(str(error.value)) < 400


def test_a_formula_that_grows_without_end_is_refused() -> None:
    assert formulas.parse("^".join(["p1", "p2", "p3"] * 2), 3)
    with pytest.raises(DiffAccelError, match="too many '\\^'"):
        SuperDiff(op="dombi", formula="^".join(["p1", "p2"] * 20))


@pytest.mark.parametrize(("count", "told"), [(1, "1 component, p1"), (2, "2 components, p1 to p2")])
def test_a_component_that_is_not_there_is_named(count: int, told: str) -> None:
    with pytest.raises(DiffAccelError, match=f"names p3, and the picture has {told}"):
        formulas.parse("p1 and p3", count)


# -- warnings ----------------------------------------------------------------------------------------------------------


def test_a_picture_of_one_component_is_said_to_compose_nothing(caplog: pytest.LogCaptureFixture) -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), SuperDiff())
    call(pipe, "flux")
    assert "one component" not in caplog.text
    for _ in range(2):
        call(pipe, "flux", prompt=["a cat and a teapot", "red"])
    assert caplog.text.count("op 'and' composes nothing. Write prompts with '|' between them") == 1
    caplog.clear()
    pipe = diffaccel.accelerate(tiny.make("flux"), SuperDiff(op="product", weights=(2.0,), particles=2))
    call(pipe, "flux", prompt=["a cat and a teapot", "red"])
    assert "one component" not in caplog.text


def test_few_steps_are_said_once_of_a_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), SuperDiff())
    for _ in range(2):
        call(pipe, "flux")
    assert caplog.text.count("are few for tracked densities") == 1


def test_components_that_agree_and_a_temperature_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    call(diffaccel.accelerate(tiny.make("flux"), SuperDiff()), "flux", prompt=["red | red"] * 2)
    assert "The components agree so closely" in caplog.text
    SuperDiff(op="or", temperature=100.0)
    assert "only 1 samples the mixture" in caplog.text
