"""What a search refuses, in one sentence that says what to do, and how it ends when it is stopped."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_more
import torch
from analytic import BIMODAL
from search_bed import Found, found, latent_reward, plan, play, stand_in
from torch import Tensor

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, SoP
from diffaccel.samplers.search.scoring import PictureScorer

LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.35, 0.15, 0.0])


def score(x0: Tensor) -> Tensor:
    return x0.flatten(1).double().sum(1)


def search(config: Any, reward: Any = score, **options: Any) -> Found:
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    config = replace(config, reward=reward if not callable(reward) else latent_reward(reward, **options))
    return found(config, stand_in(x, LEVELS), lambda x, sigma: BIMODAL.velocity(LINEAR, x, sigma))


# -- budgets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, tail, least",
    [
        (RBF(particles=2, initial=5), 0, 2 * (5 + 7)),
        (RBF(particles=3, initial=2), 4, 3 * (2 + 7 + 4)),
        (RBF(particles=1, initial=1), 0, 1 + 7),
        (SVDD(particles=3), 4, 3 * (2 * 8 + 4)),
        (CoDe(particles=2), 4, 2 * (2 * 8 + 4)),
        (SMC(), 4, 2 * (8 + 4)),
        (SoP(particles=2, walk=4), 0, 2 * 2 * 4 * 5),
        (BoN(), 0, 8),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_budget_that_is_too_small_names_the_least(config: Any, tail: int, least: int) -> None:
    levels = plan(8, tail)
    with pytest.raises(DiffAccelError, match=rf"\b{least}\b") as caught:
        play(config, least - 1, levels, lambda move: 0.0)
    assert f"{least - 1} NFE" in str(caught.value)
    played = play(config, least, levels, lambda move: 0.0)
    assert played.search.samples[0].end
    assert played.search.ledger.nfe <= least


def test_children_that_would_all_be_equal_are_refused() -> None:
    for config in (RBF(budget=90, particles=1, norm=0.0), SVDD(budget=90, norm=0.0), SMC(budget=90, norm=0.0)):
        with pytest.raises(DiffAccelError, match=r"all children are equal\. Raise norm"):
            search(replace(config, path="linear"))


def test_one_level_is_no_search() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(DiffAccelError, match=r"at least 2 noise levels, and this one has 1.*more num_inference_steps"):
        found(SVDD(reward=latent_reward(score)), stand_in(x, torch.tensor([1.0, 0.0])), lambda x, sigma: x)


@pytest.mark.parametrize(
    "make, why",
    [
        (lambda: RBF(budget=0), r"RBF\.budget is 0; it must be at least 1"),
        (lambda: RBF(initial=-1), r"RBF\.initial is -1; it must be at least 0"),
        (lambda: RBF(beam=0), r"RBF\.beam is 0; it must be at least 1"),
        (lambda: RBF(begin=1.0), r"RBF\.begin is 1\.0; it is a share of the levels"),
        (lambda: RBF(chunk=0), r"RBF\.chunk is 0"),
        (lambda: RBF(cap=-2), r"RBF\.cap is -2; it must be at least -1"),
        (lambda: RBF(rule="threshold"), "needs a threshold"),
        (lambda: SVDD(stages=1), r"SVDD\.stages is 1; it must be at least 2"),
        (lambda: SVDD(temperature=-1.0), r"SVDD\.temperature is -1\.0"),
        (lambda: SVDD(path="linear", scale="ancestral", kernel="em"), "ancestral noise.*is of the kernel 'cps'"),
        (lambda: SVDD(path="native", kernel="em"), "the path 'native' has, is of the kernel 'cps'. Set kernel='cps'"),
        (lambda: CoDe(block=0), r"CoDe\.block is 0"),
        (lambda: SMC(temperature=0.0), "temperature is 0.0; it must be positive"),
        (lambda: SMC(resample=1.5), r"resample is 1\.5; it must lie in \[0, 1\]"),
        (lambda: SoP(forward=0.9, backward=0.8), "forward < backward"),
        (lambda: SoP(seed_level=0.5), "to at most 1"),
        (lambda: BoN(wave=0), r"BoN\.wave is 0"),
        (lambda: BoN(keep=-1), r"BoN\.keep is -1"),
        (lambda: BoN(guide=-1.0), r"BoN\.guide is -1"),
        (lambda: BoN(state="stock"), "a search keeps its states in 'float32'"),
    ],
)
def test_options_out_of_range(make: Any, why: str) -> None:
    with pytest.raises(DiffAccelError, match=why):
        make()


# -- rewards ---------------------------------------------------------------------------------------------------------


def test_a_reward_that_fails_is_named() -> None:
    def broken(x0: Tensor) -> Tensor:
        raise ValueError("no such thing")

    with pytest.raises(DiffAccelError, match=r"'closed form' failed \(ValueError: no such thing\)"):
        search(SVDD(budget=60, particles=2), broken)


def test_a_reward_of_another_length_is_refused() -> None:
    with pytest.raises(DiffAccelError, match="must return one number an image"):
        search(SVDD(budget=60, particles=2), lambda x0: score(x0)[:-1])


def test_a_reward_that_never_works_ends_the_search() -> None:
    with pytest.raises(DiffAccelError, match="returned NaN for every image"):
        search(SVDD(budget=60, particles=2), lambda x0: score(x0) * torch.nan)


@pytest.mark.parametrize(
    "config",
    [
        RBF(budget=70, particles=2, initial=3, path="linear", norm=1.5), SVDD(budget=60, particles=2),
        SVDD(budget=60, particles=2, temperature=0.3), CoDe(budget=60, particles=2), SMC(budget=60), BoN(budget=60),
        SoP(budget=60, particles=1, walk=2),
    ],
    ids=lambda c: c.name,
)  # fmt: skip
def test_a_picture_without_a_reward_is_never_chosen(config: Any, caplog: pytest.LogCaptureFixture) -> None:
    """NaN is the worst reward, with one warning; the search goes on with the others."""
    caplog.set_level(logging.WARNING)

    def some(x0: Tensor) -> Tensor:
        return torch.where((1000 * score(x0)).floor() % 3 == 0, torch.nan, score(x0))

    run = search(config, some)
    assert all(picture["reward"] > -torch.inf for picture in run.pictures)
    assert bool(torch.isfinite(run.x).all())
    assert len([r for r in caplog.records if "NaN counts as the worst" in r.getMessage()]) == 1


def test_a_reward_that_tells_nothing_apart_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """And a single sample has nothing to be told apart from."""
    caplog.set_level(logging.WARNING)
    search(SVDD(budget=60, particles=2), lambda x0: torch.full((len(x0),), 0.25))
    assert "was 0.25 for all that the search of 2 of 2 pictures saw" in caplog.text
    caplog.clear()
    search(SVDD(budget=60, particles=2))
    assert not caplog.records
    search(BoN(budget=6))
    assert [record.getMessage() for record in caplog.records] == [
        "BoN: a budget of 6 NFE is one sample of 6 steps, so there is nothing to choose from. Give at least 12."
    ]


def test_guidance_needs_gradients() -> None:
    with pytest.raises(DiffAccelError, match="has no gradients"):
        search(SVDD(budget=60, particles=2, guide=0.1))


def test_guidance_follows_the_gradient() -> None:
    """``x0 + guide grad r``: of the sum of a row, its ones; every prediction and the sample move by it."""
    soft = SVDD(budget=12, particles=1, path="linear", norm=0.3)
    for config in (soft, BoN(budget=6), SoP(budget=60, particles=1, walk=2)):
        better = search(replace(config, guide=0.05), differentiable=True)
        for a, b in zip(better.pictures, search(config).pictures, strict=True):
            assert a["reward"] > b["reward"]
            assert a["scored"] >= a["nfe"] + 1, "every prediction is scored for its gradient"


# -- calls of pipelines ------------------------------------------------------------------------------------------------


def reward() -> Any:
    return latent_reward(lambda x0: x0.flatten(1).mean(1))


def test_a_reward_of_texts_and_a_call_of_embeddings() -> None:
    pipe = tiny.make("sd")
    with torch.no_grad():
        embeds = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(0))
    kwargs = {k: v for k, v in tiny.call_kwargs("sd").items() if k not in ("prompt", "negative_prompt")}
    kwargs |= {"prompt_embeds": embeds, "negative_prompt_embeds": -embeds}
    needy = latent_reward(lambda x0: x0.flatten(1).mean(1), needs_prompts=True)
    diffaccel.accelerate(pipe, SVDD(reward=needy, budget=20, particles=1))
    with pytest.raises(DiffAccelError, match="reads the prompt, and this call has none: pass `prompt`"):
        pipe(**kwargs)
    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, SVDD(reward=reward(), budget=20, particles=1))
    assert bool(torch.isfinite(pipe(**kwargs).images).all())


def test_a_scheduler_that_clips_is_refused() -> None:
    pipe = tiny_more.make("ddim", clip_sample=True)
    diffaccel.accelerate(pipe, SVDD(reward=reward(), budget=20, particles=1))
    with pytest.raises(DiffAccelError, match="clip_sample=False"):
        pipe(**tiny_more.call_kwargs("ddim"))


# -- interruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize(
    "config",
    [RBF(reward=reward(), budget=60, particles=2, initial=3, chunk=2), CoDe(reward=reward(), budget=60, particles=2),
     RBF(reward=reward(), budget=60, particles=2, initial=3, beam=2, begin=0.6, chunk=2),
     SVDD(reward=reward(), budget=40, particles=2),
     BoN(reward=reward(), budget=100, wave=2), SMC(reward=reward(), budget=40)],
    ids=lambda c: c.name,
)  # fmt: skip
def test_the_best_so_far_is_given_when_the_user_stops(config: Any, after: int) -> None:
    """What was predicted in the last round counts too."""
    pipe, seen = tiny.make("flux"), []

    def watch(x0: Tensor) -> Tensor:
        rewards = x0.flatten(1).mean(1)
        seen.append(rewards.max().item())
        if len(seen) == after:
            pipe._interrupt = True
        return rewards

    diffaccel.accelerate(pipe, replace(config, reward=latent_reward(watch)))
    images = pipe(**tiny.call_kwargs("flux", steps=10)).images
    assert bool(torch.isfinite(images).all())
    report = diffaccel.summary(pipe).last_run["report"]["search"]
    assert report["interrupted"]
    assert max(p["reward"] for p in report["pictures"]) == pytest.approx(max(seen), abs=1e-6)
    assert max(p["nfe"] for p in report["pictures"]) <= config.budget
    diffaccel.remove(pipe)
    stock = tiny.make("flux")(**tiny.call_kwargs("flux", steps=4)).images
    assert torch.equal(pipe(**tiny.call_kwargs("flux", steps=4)).images, stock)


def test_an_overlapped_search_stops_with_all_that_was_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PictureScorer, "elsewhere", lambda self, device: True)
    config = SVDD(budget=60, particles=2, reward=latent_reward(score))
    here = stand_in(torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5)), LEVELS)
    run = found(config, here, lambda x, sigma: BIMODAL.velocity(LINEAR, x, sigma), stop=lambda done: done >= 20)
    assert run.report["interrupted"]
    assert all(picture["reward"] is not None for picture in run.pictures)
