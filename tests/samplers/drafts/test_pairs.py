"""Judges of pairs: what they are shown and may answer, and searches that follow them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drafts_bed import call, search
from search_bed import latent_reward
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers import BoN, Drafts, rewards
from diffaccel.samplers.rewards import pairs


def brightness(images: Tensor) -> Tensor:
    return images.flatten(1).double().mean(1)


class Judge:
    """Compares by brightness, and counts how often the first picture was better."""

    name, identity = "brighter", "brighter"

    def __init__(self) -> None:
        self.first: list[bool] = []

    def compare(self, a: Tensor, b: Tensor, prompts: list[str]) -> Tensor:
        assert a.shape == b.shape and a.shape[1] == 3 and len(prompts) == len(a)
        self.first += (brightness(a) > brightness(b)).tolist()
        return (brightness(a) > brightness(b)).double()


class ScoringJudge(Judge):
    """Scores in whole points, too."""

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (10 * brightness(images)).round()

    def compare(self, a: Tensor, b: Tensor, prompts: list[str]) -> Any:
        return super().compare(a, b, prompts), torch.full((len(a),), 0.9)


def of_brightness(**options: Any) -> Any:
    return Drafts(**{"budget": 150, "drafts": 4, "draft": "x", "resume": 2, **options})


def test_a_judge_that_is_never_wrong_finds_what_its_number_finds() -> None:
    by_number = search(of_brightness(reward=rewards.resolve(lambda im, p: brightness(im), device="cpu")), call())
    judge = Judge()
    by_pairs = search(of_brightness(reward=judge), call())
    assert torch.equal(by_pairs.x, by_number.x)
    best = [[line["best"][:2] for line in p["decisions"] if "round" in line] for p in by_pairs.pictures]
    assert best == [[line["best"][:2] for line in p["decisions"] if "round" in line] for p in by_number.pictures]
    assert all(picture["rewards"] == [1.0] for picture in by_pairs.pictures), "its chance against the other finalist"
    assert 0.25 < sum(judge.first) / len(judge.first) < 0.75, "positions are drawn at random"


def test_a_judge_with_scores_gives_ratings() -> None:
    outcome = search(of_brightness(reward=ScoringJudge(), ranking="elo"), call())
    for picture in outcome.pictures:
        ratings = picture["decisions"][0]["ratings"]
        assert ratings == sorted(ratings, reverse=True) and len(set(ratings)) > 1
        assert picture["reward"] == round(picture["reward"])


@pytest.mark.slow
@pytest.mark.parametrize("judge", [Judge, ScoringJudge])
def test_a_killed_search_asks_nothing_twice(judge: Any, tmp_path: Path) -> None:
    whole = search(of_brightness(reward=judge()), call(folder=tmp_path / "whole"))
    asked = judge()
    left = 20

    def before(is_draft: bool) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt("killed")

    with pytest.raises(KeyboardInterrupt):
        search(of_brightness(reward=asked), call(folder=tmp_path / "killed"), before=before)
    rest = judge()
    resumed = search(of_brightness(reward=rest), call(folder=tmp_path / "killed"))
    assert torch.equal(resumed.x, whole.x) and resumed.pictures == whole.pictures
    all_at_once = judge()
    search(of_brightness(reward=all_at_once), call())
    assert len(asked.first) + len(rest.first) == len(all_at_once.first) and asked.first and rest.first


@pytest.mark.parametrize(
    "answer, why",
    [
        (lambda a, b, p: torch.full((len(a),), 2.0), "one number in .0, 1. a pair"),
        (lambda a, b, p: torch.rand(len(a) + 1), "one number in .0, 1. a pair"),
        (lambda a, b, p: None, "failed|one number"),
        (lambda a, b, p: (torch.rand(len(a)), torch.full((len(a),), 7.0)), "as many confidences"),
        (lambda a, b, p: 1 / 0, "The judge 'judge' failed .ZeroDivisionError"),
    ],
)
def test_answers_that_are_none(answer: Any, why: str) -> None:
    reward = rewards.Reward(name="judge", function=lambda im, p: brightness(im), compare=answer)
    images = torch.rand(3, 3, 2, 2)
    with pytest.raises(DiffAccelError, match=why):
        pairs.compare(reward, images, images, ["a", "b", "c"])


def test_answers_come_in_batches_with_or_without_confidence() -> None:
    reward = rewards.Reward(
        name="judge", function=lambda im, p: brightness(im), batch_size=2,
        compare=lambda a, b, p: (brightness(a).tolist(), brightness(b).tolist()),
    )  # fmt: skip
    a, b = torch.full((3, 3, 2, 2), 0.25), torch.full((3, 3, 2, 2), 0.75)
    assert pairs.compare(reward, a, b, ["x"] * 3) == ([0.25] * 3, [0.75] * 3)
    plain = rewards.Reward(name="judge", function=lambda im, p: brightness(im), compare=lambda a, b, p: [1, 0.5, 0])
    assert pairs.compare(plain, a, b, ["x"] * 3) == ([1.0, 0.5, 0.0], [0.5] * 3)


def test_other_searches_refuse_a_judge_without_scores() -> None:
    with pytest.raises(
        DiffAccelError, match="'brighter' compares pictures and does not score them; 'bon' needs scores"
    ):
        search(BoN(reward=Judge(), budget=12), call())
    with pytest.raises(DiffAccelError, match="or have compare"):
        rewards.resolve(3, device="cpu")
    search(BoN(reward=ScoringJudge(), budget=12), call())
    assert latent_reward(lambda x0: x0).compare is None
