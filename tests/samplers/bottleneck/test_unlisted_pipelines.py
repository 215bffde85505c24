"""Stages on pipelines that no family describes: each size is a call that is watched."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_others as others
import torch
from torch.utils._pytree import tree_leaves

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Bottleneck, Euler

FAST = ("z_image", "hunyuan15")  # a picture and a video
NAMES = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in ("z_image", "lumina2", "sana", "hunyuan15", "mochi", "aura_flow", "hidream")
]
TWO = Bottleneck(preset="lightx2v", scales=(0.5, 1.0))


def call(pipe: Any, name: str, **changes: Any) -> torch.Tensor:
    size = 2 * others.SIZES[name][0]
    options = {key: changes.pop(key) for key in ("batch", "guided") if key in changes}
    return others.latents_of(
        pipe(**{**others.call_kwargs(name, size=size, **options), "width": size, **changes})
    ).clone()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stages(name: str) -> None:
    pipe = others.make(name)
    stock = call(pipe, name)
    expected = call(diffaccel.accelerate(pipe, Euler()), name)
    diffaccel.accelerate(diffaccel.remove(pipe), Bottleneck(preset="speed", scales=(1.0,)))
    assert torch.equal(call(pipe, name), expected)
    diffaccel.accelerate(diffaccel.remove(pipe), TWO)
    drawn = call(pipe, name)
    assert drawn.shape == stock.shape and torch.isfinite(drawn).all() and not torch.equal(drawn, stock)
    side = 2 * others.SIZES[name][0]
    assert set(diffaccel.summary(pipe).last_run["nfe_by_resolution"]) == {f"{side // 2}x{side // 2}", f"{side}x{side}"}
    assert torch.equal(call(pipe, name), drawn)
    if name != "hidream":  # whose rows depend on each other in the stock call as well
        torch.testing.assert_close(call(pipe, name, batch=1), drawn[:1], rtol=1e-3, atol=1e-3)
    assert torch.equal(call(diffaccel.remove(pipe), name), stock)


def test_a_second_size_is_a_fresh_call_of_it() -> None:
    """The network is asked at 32x32 what a plain call of that size asks it."""
    pipe = others.make("z_image")
    asked: list[Any] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, kw: asked.append((a, kw)), with_kwargs=True)
    diffaccel.accelerate(pipe, Bottleneck(preset="lightx2v", scales=(0.5, 1.0), noise="fresh"))
    call(pipe, "z_image")
    low, asked[:] = asked[0], []
    diffaccel.remove(pipe)
    pipe(**others.call_kwargs("z_image", size=32))
    handle.remove()
    tensors = [[x for x in tree_leaves(values) if isinstance(x, torch.Tensor)] for values in (low, asked[0])]
    assert len(tensors[0]) > 4 and all(map(torch.equal, *tensors))


def test_the_preset_of_few_steps() -> None:
    """Pixels are not known between steps, so that 'auto' is 'speed'."""
    pipe = others.make("z_image")
    few = call(diffaccel.accelerate(pipe, Bottleneck()), "z_image")
    assert torch.equal(call(diffaccel.accelerate(diffaccel.remove(pipe), Bottleneck(preset="speed")), "z_image"), few)
    diffaccel.accelerate(diffaccel.remove(pipe), Bottleneck(preset="selflift-zero"))
    with pytest.raises(DiffAccelError, match="pictures of listed pipelines"):
        call(pipe, "z_image")


@pytest.mark.parametrize("name", ["chroma", "kandinsky5"])
def test_latents_without_rows_and_columns_are_refused(name: str) -> None:
    pipe = diffaccel.accelerate(others.make(name), TWO)
    with pytest.raises(DiffAccelError, match="without rows and columns that are known here"):
        call(pipe, name)
    euler = call(diffaccel.accelerate(diffaccel.remove(pipe), Euler()), name)
    diffaccel.accelerate(diffaccel.remove(pipe), Bottleneck(preset="speed", scales=(1.0,)))
    assert torch.equal(call(pipe, name), euler)  # one stage asks for no rows


def test_a_size_that_the_pipeline_itself_refuses() -> None:
    pipe = diffaccel.accelerate(others.make("sana"), TWO)
    with pytest.raises(DiffAccelError, match="does not draw at 16x16, the size of a stage of a call of 32x32"):
        pipe(**others.call_kwargs("sana", size=32))
