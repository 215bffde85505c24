"""A search that was killed goes on from its trace, to the same picture and the same decisions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from analytic import BIMODAL
from search_bed import Found, found, latent_reward, stand_in
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, SoP
from diffaccel.samplers.search.processes import SearchProcesses
from diffaccel.samplers.search.reward_log import RewardLog

LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.35, 0.15, 0.0])
METHODS: list[Any] = [
    RBF(budget=60, particles=2, initial=3, chunk=2, path="linear", norm=1.5),
    RBF(budget=80, particles=2, initial=3, chunk=3, path="vp", stages=5, commit="first"),
    RBF(budget=80, particles=2, initial=3, chunk=3, beam=3, begin=0.4),
    SVDD(budget=60, particles=2, temperature=0.5), CoDe(budget=60, particles=2), SMC(budget=60),
    BoN(budget=60, wave=4), SoP(budget=60, particles=1, walk=2),
]  # fmt: skip
every_method = pytest.mark.parametrize("config", METHODS, ids=lambda c: f"{c.name}-{getattr(c, 'path', '')}")


class Scorer:
    """The sum of a row, until so many calls were answered."""

    def __init__(self, answers: float = float("inf")) -> None:
        self.answers, self.calls, self.rows = answers, 0, 0

    def __call__(self, x0: Tensor) -> Tensor:
        if self.answers <= 0:
            raise KeyboardInterrupt("killed")
        self.answers, self.calls = self.answers - 1, self.calls + 1
        self.rows += len(x0)
        return x0.flatten(1).double().sum(1)


def search(config: Any, folder: Path | None, scorer: Scorer, **changes: Any) -> Found:
    config = replace(config, reward=latent_reward(scorer))
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    here = stand_in(noise, LEVELS, prompts=["a", "b"], folder=folder, **changes)
    return found(config, here, lambda x, sigma: BIMODAL.velocity(LINEAR, x, sigma))


def killed(config: Any, folder: Path, answers: int) -> None:
    with pytest.raises(KeyboardInterrupt, match="killed"):
        search(config, folder, Scorer(answers))


def same(a: Found, b: Found) -> None:
    torch.testing.assert_close(a.x, b.x, rtol=0, atol=2e-6)  # rows of another batch may round otherwise
    assert a.decisions == b.decisions
    for one, other in zip(a.pictures, b.pictures, strict=True):
        ours = {k: v for k, v in one.items() if k != "nfe_recomputed"}
        assert ours == {k: v for k, v in other.items() if k != "nfe_recomputed"}


@every_method
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_a_killed_search_ends_as_one_that_was_not(config: Any, share: float, tmp_path: Path) -> None:
    calls = Scorer()
    whole = search(config, None, calls)
    killed(config, tmp_path, 1 + int(share * (calls.calls - 2)))
    rest = Scorer()
    resumed = search(config, tmp_path, rest)
    same(resumed, whole)
    assert 0 < rest.rows < calls.rows, "what was scored before is not scored again"
    # computed again are the states where chains stood, and those that led there; not all that was tried
    again = sum(picture["nfe_recomputed"] for picture in resumed.pictures)
    assert 0 < again < sum(picture["nfe"] for picture in whole.pictures)
    assert sum(len(e.x) for e in resumed.evals) <= sum(len(e.x) for e in whole.evals) + again


@every_method
def test_killed_twice(config: Any, tmp_path: Path) -> None:
    killed(config, tmp_path, 1)
    killed(config, tmp_path, 1)
    same(search(config, tmp_path, Scorer()), search(config, None, Scorer()))


@every_method
def test_a_finished_search_is_not_scored_again(config: Any, tmp_path: Path) -> None:
    first = search(config, tmp_path, Scorer())
    again = search(config, tmp_path, Scorer(0))
    same(again, first)
    assert all(p["nfe_recomputed"] > 0 for p in again.pictures)
    assert sum(len(e.x) for e in again.evals) < sum(len(e.x) for e in first.evals) / 2


@every_method
def test_a_line_that_was_cut_is_as_none(config: Any, tmp_path: Path) -> None:
    killed(config, tmp_path, 2)
    file = tmp_path / "rewards.jsonl"
    text = file.read_text()
    file.write_text(text + '{"row": 0, "chain": 0, "rew')
    same(search(config, tmp_path, Scorer()), search(config, None, Scorer()))
    assert file.read_text().startswith(text)
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_first_line_that_was_cut_is_written_again(tmp_path: Path) -> None:
    config = METHODS[0]
    killed(config, tmp_path, 1)
    file = tmp_path / "rewards.jsonl"
    file.write_text(file.read_text()[:20])
    killed(config, tmp_path, 2)
    same(search(config, tmp_path, Scorer()), search(config, None, Scorer()))


GARBAGE = [b"\0" * 9, b"\xff\xfe", b"[]", b'{"row": 0}', b'{"row": 0, "chain": 0, "rewards": ["x"]}']


@pytest.mark.parametrize("end", [b"\n", b""])
@pytest.mark.parametrize("garbage", GARBAGE)
def test_a_damaged_last_line_is_as_none_and_another_a_sentence(garbage: bytes, end: bytes, tmp_path: Path) -> None:
    line = json.dumps({"row": 0, "chain": 1, "rewards": [0.5, None]}).encode() + b"\n"
    file = RewardLog(tmp_path).file
    header = file.read_bytes()
    file.write_bytes(header + line + garbage + end)
    assert len(RewardLog(tmp_path).rounds[0, 1]) == 1
    assert file.read_bytes() == header + line
    damaged = header + garbage + b"\n" + line
    file.write_bytes(damaged)
    with pytest.raises(DiffAccelError, match=r"Line 2 of '.*rewards\.jsonl' is damaged\. Remove the file"):
        RewardLog(tmp_path)
    assert file.read_bytes() == damaged
    file.write_bytes(b"\0" * 99 + end)
    assert not RewardLog(tmp_path).rounds and file.read_bytes() == header


def test_of_several_processes_all_have_what_the_first_one_read(tmp_path: Path) -> None:
    """And no line that it wrote since then, or that a slower disk does not show yet."""
    here, there = tmp_path / "here", tmp_path / "there"
    first = RewardLog(here)
    with first.file.open("a") as file:
        file.write(json.dumps({"row": 0, "chain": 1, "rewards": [0.5]}) + "\n")
    text = first.file.read_text()

    class Second(SearchProcesses):
        def share(self, value: Any) -> Any:
            assert value == "", "the first one's is what counts"
            return text

    shutil.copytree(here, there)
    with (there / first.file.name).open("a") as file:
        file.write(json.dumps({"row": 0, "chain": 1, "rewards": [0.7]}) + "\n")
    before = (there / first.file.name).read_text()
    second = RewardLog(there, processes=Second(1, 2))
    assert {key: list(rounds) for key, rounds in second.rounds.items()} == {(0, 1): [[0.5]]}
    second.append(SimpleNamespace(search=SimpleNamespace(row=0), number=1), [0.9])
    assert (there / first.file.name).read_text() == before


def test_another_search_s_trace_is_refused(tmp_path: Path) -> None:
    config = METHODS[0]
    killed(config, tmp_path, 2)
    before = (tmp_path / "rewards.jsonl").read_text()
    with pytest.raises(DiffAccelError, match=r"of another search: it differs in method\."):
        search(RBF(budget=61, particles=2, initial=3, chunk=2, path="linear", norm=1.5), tmp_path, Scorer())
    with pytest.raises(DiffAccelError, match=r"differs in seeds\. Remove it, or give another folder"):
        search(config, tmp_path, Scorer(), seed=9)
    assert (tmp_path / "rewards.jsonl").read_text() == before


def test_what_no_decision_depends_on_may_change(tmp_path: Path) -> None:
    """After running out of memory a search goes on with smaller calls, and more of its samples may be kept."""
    config = METHODS[2]
    whole = search(config, None, Scorer())
    killed(config, tmp_path, 3)
    rest = Scorer()
    resumed = search(replace(config, max_batch=1, keep=1), tmp_path, rest)
    torch.testing.assert_close(resumed.x, whole.x, rtol=0, atol=2e-6)
    assert resumed.decisions == whole.decisions
    assert [len(picture["rewards"]) for picture in resumed.pictures] == [2, 2]
    again = search(replace(config, keep=1), tmp_path, Scorer(0))
    assert again.pictures[0]["rewards"] == resumed.pictures[0]["rewards"]


def test_a_trace_that_does_not_fit_the_moves_is_refused(tmp_path: Path) -> None:
    killed(METHODS[0], tmp_path, 2)
    file = tmp_path / "rewards.jsonl"
    first, second, *rest = file.read_text().splitlines()
    entry = json.loads(second)
    file.write_text("\n".join([first, json.dumps({**entry, "rewards": entry["rewards"][:-1]}), *rest]) + "\n")
    with pytest.raises(DiffAccelError, match="has 2 rewards where this search makes 3 moves"):
        search(METHODS[0], tmp_path, Scorer())


def test_what_a_search_leaves_beside_its_pictures(tmp_path: Path) -> None:
    config = SVDD(budget=60, particles=2, keep=1)
    run = search(config, tmp_path, Scorer())
    told = json.loads((tmp_path / "trace.json").read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert told == json.loads(json.dumps(run.report))
    assert (told["format"], told["interrupted"], told["final_sample_kind"]) == (1, False, "t0")
    assert [p["prompt"] for p in told["pictures"]] == ["a", "b"]
    pictures = sorted(path.name for path in tmp_path.glob("*.png") if path.name != "reward.png")
    assert pictures == [
        f"00{row}-{place}_{reward:.4g}.png"
        for row, picture in enumerate(run.pictures)
        for place, reward in enumerate(picture["rewards"])
    ]
    assert (tmp_path / "reward.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.part"))
    for picture in told["pictures"]:
        rewards = [step["reward"] for step in picture["climb"] if not step["sample"]]
        assert rewards == sorted(rewards)
        assert picture["scored"] >= picture["nfe"]  # every level's states, and the samples


def test_rewards_without_a_word_in_json(tmp_path: Path) -> None:
    """NaN is the worst reward; the trace keeps it, and the report has None for it."""

    def some(x0: Tensor) -> Tensor:
        sums = x0.flatten(1).double().sum(1)
        return torch.where((1000 * sums).floor() % 3 == 0, torch.nan, sums)

    def run() -> Found:
        here = stand_in(torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(3)), LEVELS, folder=tmp_path)
        config = BoN(budget=60, reward=latent_reward(some), keep=9)
        return found(config, here, lambda x, sigma: BIMODAL.velocity(LINEAR, x, sigma))

    first, again = run(), run()
    same(again, first)
    text = (tmp_path / "trace.json").read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert None in json.loads(text)["pictures"][0]["rewards"]
