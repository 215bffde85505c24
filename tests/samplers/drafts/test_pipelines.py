"""Drafts on tiny pipelines: any registered acceleration draws them, and the pipeline is as before afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from search_bed import latent_reward
from self_contracts import redness
from torch import Tensor

import diffaccel
from diffaccel import lending
from diffaccel.errors import DiffAccelError
from diffaccel.runs.variant import parse
from diffaccel.samplers import BoN, Drafts, Euler, TaylorSeer
from diffaccel.samplers.search import noise
from diffaccel.samplers.search.particles import Key

STEPS = 4
ACCELERATIONS = [
    "plain", "steps:2", "taylorseer:interval=2,warmup=1", "spectrum:warmup=2", "seacache:threshold=1e6",
    "diffusers_cache",
    "bottleneck:preset=lightx2v,scales=[0.5,1.0],switches=[0.5]", "bottleneck:preset=speed,noise=fresh,steps=3",
    "heun", "dpmpp2m:steps=3", "ancestral", "w8a8", "w4a16", "taylorseer+w8a8:taylorseer.warmup=1", "fused_blocks",
]  # fmt: skip
QUICK = ("plain", "steps:2", "taylorseer:interval=2,warmup=1", "w8a8")


def drawn(pipe: Any, family: str = "flux", **changes: Any) -> Tensor:
    images: Tensor = pipe(**{**tiny.call_kwargs(family, steps=STEPS), **changes}).images
    return images.clone()


def searched(pipe: Any, config: Any, family: str = "flux", **changes: Any) -> tuple[Tensor, dict[str, Any]]:
    diffaccel.accelerate(pipe, config)
    try:
        return drawn(pipe, family, **changes), diffaccel.summary(pipe).last_run
    finally:
        diffaccel.remove(pipe)


@pytest.mark.parametrize(
    "draft", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ACCELERATIONS]
)
def test_any_acceleration_draws_drafts(draft: str) -> None:
    pipe = tiny.make("flux")
    stock = drawn(pipe)
    config = Drafts(reward=redness, budget=40, drafts=3, draft=draft)
    one, cost = searched(pipe, config)
    assert torch.equal(drawn(pipe), stock), "taken off"
    again, _ = searched(pipe, config)
    assert torch.equal(one, again) and bool(torch.isfinite(one).all())
    picture = cost["report"]["search"]["pictures"][0]
    assert 0 < picture["nfe"] <= 40 and picture["used"]["drafts"] >= 3
    if draft.startswith(("taylorseer", "spectrum", "seacache")):
        assert cost["caches"]["skipped_calls"] > 0, "the cache was told its steps"


@pytest.mark.parametrize("family", ["flux", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sd3", "sd", "sdxl"))])
def test_a_draft_in_full_is_finished_as_the_plain_call_of_its_seed(family: str) -> None:
    """To the bit, with one row in a network call: the call's own noise, and that of another draft."""
    latents: list[Tensor] = []
    reward = latent_reward(lambda x0: (latents.append(x0.clone()), x0.flatten(1).mean(1))[1], batch_size=99)
    pipe = tiny.make(family)
    config = Drafts(reward=reward, budget=40, drafts=3, finish=3, draft="plain", max_batch=1)
    _, cost = searched(pipe, config, family)
    pictures = cost["report"]["search"]["pictures"]
    plain, _ = searched(pipe, Euler(max_batch=1), family)
    session = _session(pipe, family)
    for row, picture in enumerate(pictures):
        finished = dict(zip(picture["decisions"][-2]["best"][:3], latents[-1][3 * row : 3 * row + 3], strict=True))
        if 0 in finished:
            assert torch.equal(_native(pipe, family, finished[0]), plain[row])
    first = pictures[0]
    other = next(i for i in first["decisions"][-2]["best"][:3] if i)
    x = noise.normal([(first["seed"], Key(other, 0, 0))], session.x.shape[1:], session.x) * noise.initial_std(session)
    begun = session.family.to_network(session.schedule.to_pipeline(x, session.sigmas[0]))
    begun = begun / getattr(pipe.scheduler, "init_noise_sigma", 1.0)  # the pipeline multiplies what it is given
    begun = session.family.wrap(begun.repeat(2, *[1] * (begun.ndim - 1)), session.conds[0].arguments)
    same, _ = searched(pipe, Euler(max_batch=1), family, latents=begun)
    place = first["decisions"][-2]["best"][:3].index(other)
    torch.testing.assert_close(_native(pipe, family, latents[-1][place]), same[0], rtol=0, atol=1e-6)


def _session(pipe: Any, family: str) -> Any:
    with diffaccel.open_session(pipe, **tiny.call_kwargs(family, steps=STEPS)) as session:
        return session


def _native(pipe: Any, family: str, x0: Tensor) -> Tensor:
    """A sample in the pipeline's own layout."""
    session = _session(pipe, family)
    rows = session.family.to_network(session.schedule.to_pipeline(x0[None], session.sigmas[-1]))
    return session.family.wrap(rows, session.conds[0].arguments)[0]


def test_the_best_draft_is_not_worse_than_the_call_s_own_sample() -> None:
    pipe = tiny.make("flux")
    _, cost = searched(pipe, Drafts(reward=redness, budget=60, drafts=4, draft="plain"))
    for picture in cost["report"]["search"]["pictures"]:
        assert picture["reward"] >= picture["own"]


@pytest.mark.slow
def test_a_cache_on_the_pipeline_stays_for_the_finish() -> None:
    pipe = tiny.make("flux")
    diffaccel.accelerate(
        pipe, TaylorSeer(interval=2, warmup=1), Drafts(reward=redness, budget=40, drafts=3, draft="w8a8")
    )
    first = drawn(pipe)
    assert torch.equal(drawn(pipe), first)
    diffaccel.remove(pipe)


@pytest.mark.parametrize(
    "draft, message",
    [
        ("bon", "'bon' cannot draw drafts"),
        ("scheduler", "'scheduler' cannot draw drafts"),
        ("superdiff", "'superdiff' cannot draw drafts"),
        ("taylor", "taylorseer"),
        ("bottleneck:scale=2", "scale"),
        ("plain:guidance=2", "changes guidance of the call"),
        ("steps:0", "0 steps; it must be at least 1"),
        ("euler+heun", "'heun' of the drafts and 'euler' cannot be active together"),
    ],
)
def test_drafts_that_cannot_be_drawn(draft: str, message: str) -> None:
    pipe = tiny.make("flux")
    stock = drawn(pipe)
    with pytest.raises(DiffAccelError, match=message):
        searched(pipe, Drafts(reward=redness, budget=40, drafts=3, draft=draft))
    assert torch.equal(drawn(pipe), stock)


def test_a_draft_that_excludes_what_is_on_the_pipeline() -> None:
    pipe = tiny.make("flux")
    diffaccel.accelerate(pipe, TaylorSeer(), Drafts(reward=redness, budget=40, drafts=3, draft="spectrum"))
    with pytest.raises(DiffAccelError, match="'spectrum' of the drafts and 'taylorseer' cannot be active together"):
        drawn(pipe)


@pytest.mark.slow
def test_a_draft_that_fails_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.make("flux")
    stock = drawn(pipe)

    def fail(images: Tensor, prompts: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(pipe, Drafts(reward=fail, budget=40, drafts=3, draft="w8a8+taylorseer"))
    assert torch.equal(drawn(pipe), stock)


def test_words_within_words() -> None:
    inner = "bottleneck:preset=speed,tolerance=0.05"
    variant = parse(f"drafts:seconds=0.15,draft=({inner}),finish=1")
    assert (variant.methods[0].seconds, variant.methods[0].finish) == (0.15, 1)
    methods, steps = lending.read(variant.methods[0].draft)
    assert (methods[0].name, methods[0].tolerance, steps) == ("bottleneck", 0.05, None)
    assert parse(variant.name).methods == variant.methods
    assert parse(parse("drafts:draft=steps:4").name).methods[0].draft == "steps:4"
    assert lending.read("steps:4") == ((), 4) and lending.read("(plain)") == ((), None)
    assert BoN.keeps_rows and Drafts.keeps_rows
