"""Searches by drafts on data in closed form: what is finished, what it costs, and how it goes on after a kill."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from drafts_bed import LEVELS, Outcome, call, exact, rough, search
from search_bed import latent_reward
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Drafts
from diffaccel.samplers.drafts import clock
from diffaccel.samplers.drafts.ranking import ByReward
from diffaccel.samplers.search import noise
from diffaccel.samplers.search.particles import Key
from diffaccel.session import Lent

STEPS = len(LEVELS) - 1


def total(x0: Tensor) -> Tensor:
    return x0.flatten(1).double().sum(1)


class Seen:
    """A reward that notes the latents it was given."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []
        self.reward = latent_reward(self.score, batch_size=10_000, identity="total")

    def score(self, x0: Tensor) -> Tensor:
        self.batches.append(x0.clone())
        return total(x0)


def walked(x: Tensor, begin: int = 0) -> Tensor:
    """A sample by the call's own steps."""
    for sigma, below in pairwise(LEVELS[begin:]):
        x = x + (below - sigma) * exact(x, sigma)
    return x


# -- what is finished --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [1, 3, STEPS])
def test_a_draft_in_full_is_finished_as_the_plain_sample_of_its_seed(resume: int) -> None:
    seen = Seen()
    config = Drafts(reward=seen.reward, budget=60, draft="plain", drafts=3, finish=3, resume=resume, max_batch=1)
    outcome = search(config, call(), cheap=exact)
    finished = seen.batches[-1]
    for row, picture in enumerate(outcome.pictures):
        for place, index in enumerate(picture["decisions"][-2]["best"][:3]):
            key = (picture["seed"], Key(index, 0, 0))
            begun = call().x[row : row + 1] if index == 0 else noise.normal([key], (1, 2, 2), call().x)
            assert torch.equal(finished[3 * row + place], walked(begun)[0])
    assert outcome.wishes[-1] == "" and outcome.wishes[0] == "plain"
    assert len(outcome.full) == 2 * 3 * resume


def test_the_finish_begins_at_the_state_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = search(Drafts(reward=latent_reward(total), budget=60, drafts=4, draft="x", resume=2), call())
    assert [float(event.sigma) for event in outcome.full] == [pytest.approx(s) for s in LEVELS[-3:-1].tolist()]
    kept = [event for event in outcome.cheap if float(event.sigma) == float(LEVELS[-3])]
    states = torch.cat([event.x for event in kept])
    for row in outcome.full[0].x:
        assert any(torch.equal(row, state) for state in states)


def test_fewer_steps_are_resumed_on_the_call_s_own_levels() -> None:
    config = Drafts(reward=latent_reward(total), budget=80, drafts=4, draft="x", resume=3)
    outcome = search(config, call(), Lent(steps=3))
    assert {round(float(event.sigma), 4) for event in outcome.cheap} == {1.0, 0.75, 0.35}
    levels = [round(float(event.sigma), 4) for event in outcome.full]
    assert levels == [0.75, 0.55, 0.35, 0.15], "from the last state of a draft above the third step before the end"


def test_dropped_drafts_are_drawn_again_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Drafts(reward=latent_reward(total), budget=70, drafts=4, finish=2, draft="x", resume=2)
    whole = search(config, call())
    add = ByReward.add

    def forgetful(self: ByReward, drafts: Any, ask: Any) -> None:
        add(self, drafts, ask)
        for draft in self.order:
            draft.drop()

    monkeypatch.setattr(ByReward, "add", forgetful)
    outcome = search(config, call())
    assert torch.equal(outcome.x, whole.x)
    assert [p["rewards"] for p in outcome.pictures] == [p["rewards"] for p in whole.pictures]
    assert len(outcome.cheap) > len(whole.cheap)


# -- budgets -----------------------------------------------------------------------------------------------------------


class FakeClock:
    """A clock that only network calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, draft: float, full: float) -> None:
        self.time, self.costs = 0.0, {True: draft, False: full}
        monkeypatch.setattr(clock, "now", lambda: self.time)

    def tick(self, is_draft: bool) -> None:
        self.time += self.costs[is_draft]


@pytest.mark.parametrize("seconds", [2.0, 3.9, 4.0, 9.99, 17.0])
def test_the_rounds_are_as_many_as_the_clock_pays_for(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeClock(monkeypatch, 0.25, 0.5)  # a round of 6 calls takes 1.5 s, a finish of 2 takes 1 s
    config = Drafts(reward=latent_reward(total), seconds=seconds, drafts=4, draft="x", resume=2)
    outcome = search(config, call(), before=fake.tick)
    rounds = int((2 * seconds - 1.0) // 1.5)
    assert [picture["used"]["rounds"] for picture in outcome.pictures] == [rounds] * 2
    begun = fake.time
    again = search(config, call(), before=fake.tick)  # what a round costs is known by now
    assert [picture["used"]["rounds"] for picture in again.pictures] == [rounds] * 2
    assert fake.time - begun == pytest.approx(1.5 * rounds + 1.0) and fake.time - begun <= 2 * seconds


def test_seconds_below_a_round_and_the_finish_name_both(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeClock(monkeypatch, 0.25, 0.5)
    config = Drafts(reward=latent_reward(total), seconds=1.2, drafts=4, draft="x", resume=2)
    with pytest.raises(DiffAccelError, match=r"2\.4 s is too small: .* takes 1\.5 s and their finish 1\."):
        search(config, call(), before=fake.tick)


@pytest.mark.parametrize("budget", [30, 47, 100])
def test_predictions_stay_within_the_budget_and_use_it(budget: int) -> None:
    config = Drafts(reward=latent_reward(total), budget=budget, drafts=4, finish=2, draft="x", resume=2)
    outcome = search(config, call())
    for picture in outcome.pictures:
        assert budget - 4 * STEPS < picture["nfe"] <= budget
        assert picture["nfe"] == 4 * STEPS * picture["used"]["rounds"] + 2 * 2
        assert picture["scored"] == 4 * picture["used"]["rounds"] + 2
    rows = sum(len(event.x) for event in (*outcome.cheap, *outcome.full))
    assert rows == sum(picture["nfe"] for picture in outcome.pictures)


def test_predictions_below_a_round_and_the_finish_name_both() -> None:
    with pytest.raises(DiffAccelError, match=r"27 NFE is too small: .* takes 24 NFE and their finish 4\."):
        search(Drafts(reward=latent_reward(total), budget=27, drafts=4, draft="x", resume=2), call())


# -- refusals, and the end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"finish": 9}, "Drafts.finish is 9, and a round has 8 drafts"),
        ({"guide": 0.1}, "drafts are not guided"),
        ({"shared": True}, "do not share the drafts"),
        ({"drafts": 1}, "Drafts.drafts is 1; it must be at least 2"),
        ({"resume": 0}, "Drafts.resume is 0; it must be at least 1"),
        ({"seconds": -1.0}, "Drafts.seconds is -1.0; it must be at least 0"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffAccelError, match=message):
        Drafts(**options)


def test_a_resume_beyond_the_steps() -> None:
    with pytest.raises(DiffAccelError, match=r"Drafts\.resume is 7; the call makes 6 steps, so it must be 1 to 6"):
        search(Drafts(reward=latent_reward(total), resume=7), call())


def test_the_paper_s_drafts_are_scaled_to_the_call() -> None:
    outcome = search(Drafts.paper(reward=latent_reward(total), budget=100), call())
    assert outcome.wishes[0] == "taylorseer:order=1,payload=taylor,real_steps=[0,1,3]"
    assert {len(picture["rewards"]) for picture in outcome.pictures} == {1}
    assert all(picture["used"]["finished"] == 4 for picture in outcome.pictures)
    assert Drafts.paper() == Drafts.from_dict(Drafts.paper().to_dict())


def test_an_interrupted_search_returns_its_best_draft() -> None:
    outcome = search(Drafts(reward=latent_reward(total), budget=200, draft="x"), call(), stop=lambda done: done > 120)
    assert outcome.report["search"]["interrupted"]
    assert total(outcome.x).tolist() == pytest.approx([picture["reward"] for picture in outcome.pictures])
    assert not outcome.full


# -- a search that was killed ------------------------------------------------------------------------------------------


def killed(config: Any, folder: Path, calls: int) -> None:
    left = calls

    def before(is_draft: bool) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt("killed")

    with pytest.raises(KeyboardInterrupt, match="killed"):
        search(config, call(folder=folder), before=before)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_killed_search_ends_as_one_that_was_not(share: float, tmp_path: Path) -> None:
    config = Drafts(reward=latent_reward(total), budget=100, drafts=4, draft="x", keep=1)
    whole = search(config, call(folder=tmp_path / "whole"))
    killed(config, tmp_path / "killed", int(share * len([*whole.cheap, *whole.full])))
    resumed = search(config, call(folder=tmp_path / "killed"))
    _same(resumed, whole)
    if share > 0.3:
        assert resumed.report["resumed"]["nfe"] > 0
    again = search(config, call(folder=tmp_path / "killed"))
    _same(again, whole)


def _same(one: Outcome, other: Outcome) -> None:
    assert torch.equal(one.x, other.x)
    assert one.pictures == other.pictures


def test_the_folder_of_another_search_is_refused(tmp_path: Path) -> None:
    config = Drafts(reward=latent_reward(total), budget=100, drafts=4, draft="x")
    search(config, call(folder=tmp_path))
    with pytest.raises(DiffAccelError, match="draft"):
        search(replace(config, draft="y"), call(folder=tmp_path))


def test_rough_and_exact_differ() -> None:
    """Else the tests above would hold for drafts that are never finished."""
    x = call().x
    assert not torch.equal(rough(x, LEVELS[0]), exact(x, LEVELS[0]))
