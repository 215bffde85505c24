"""Searches that fill a hole: fresh noise for every particle, and what the plain call keeps is kept to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_variants
import torch
from PIL import Image
from search_bed import latent_reward
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR, VE_PATH
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, Drafts, SoP
from diffaccel.samplers.search import report
from diffaccel.samplers.search.kept_region import KeptRegion, carried_noise
from diffaccel.samplers.search.transitions import cps, forward

OLD = "StableDiffusionInpaintPipeline"
BLENDED, CHANNELS = ["flux", "sd3", "sdxl", OLD], ["sdxl9", "fill"]
STEPS = 4


def reward() -> Any:
    return latent_reward(lambda x0: x0.flatten(1).mean(1))


def make(case: str) -> Any:
    return tiny_variants.mixture(case) if case == OLD else tiny_variants.inpaint(case)


def arguments(case: str, strength: float = 1.0, batch: int = 1, **changes: Any) -> dict[str, Any]:
    kwargs = tiny_variants.mixture_kwargs if case == OLD else tiny_variants.inpaint_kwargs
    return {**kwargs(case, strength=strength, steps=STEPS, batch=batch), **changes}


def searched(pipe: Any, config: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    diffaccel.accelerate(pipe, config)
    try:
        return pipe(**kwargs).images, diffaccel.summary(pipe).last_run
    finally:
        diffaccel.remove(pipe)


def kept_of(pipe: Any, **kwargs: Any) -> KeptRegion:
    with diffaccel.open_session(pipe, **kwargs) as session:
        kept = KeptRegion.of(session)
    assert kept is not None
    return kept


def spatial(kept: KeptRegion, latents: Tensor) -> Tensor:
    session = kept.session
    return session.family.spatial(session.pipe, latents, session.height, session.width)


@pytest.mark.parametrize(
    ("case", "strength"), [(case, 0.5 + 0.5 * (i % 2)) for i, case in enumerate([*BLENDED, *CHANNELS])]
)
def test_one_sample_is_the_call_without_a_search_to_the_bit(case: str, strength: float) -> None:
    """The reward sees it as it comes back."""
    pipe, seen, steps = make(case), [], int(STEPS * strength)

    def call() -> dict[str, Any]:
        return arguments(case, strength, batch=2, output_type="pt")

    def look(images: Tensor, prompts: Any) -> Tensor:
        seen.append(images.clone())
        return images.flatten(1).mean(1)

    stock = pipe(**call()).images
    before = set(vars(pipe)), set(vars(pipe.scheduler))
    images, run = searched(pipe, BoN(reward=look, budget=steps), **call())
    assert torch.equal(images, stock)
    torch.testing.assert_close(torch.cat(seen), stock, rtol=0, atol=1e-5)
    assert run["path"] == "native" and run["report"]["search"]["pictures"][0]["nfe"] == steps
    assert torch.equal(pipe(**call()).images, stock), "removed"
    assert (set(vars(pipe)), set(vars(pipe.scheduler))) == before


QUICK = [
    RBF(budget=24, initial=2), SoP(budget=40, particles=1),
    SVDD.paper(budget=16, tail_steps=0, path="vp", stages=3), Drafts(budget=40, drafts=3, draft="steps:2"),
]  # fmt: skip
OTHERS = [
    BoN(budget=12, wave=2), RBF(budget=24, initial=2, path="vp", stages=4, kernel="em"), SVDD(budget=24, particles=2),
    CoDe(budget=24, particles=2), SMC(budget=16, path="linear"), Drafts(budget=60, drafts=3, draft="heun"),
]  # fmt: skip


@pytest.mark.parametrize(
    "config", [*QUICK, *(pytest.param(config, marks=pytest.mark.slow) for config in OTHERS)],
    ids=lambda config: f"{config.name}-{getattr(config, 'path', getattr(config, 'draft', ''))}",
)  # fmt: skip
def test_every_search_keeps_what_the_plain_call_keeps(config: Any) -> None:
    """The latents outside of the hole are those of the plain call to the bit, and inside of it mostly others."""
    pipe, call = tiny_variants.inpaint("flux"), arguments("flux", 0.8, output_type="latent")
    stock = pipe(**call).images
    kept = kept_of(pipe, **arguments("flux", 0.8))
    high = latent_reward(lambda x0: x0.flatten(1).square().mean(1))
    latents, run = searched(pipe, replace(config, reward=high), **arguments("flux", 0.8, output_type="latent"))
    found, plain = spatial(kept, latents), spatial(kept, stock)
    outside = kept.mask == 0
    assert outside.any() and (~outside).any()
    assert torch.equal(found[outside], plain[outside]) and torch.equal(found[outside], kept.clean[outside])
    assert not torch.equal(found[~outside], plain[~outside])
    assert run["report"]["search"]["pictures"][0]["nfe"] <= config.budget


@pytest.mark.parametrize("case", [pytest.param("sd3", marks=pytest.mark.slow), "sdxl", OLD])
def test_a_search_keeps_the_picture_outside_of_the_hole(case: str) -> None:
    """Also in batches of one row, guided by the reward's gradient, on a variance-exploding and a preserving path."""
    pipe, call = make(case), arguments(case, output_type="latent")
    pipe.scheduler = tiny.ddim() if case == "sdxl" else pipe.scheduler
    kept = kept_of(pipe, **arguments(case))
    soft = latent_reward(lambda x0: -(x0 - 1).square().flatten(1).mean(1), differentiable=True)
    config = SMC(reward=soft, budget=12, guide=0.5, temperature=1.0, max_batch=1)
    latents, _ = searched(pipe, config, **call)
    outside = (kept.mask == 0).expand_as(kept.clean)
    assert torch.equal(spatial(kept, latents)[outside], kept.clean[outside])


# -- the rule, in closed form ------------------------------------------------------------------------------------------


class Levels:
    """The part of a session that the rule reads."""

    def __init__(self, path: Any) -> None:
        self.path, self.sigmas = path, torch.tensor([1.0, 0.5, 0.0])
        self.schedule = type("Schedule", (), {"state_scale": staticmethod(lambda sigma: 1.0)})


@pytest.mark.parametrize("path", [LINEAR, VE_PATH], ids=["linear", "ve"])
def test_a_network_that_knows_the_kept_region_is_not_changed(path: Any) -> None:
    """``put_back(a x + b v + c z)`` is ``a x + b v + c z`` where ``x`` and ``v`` are those of x0 and eps."""
    draw = torch.Generator().manual_seed(0)
    clean, eps, z = (torch.randn(3, 2, 4, 4, generator=draw) for _ in range(3))
    kept = KeptRegion(torch.zeros(3, 1, 4, 4), clean, eps, Levels(path))  # type: ignore[arg-type]
    kernels = [cps(path, 0.9, 0.6, 0.0), cps(path, 0.9, 0.6, 0.35), forward(path, 0.5, 0.8)]
    begin, end = [0.9, 0.9, 0.5], torch.tensor([0.6, 0.6, 0.8])
    sigma, a, b, c = (torch.tensor(column).reshape(3, 1, 1, 1) for column in (begin, *zip(*kernels, strict=True)))
    state = a * path.mix(clean, eps, sigma) + b * path.velocity(clean, eps, sigma) + c * z
    noise = carried_noise(eps, begin, kernels, z)
    torch.testing.assert_close(kept.put_back(state + 5, end, noise, range(3)), state, rtol=0, atol=2e-6)
    assert torch.equal(noise[0], eps[0]), "no fresh noise"
    assert carried_noise(eps, begin, kernels, None) is eps
    many = carried_noise(*(torch.randn(1, 100_000, generator=draw) for _ in range(1)), [0.9], [kernels[1]],
                         torch.randn(1, 100_000, generator=draw))  # fmt: skip
    assert abs(float(many.var()) - 1) < 0.02


def test_at_the_last_level_the_image_comes_back_without_noise() -> None:
    clean, noise = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(2, 1, 2, 2)
    kept = KeptRegion(mask, clean, noise, Levels(LINEAR))  # type: ignore[arg-type]
    x = torch.randn(2, 1, 2, 2)
    mixed = kept.put_back(x, torch.tensor([0.5, 0.0]), noise, [0, 1])
    assert torch.equal(mixed[0], (1 - mask[0]) * (0.5 * clean[0] + 0.5 * noise[0]) + mask[0] * x[0])
    assert torch.equal(mixed[1], torch.where(mask[1] > 0, x[1], clean[1]))
    assert torch.equal(kept.put_back(x, torch.tensor(0.0), None, [0, 1]), torch.where(mask > 0, x, clean))


# -- resumed, scored, refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        RBF(budget=16, initial=2, begin=0.0, beam=1),
        pytest.param(Drafts(budget=40, drafts=3, draft="steps:2"), marks=pytest.mark.slow),
    ],
    ids=lambda config: config.name,
)
def test_a_killed_search_ends_as_one_that_was_not(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "plot", lambda *_: None)
    pipe, asked = tiny_variants.inpaint("flux"), []

    def counted(last: int) -> Any:
        def score(x0: Tensor) -> Tensor:
            asked.append(len(x0))
            if len(asked) == last:
                raise KeyboardInterrupt("killed")
            return x0.flatten(1).mean(1)

        return latent_reward(score, identity="the mean")

    whole, _ = searched(pipe, replace(config, reward=counted(0), folder=str(tmp_path / "whole")), **arguments("flux"))
    calls = len(asked)
    asked.clear()
    cut = replace(config, reward=counted(calls - 1), folder=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        searched(pipe, cut, **arguments("flux"))
    asked.clear()
    resumed, run = searched(pipe, replace(cut, reward=counted(0)), **arguments("flux"))
    assert torch.equal(resumed, whole) and len(asked) < calls
    assert run["report"]["resumed"]["rounds"] > 0


def test_with_a_padded_crop_the_whole_picture_is_scored() -> None:
    """What the reward sees of the best is the picture that comes back, the crop laid into the image."""
    pipe, seen = tiny_variants.inpaint("sd3"), []

    def look(images: Tensor, prompts: Any) -> Tensor:
        seen.append(images.clone())
        return images.flatten(1).mean(1)

    pixels = (tiny_variants.picture(64, 1)[0].permute(1, 2, 0) * 255).byte().numpy()
    hole = np.zeros((64, 64), np.uint8)
    hole[24:40, 16:36] = 255
    image, mask = Image.fromarray(pixels), Image.fromarray(hole)
    call = arguments("sd3", image=image, mask_image=mask, padding_mask_crop=4, output_type="pil")
    call["generator"] = torch.Generator().manual_seed(3)
    images, _ = searched(pipe, BoN(reward=look, budget=2 * STEPS), **call)
    shown = torch.from_numpy(np.asarray(images[0], np.float32)).permute(2, 0, 1) / 255
    scores = torch.cat(seen).flatten(1).mean(1)
    assert torch.cat(seen).shape[1:] == (3, 64, 64)
    torch.testing.assert_close(torch.cat(seen)[scores.argmax()], shown, rtol=0, atol=1e-6)
    outside = torch.from_numpy(hole == 0)
    assert torch.equal(shown[:, outside], (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255)[:, outside])
    with pytest.raises(DiffAccelError, match=r"which has no gradient\. Leave padding_mask_crop or guide out"):
        searched(pipe, SVDD(reward=look, budget=40, guide=0.1), **call)


@pytest.mark.parametrize("make", ["inpaint", "img2img"])
def test_a_draft_in_full_is_finished_as_the_plain_call(make: str) -> None:
    """Of a reward that tells nothing apart the first draft comes back, which has the call's own noise."""
    pipe, blind = getattr(tiny_variants, make)("flux"), latent_reward(lambda x0: x0.flatten(1).sum(1) * 0)

    def call() -> dict[str, Any]:
        arguments: dict[str, Any] = getattr(tiny_variants, f"{make}_kwargs")("flux", strength=0.8, steps=STEPS, batch=1)
        return arguments

    stock = pipe(**call()).images
    config = Drafts(reward=blind, budget=12, drafts=2, finish=1, draft="plain", max_batch=1)
    images, _ = searched(pipe, config, **call())
    assert torch.equal(images, stock)
    assert torch.equal(pipe(**call()).images, stock)


def test_what_cannot_be_filled_is_a_sentence() -> None:
    pipe = tiny_variants.inpaint("flux")
    half = Drafts(
        reward=reward(), budget=40, drafts=2, draft="bottleneck:preset=lightx2v,scales=[0.5,1.0],switches=[0.5]"
    )
    with pytest.raises(DiffAccelError, match="has its mask and its image at one resolution"):
        searched(pipe, half, **arguments("flux"))
    with pytest.raises(DiffAccelError, match="would begin at the noise level"):
        searched(pipe, Drafts(reward=reward(), budget=40, drafts=2, draft="heun:steps=3"), **arguments("flux", 0.75))
    with pytest.raises(DiffAccelError, match="leaves int"):
        searched(pipe, BoN(reward=reward(), budget=40), **arguments("flux", 0.1))
    sd = make(OLD)
    sd.vae.__class__ = type("AsymmetricAutoencoderKL", (type(sd.vae),), {})
    with pytest.raises(DiffAccelError, match="decodes with the masked picture beside the latents"):
        searched(sd, BoN(reward=reward(), budget=40), **arguments(OLD))
