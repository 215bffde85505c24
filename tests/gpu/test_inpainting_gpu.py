"""Searches of holes on a GPU: one sample is the plain call, and what the plain call keeps is kept to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_variants
import torch
from search_bed import latent_reward

import diffaccel
from diffaccel.samplers import RBF, BoN

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STEPS = 4


@pytest.mark.parametrize("case", ["flux", "sd3", "sdxl", "sdxl9", "fill"])
def test_a_hole_is_filled_as_on_a_cpu(case: str) -> None:
    pipe = tiny_variants.inpaint(case).to("cuda")
    reward = latent_reward(lambda x0: x0.flatten(1).mean(1))

    def drawn(*methods: Any) -> torch.Tensor:
        kwargs = tiny_variants.inpaint_kwargs(case, strength=1.0, steps=STEPS, batch=1)
        if not methods:
            return pipe(**kwargs).images
        diffaccel.accelerate(pipe, *methods)
        try:
            return pipe(**kwargs).images
        finally:
            diffaccel.remove(pipe)

    stock = drawn()
    torch.testing.assert_close(drawn(BoN(reward=reward, budget=STEPS)), stock, rtol=1e-4, atol=1e-4)
    searched = drawn(RBF(reward=reward, budget=24, initial=2))
    assert searched.is_cuda and bool(torch.isfinite(searched).all()) and not torch.equal(searched, stock)
    if case in ("flux", "sd3", "sdxl"):  # part of the latents is kept
        assert bool((searched == stock).any())
