"""Searches that begin at an image: fresh noise on it, at the level at which the call begins."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_variants
import torch
from search_bed import latent_reward
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, Drafts, SoP
from diffaccel.samplers.search.beginning import image_of

FAMILIES = ["flux", "sd3", "sd", "sdxl"]
STEPS, LEFT = 10, 6  # of the call, and from a strength of 0.6 on


def reward() -> Any:
    return latent_reward(lambda x0: x0.flatten(1).mean(1))


def searched(pipe: Any, config: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
    diffaccel.accelerate(pipe, config)
    try:
        images = pipe(**kwargs).images
        return images, diffaccel.summary(pipe).last_run
    finally:
        diffaccel.remove(pipe)


def arguments(family: str, **changes: Any) -> dict[str, Any]:
    return {**tiny_variants.img2img_kwargs(family, steps=STEPS), **changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_sample_is_the_call_without_a_search_to_the_bit(family: str) -> None:
    pipe = tiny_variants.img2img(family)
    stock = pipe(**arguments(family)).images
    images, run = searched(pipe, BoN(reward=reward(), budget=LEFT), **arguments(family))
    assert torch.equal(images, stock)
    assert run["report"]["search"]["pictures"][0]["nfe"] == LEFT
    assert "add_noise" not in vars(pipe.scheduler) and "scale_noise" not in vars(pipe.scheduler)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_states_are_fresh_noise_on_the_image(family: str) -> None:
    """Their mean over many is ``alpha`` times the image's latents, and their spread ``sigma``, as those of the call."""
    pipe = tiny_variants.img2img(family)
    seen: list[Tensor] = []
    with diffaccel.open_session(pipe, **arguments(family)) as session:
        clean, begin = image_of(BoN(), session), session.sigmas[0]
        assert clean is not None
        sampling = SMC(reward=reward(), budget=400 * LEFT, max_batch=10**6).sample(session)
        event = next(sampling)
        while not hasattr(event, "x"):
            event = sampling.send(None)
        seen.append(event.x)
        sampling.close()
    rows = event.rows
    for row in range(len(session.x)):
        own = event.x[[i for i, r in enumerate(rows) if r == row]]
        assert torch.equal(own[0], session.x[row])
        noise = (own[1:] - session.path.alpha(begin) * clean[row]) / session.path.sigma(begin)
        assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02
        assert float(noise.mean(0).abs().max()) < 6 / len(noise) ** 0.5


@pytest.mark.parametrize(
    "config",
    [
        RBF(reward=reward(), budget=60, initial=2), RBF(reward=reward(), budget=60, initial=2, path="vp", stages=4),
        SVDD(reward=reward(), budget=60, particles=2), CoDe.paper(reward=reward(), budget=60),
        SMC(reward=reward(), budget=60, path="linear"), SoP(reward=reward(), budget=60, particles=1),
    ],
    ids=lambda config: f"{config.name} {getattr(config, 'path', '')}",
)  # fmt: skip
def test_every_search_stays_at_the_image(config: Any) -> None:
    """A low strength leaves less of a difference between the result and the image's own latents."""
    pipe, distances = tiny_variants.img2img("flux"), []
    for strength in (0.2, 0.9):
        kwargs = arguments("flux", strength=strength, output_type="latent")
        with diffaccel.open_session(pipe, **kwargs) as session:
            clean = image_of(config, session)
        assert clean is not None
        images, run = searched(pipe, config, **kwargs)
        assert run["report"]["search"]["pictures"][0]["nfe"] <= 60
        with diffaccel.open_session(pipe, **kwargs) as session:
            found = session.family.spatial(pipe, session.family.unwrap(images, {}), session.height, session.width)
        distances.append(float((found - clean).norm()))
    assert distances[0] < distances[1]


def test_what_cannot_begin_at_an_image() -> None:
    pipe = tiny_variants.img2img("sd")
    with diffaccel.open_session(pipe, **arguments("sd")) as session:
        session.noised = None
        with pytest.raises(DiffAccelError, match="what StableDiffusionImg2ImgPipeline mixes with its noise cannot be"):
            image_of(BoN(), session)
    with diffaccel.open_session(pipe, **arguments("sd")) as session:
        assert session.noised is not None
        session.noised = session.noised[0] + 1, session.noised[1]
        with pytest.raises(DiffAccelError, match="cannot be told"):
            image_of(BoN(), session)
    resized = "bottleneck:preset=lightx2v,scales=[0.5,1.0],switches=[0.5]"
    with pytest.raises(DiffAccelError, match="at another resolution begin at pure noise"):
        searched(pipe, Drafts(reward=reward(), budget=40, draft=resized), **tiny_variants.img2img_kwargs("sd", 64))
    text = tiny.make("sd")
    with diffaccel.open_session(text, **tiny.call_kwargs("sd")) as session:
        assert image_of(BoN(), session) is None
