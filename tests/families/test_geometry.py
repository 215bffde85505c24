"""Sizes follow from the VAE and the patch: other factors than 8, and sides that the stock pipeline rounds down."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_more
import tiny_variants
import torch
from diffusers import AutoencoderKLWan

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.families import find
from diffaccel.samplers import BoN, Euler, Scheduler

LEVELS = {1: 1, 2: 2, 4: 3, 8: 4, 16: 5}
CELLS = 4  # sides of pictures in patches of 2 latents


def vae_of(factor: int, channels: int = 4) -> Any:
    levels = LEVELS[factor]
    torch.manual_seed(0)
    options = {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1} if channels == 4 else {}
    return tiny._stir(
        tiny._vae(
            4, block_out_channels=(4,) * levels, down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels, **options,
        )
    )  # fmt: skip


def with_factor(pipe: Any, factor: int) -> Any:
    options = {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
    if "StableDiffusionXL" in type(pipe).__name__:
        options["add_watermarker"] = False
    other = type(pipe)(**{**pipe.components, "vae": vae_of(factor)}, **options)
    other.set_progress_bar_config(disable=True)
    return other


def draw(pipe: Any, arguments: dict[str, Any], **changes: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    return pipe(**{**arguments, "output_type": "pt", "generator": generators, **changes}).images


def check(pipe: Any, arguments: dict[str, Any], shape: tuple[int, int]) -> None:
    """Compare samplers that are the stock rule with the stock call, in pixels."""
    stock = draw(pipe, arguments)
    assert stock.shape[-2:] == shape
    for config in (Euler(), Scheduler()):
        diffaccel.accelerate(pipe, config)
        assert torch.equal(draw(pipe, arguments), stock), config
        diffaccel.remove(pipe)


@pytest.mark.parametrize(
    ("name", "factor"),
    [(name, factor) for name in tiny.FAMILIES for factor in LEVELS if name in ("flux", "sd") or factor in (1, 16)],
)
def test_any_factor_of_the_vae(name: str, factor: int) -> None:
    side = max(8, 2 * CELLS * factor)
    pipe = with_factor(tiny.make(name), factor)
    check(pipe, tiny.call_kwargs(name, size=side, steps=2), (side, side))
    assert find(pipe).multiple(pipe) == {"flux": 2 * factor, "sd3": 2 * factor}.get(name, max(8, factor))


@pytest.mark.parametrize("factor", [2, 16])
@pytest.mark.parametrize("name", ["pixart", "hunyuan"])
def test_any_factor_of_other_families(name: str, factor: int) -> None:
    pipe = tiny_more.make(name)
    if name == "pixart":
        pipe = with_factor(pipe, factor)
    else:
        pipe.vae_scale_factor_spatial = factor  # latents out: its VAE is not called
    side = 2 * CELLS * factor

    def latents() -> torch.Tensor:
        return tiny_more.result(pipe(**tiny_more.call_kwargs(name, size=side, steps=2)))

    stock = latents()
    assert stock.shape[-2:] == (2 * CELLS, 2 * CELLS)
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(latents(), stock)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1, 4, 16])
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_any_factor_of_the_vae_from_an_image(name: str, factor: int) -> None:
    side = 6 * factor  # no multiple of 8
    pipe = with_factor(tiny_variants.img2img(name), factor)
    check(pipe, tiny_variants.img2img_kwargs(name, size=side, steps=3), (side, side))


@pytest.mark.parametrize(
    ("name", "factor", "asked", "drawn"),
    [
        ("flux", 8, (72, 40), (64, 32)), ("flux", 4, (18, 23), (16, 16)), ("flux", 1, (9, 8), (8, 8)),
        ("sd", 16, (72, 40), (64, 32)), ("sdxl", 16, (40, 64), (32, 64)),
    ],
)  # fmt: skip
def test_sides_are_rounded_as_the_stock_pipeline_rounds_them(
    name: str, factor: int, asked: tuple[int, int], drawn: tuple[int, int]
) -> None:
    pipe = with_factor(tiny.make(name), factor)
    arguments = tiny.call_kwargs(name, steps=2) | {"height": asked[0], "width": asked[1]}
    check(pipe, arguments, drawn)
    with diffaccel.open_session(pipe, **arguments) as session:
        assert (session.height, session.width) == drawn
    diffaccel.accelerate(pipe, BoN(reward="compress", budget=4))
    assert draw(pipe, arguments).shape[-2:] == drawn


@pytest.mark.parametrize(("factor", "side"), [(8, 48), (16, 48), (4, 32)])
def test_wan_is_rounded_by_its_own_factor(factor: int, side: int) -> None:
    pipe = tiny_more.make("wan")
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        scale_factor_spatial=factor,
    )  # fmt: skip
    pipe = type(pipe)(**{**pipe.components, "vae": vae})
    pipe.set_progress_bar_config(disable=True)
    stock = pipe(**tiny_more.call_kwargs("wan", size=side, steps=2)).frames
    assert stock.shape[-1] == side // (2 * factor) * 2
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(pipe(**tiny_more.call_kwargs("wan", size=side, steps=2)).frames, stock)


def test_a_size_that_leaves_nothing_is_refused() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Euler())
    with pytest.raises(DiffAccelError, match=r"The size 8x40 does not fit .* nearest valid size is 16x32"):
        draw(pipe, tiny.call_kwargs("flux") | {"height": 40, "width": 8})


def test_pixart_draws_any_size_at_the_nearest_of_its_table() -> None:
    pipe = tiny_more.make("pixart")
    pipe.transformer.register_to_config(sample_size=32)
    arguments = tiny_more.call_kwargs("pixart", steps=1, batch=1) | {"use_resolution_binning": True}
    arguments |= {"height": 250, "width": 250, "output_type": "pt"}

    def picture() -> torch.Tensor:
        return pipe(**{**arguments, "generator": torch.Generator().manual_seed(0)}).images

    stock = picture()
    diffaccel.accelerate(pipe, Scheduler())
    assert stock.shape[-2:] == (250, 250) and torch.equal(picture(), stock)
