"""A sampler that yields or returns something else is named, in one sentence, under both drivers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import tiny_variants
import torch

import diffaccel
from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.session import Eval, Step


@dataclass(frozen=True, kw_only=True)
class Wrong(SamplerConfig):
    name: ClassVar[str] = "wrong"

    what: str = ""

    def sample(self, session: Any) -> Any:
        return session.x if self.what == "tensor" else wrong(session, self.what)


def wrong(session: Any, what: str) -> Any:
    x = session.x
    for sigma, sigma_next in zip(session.sigmas[:-1], session.sigmas[1:], strict=True):
        if what == "number":
            yield 1.5
        pred = yield Eval(x, sigma)
        if what == "list":
            yield [Eval(x, sigma), x]
        x = yield Step(x + (sigma_next - sigma) * pred.v, sigma_next)
    if what != "nothing":
        return x


@pytest.mark.parametrize(
    "what, why",
    [
        (
            "tensor",
            r"'wrong' gave an object of the class Tensor where a generator is needed\. Let its sample\(\) yield",
        ),
        (
            "number",
            r"'wrong' yielded an object of the class float; it may yield Eval, .*Stages, Draft, or a list of Eval\.$",
        ),
        ("list", r"'wrong' yielded an object of the class Tensor in a list; it may yield"),
        ("nothing", r"'wrong' returned None; it must return its last latents, a tensor\.$"),
    ],
)
def test_the_sampler_and_what_it_yielded_are_named(what: str, why: str) -> None:
    pipe = tiny.make("flux")
    diffaccel.accelerate(pipe, Wrong(what=what))
    with pytest.raises(DiffAccelError, match=f"The sampler {why}"):
        pipe(**tiny.call_kwargs("flux", steps=2))
    diffaccel.remove(pipe)
    stock = pipe(**tiny.call_kwargs("flux", steps=2)).images
    diffaccel.accelerate(pipe, Wrong())
    assert torch.allclose(pipe(**tiny.call_kwargs("flux", steps=2)).images, stock, atol=1e-6)


def test_in_a_pipeline_s_own_loop_too() -> None:
    pipe = tiny_variants.inpaint("sd3")
    diffaccel.accelerate(pipe, Wrong(what="number"))
    parts = {"image": tiny_variants.picture(32), "mask_image": tiny_variants.hole(32), "strength": 1.0}
    with pytest.raises(DiffAccelError, match="'wrong' yielded an object of the class float"):
        pipe(**tiny.call_kwargs("sd3"), **parts)
