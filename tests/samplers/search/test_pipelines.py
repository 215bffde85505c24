"""Searches on tiny pipelines of every kind: exact limits, what they cost, and what they leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_more
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from search_bed import latent_reward
from torch import Tensor

import diffaccel
from diffaccel.samplers import RBF, SMC, SVDD, Ancestral, BoN, CoDe, SoP
from diffaccel.samplers.search import scoring

STEPS = 5


def bright(x0: Tensor) -> Tensor:
    return x0.flatten(1).mean(1)


def reward() -> Any:
    return latent_reward(bright)


def call(family: str, **changes: Any) -> dict[str, Any]:
    kwargs = tiny.call_kwargs if family in tiny.FAMILIES else tiny_more.call_kwargs
    return {**kwargs(family, steps=STEPS), **changes}


def make(family: str, **parts: Any) -> Any:
    return (tiny if family in tiny.FAMILIES else tiny_more).make(family, **parts)


def run(pipe: Any, family: str, **changes: Any) -> Tensor:
    return tiny_more.result(pipe(**call(family, **changes)))


def searched(pipe: Any, config: Any, family: str, **changes: Any) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """The result, what it cost, and the search's report."""
    diffaccel.accelerate(pipe, config)
    try:
        found = run(pipe, family, **changes)
        cost = diffaccel.summary(pipe).last_run
    finally:
        diffaccel.remove(pipe)
    return found, cost, cost["report"]["search"]


FAMILIES = ["flux", "sd3", "sdxl", "sd", "wan", "pixart"]
METHODS = [
    RBF(reward=reward(), budget=40, particles=2, initial=3, chunk=4, path="vp", stages=4),
    RBF(reward=reward(), budget=40, particles=2, initial=3, chunk=4, path="linear"),
    SVDD(reward=reward(), budget=40, particles=2, path="native"),
    CoDe(reward=reward(), budget=40, particles=2, path="linear", kernel="em", norm=0.5),
    SMC(reward=reward(), budget=40, path="native", temperature=0.05),
    SoP(reward=reward(), budget=40, particles=1),
    BoN(reward=reward(), budget=40),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_sample_is_the_pipeline_s_own_to_the_bit(family: str) -> None:
    """Best of one is the call without a search; and the call without it afterwards is as before."""
    first_order = {"wan": FlowMatchEulerDiscreteScheduler(shift=3.0), "pixart": tiny.ddim()}
    pipe = make(family, **({"scheduler": first_order[family]} if family in first_order else {}))
    stock = run(pipe, family)
    found, cost, report = searched(pipe, BoN(reward=reward(), budget=STEPS), family)
    if family == "pixart":  # DDIM's own arithmetic is on another path
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, stock)
    assert (cost["nfe"], report["pictures"][0]["nfe"]) == (2 * STEPS, STEPS)
    assert report["final_sample_kind"] == "t0"
    assert torch.equal(run(pipe, family), stock)


@pytest.mark.parametrize("config", METHODS, ids=lambda c: f"{c.name}-{getattr(c, 'path', '')}")
@pytest.mark.parametrize(
    "family", ["flux", pytest.param("sd", marks=pytest.mark.slow), pytest.param("wan", marks=pytest.mark.slow)]
)
def test_every_method_runs_within_its_budget(family: str, config: Any) -> None:
    pipe = make(family)
    found, cost, report = searched(pipe, config, family)
    assert bool(torch.isfinite(found).all())
    pictures = report["pictures"]
    assert cost["nfe"] == sum(picture["nfe"] for picture in pictures)
    for picture in pictures:
        assert 40 - 20 < picture["nfe"] <= 40
        assert picture["prompt"] != ""
    assert torch.equal(run(pipe, family), run(make(family), family)), "after removal"
    again = searched(make(family), config, family)
    assert torch.equal(again[0], found)
    assert again[2] == report


def rewards_of(latents: Tensor, family: str, pipe: Any) -> list[float]:
    """The reward of a call's result, which it gives in the pipeline's own layout."""
    if family == "flux":
        latents = pipe._unpack_latents(latents, 32, 32, pipe.vae_scale_factor)
    return bright(latents).tolist()


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_the_best_of_many_is_never_worse_than_the_call_itself(family: str) -> None:
    pipe = make(family)
    plain = rewards_of(run(pipe, family), family, pipe)
    found, _, report = searched(pipe, BoN(reward=reward(), budget=8 * STEPS, keep=7), family)
    best = rewards_of(found, family, pipe)
    for i, picture in enumerate(report["pictures"]):
        assert picture["rewards"][0] == pytest.approx(best[i], abs=1e-6) == picture["reward"]
        assert len(picture["rewards"]) == 8
        assert picture["rewards"] == sorted(picture["rewards"], reverse=True)
        assert min(abs(s - plain[i]) for s in picture["rewards"]) < 1e-5, "the call's own sample is one of them"
        assert best[i] >= plain[i] - 1e-5


def test_the_first_noise_is_the_call_s_own() -> None:
    """The first of a chain's noises are the latents that the pipeline drew."""
    seen: list[Tensor] = []

    def watch(x0: Tensor) -> Tensor:
        seen.append(x0.clone())
        return bright(x0)

    config = SVDD(reward=latent_reward(watch), budget=2 * STEPS, particles=1, path="native")
    pipe = make("flux")
    searched(pipe, config, "flux")
    firsts: list[Tensor] = []

    def keep(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        firsts.append(given["latents"])
        return {}

    noise = torch.stack([torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    diffaccel.accelerate(pipe, Ancestral(eta=0.0))
    run(pipe, "flux", callback_on_step_end=keep)
    sigma, sigma_next = 1.0, pipe.scheduler.sigmas[1].item()
    first = pipe._unpack_latents(firsts[0], 32, 32, pipe.vae_scale_factor)
    v = (first - noise) / (sigma_next - sigma)
    torch.testing.assert_close(seen[0][::2], noise - v, rtol=0, atol=1e-5)


def test_a_chain_without_fresh_noise_is_the_pipeline_s_own_walk() -> None:
    """Norm tends to 0, the search to Euler: of children that are all equal the first goes on."""
    pipe = make("flux")
    stock = run(pipe, "flux")
    flat = latent_reward(lambda x0: torch.zeros(len(x0)))
    quiet = SVDD(reward=flat, budget=2 * STEPS, particles=1, path="linear", norm=1e-7)
    found, _, _ = searched(pipe, quiet, "flux")
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-5)


def test_pixel_models_with_unclipped_schedulers() -> None:
    pipe = tiny_more.make("ddim", clip_sample=False)
    found, _, report = searched(pipe, SVDD(reward=reward(), budget=30, particles=1), "ddim")
    assert found.shape[0] == 2 and bool(torch.isfinite(found).all())
    assert [picture["prompt"] for picture in report["pictures"]] == ["", ""]


def test_rewards_of_pictures_see_the_decoded_sample() -> None:
    """In [0, 1], of the picture's size; the best one's number is that of the picture that comes out."""
    shapes: set[tuple[int, ...]] = set()

    def red(images: Tensor, prompts: list[str]) -> Tensor:
        assert float(images.min()) >= 0 and float(images.max()) <= 1
        shapes.add(tuple(images.shape[1:]))
        return images[:, 0].flatten(1).mean(1)

    pipe = make("sd3")
    found, _, report = searched(pipe, BoN(reward=red, budget=4 * STEPS), "sd3", output_type="pt")
    assert shapes == {(3, 32, 32)}
    for image, picture in zip(found, report["pictures"], strict=True):
        assert float(image[0].mean()) == pytest.approx(picture["reward"], abs=1e-5)


def test_rewards_of_videos_see_frames_or_the_whole_clip() -> None:
    frames: list[tuple[int, ...]] = []
    clips: list[tuple[int, ...]] = []

    def of_frames(images: Tensor, prompts: list[str]) -> Tensor:
        frames.append(tuple(images.shape))
        assert len(prompts) == len(images)
        return images.flatten(1).mean(1)

    def of_clips(clip: Tensor, prompts: list[str]) -> Tensor:
        clips.append(tuple(clip.shape))
        return clip.flatten(1).mean(1)

    of_clips.input = "video"  # type: ignore[attr-defined]
    pipe = make("wan")
    by_frames, _, first = searched(pipe, BoN(reward=of_frames, budget=2 * STEPS), "wan")
    by_clips, _, second = searched(pipe, BoN(reward=of_clips, budget=2 * STEPS), "wan")
    assert torch.equal(by_frames, by_clips)
    assert frames[0][1:] == (3, 32, 32) and clips[0][1:] == (3, 5, 32, 32)
    assert frames[0][0] == 5 * clips[0][0]
    for a, b in zip(first["pictures"], second["pictures"], strict=True):
        assert a["reward"] == pytest.approx(b["reward"], abs=1e-6)


def test_few_clips_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip counts as all its frames: what fits for pictures must not run a video out of memory."""
    together: list[int] = []

    def of_clips(clips: Tensor, prompts: list[str]) -> Tensor:
        together.append(len(clips))
        return clips.flatten(1).mean(1)

    of_clips.input = "video"  # type: ignore[attr-defined]
    config = BoN(reward=of_clips, budget=4 * STEPS)
    whole, _, _ = searched(make("wan"), config, "wan")
    assert together == [8]
    together.clear()
    monkeypatch.setattr(scoring, "MAX_PIXELS", 32 * 32 * 4 * 2 * 2)  # two clips of two latents
    found, _, _ = searched(make("wan"), config, "wan")
    assert together == [2] * 4
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
