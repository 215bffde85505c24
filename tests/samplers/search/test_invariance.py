"""What must not change a search's decisions: batches, chunks, minibatches, overlap, other prompts, processes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from analytic import BIMODAL
from search_bed import Found, found, latent_reward, stand_in
from torch import Tensor

from diffaccel.flow import LINEAR
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, SoP
from diffaccel.samplers.search.particles import Pool
from diffaccel.samplers.search.processes import SearchProcesses
from diffaccel.samplers.search.scoring import PictureScorer

LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.35, 0.15, 0.0])
PROMPTS = ["long", "short", "long"]


def score(x0: Tensor) -> Tensor:
    return x0.flatten(1).double().sum(1)


REWARD = latent_reward(score)
METHODS: list[Any] = [
    RBF(reward=REWARD, budget=70, particles=2, initial=3, chunk=2, path="linear", norm=1.5),
    RBF(reward=REWARD, budget=70, particles=2, initial=3, chunk=3, path="vp", stages=5, commit="first"),
    RBF(reward=REWARD, budget=70, particles=2, initial=3, chunk=3, beam=3, begin=0.4),
    SVDD(reward=REWARD, budget=70, particles=2, temperature=0.5), CoDe(reward=REWARD, budget=70, particles=2),
    SMC(reward=REWARD, budget=70), BoN(reward=REWARD, budget=70, wave=4),
    SoP(reward=REWARD, budget=70, particles=1, walk=2),
]  # fmt: skip
every_method = pytest.mark.parametrize("config", METHODS, ids=lambda c: f"{c.name}-{getattr(c, 'path', '')}")


def noise(rows: int = 3) -> Tensor:
    return torch.randn(rows, 1, 2, 2, generator=torch.Generator().manual_seed(5))


def velocity(x: Tensor, sigma: Tensor) -> Tensor:
    """Of known data, in float64 inside: a row's numbers do not depend on the rows beside it."""
    return BIMODAL.velocity(LINEAR, x.double(), sigma.double()).to(x.dtype)


def search(config: Any, rows: list[int] | None = None) -> Found:
    rows = [0, 1, 2] if rows is None else rows
    here = stand_in(noise()[rows], LEVELS, prompts=[PROMPTS[row] for row in rows])
    here.generator = [torch.Generator().manual_seed(row) for row in rows]
    return found(config, here, velocity)


def same(a: Found, b: Found) -> None:
    assert torch.equal(a.x, b.x)
    assert a.pictures == b.pictures


@every_method
@pytest.mark.parametrize("most", [1, 3])
def test_rows_of_a_network_call(config: Any, most: int) -> None:
    small = search(replace(config, max_batch=most))
    same(small, search(config))
    assert max(len(e.x) for e in small.evals) == most


@every_method
def test_pictures_that_are_scored_together(config: Any) -> None:
    one = latent_reward(score, batch_size=1)
    same(search(replace(config, reward=one)), search(config))


@every_method
def test_a_prompt_s_search_depends_on_its_own_generator_alone(config: Any) -> None:
    """Not on which other prompts are in the call, nor on its place there."""
    together, alone, turned = search(config), search(config, [1]), search(config, [2, 1, 0])
    assert torch.equal(together.x[1], alone.x[0])
    assert together.pictures[1] == alone.pictures[0]
    assert torch.equal(together.x, turned.x.flip(0))
    assert together.pictures == turned.pictures[::-1]
    assert not torch.equal(together.x[0], together.x[2]), "the same prompt, another seed"


@every_method
def test_every_picture_is_scored_by_its_own_prompt(config: Any) -> None:
    """One prompt asks for more of what the other asks for less of."""

    def by_prompt(x0: Tensor, prompts: list[str]) -> Tensor:
        return score(x0) * torch.tensor([1.0 if prompt == "long" else -1.0 for prompt in prompts])

    reward = replace(REWARD, function=by_prompt, batch_size=5)
    run = search(replace(config, reward=reward))
    for x, prompt, picture in zip(run.x, PROMPTS, run.pictures, strict=True):
        assert picture["prompt"] == prompt
        assert picture["reward"] == pytest.approx(float(score(x[None])) * (1 if prompt == "long" else -1), abs=1e-5)
    assert [picture["reward"] > 1 for picture in run.pictures] == [True] * 3


@every_method
def test_scoring_beside_the_network(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer on another device scores one half of the chains while the network works on the other: the chains decide
    the same, and only what was spent in the meantime differs."""
    expected = search(config)
    monkeypatch.setattr(PictureScorer, "elsewhere", lambda self, device: True)
    overlapped = search(config)
    assert torch.equal(overlapped.x, expected.x)

    def by_chain(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(lines, key=lambda line: line.get("chain", 0))

    assert list(map(by_chain, overlapped.decisions)) == list(map(by_chain, expected.decisions))
    for a, b in zip(overlapped.pictures, expected.pictures, strict=True):
        timeless = ("prompt", "seed", "reward", "rewards", "nfe", "nfe_wasted", "scored")
        assert [a[k] for k in timeless] == [b[k] for k in timeless]


@pytest.mark.parametrize("chunk", [3, 8])
@pytest.mark.parametrize("path", ["linear", "vp"])
def test_chunks_of_first_accept_what_one_by_one_would(path: Any, chunk: int) -> None:
    """Until the budget ends, which pays for what nobody looked at too."""
    config = RBF(
        reward=REWARD, budget=400, particles=2, initial=3, beam=1, commit="first", chunk=1, path=path, norm=1.5
    )  # fmt: skip
    one, many = search(config), search(replace(config, chunk=chunk))
    for a, b in zip(one.decisions, many.decisions, strict=True):
        for chain in (0, 1):
            mine, theirs = ([x for x in lines if x["chain"] == chain] for lines in (a, b))
            keys = ("stage", "tried", "reward", "accepted")
            upto = len(mine) - 1  # the last level takes what is left of the budget
            assert [[x[k] for k in keys] for x in mine[:upto]] == [[x[k] for k in keys] for x in theirs[:upto]]
    assert all(p["nfe_wasted"] == 0 for p in one.pictures)
    assert all(p["nfe_wasted"] > 0 for p in many.pictures)


def test_waves_bound_memory_and_change_nothing() -> None:
    config = BoN(reward=REWARD, budget=70, wave=16)
    small = search(replace(config, wave=2))
    assert torch.equal(small.x, search(config).x)
    assert [p["reward"] for p in small.pictures] == [p["reward"] for p in search(config).pictures]


@pytest.mark.parametrize("count", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_processes_share_every_row_once(count: int, size: int, rows: int) -> None:
    """Cut between network calls, so that a call's rows are the same for any number of processes."""
    parts = [SearchProcesses(rank, size).part(count, rows) for rank in range(size)]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    if size > 1:
        each = min(rows, -(-count // size))
        assert all(part.start % each == 0 for part in parts if part.stop > part.start)
        busy = [part.stop - part.start for part in parts]
        assert max(busy) - min(busy) <= each


@pytest.mark.parametrize(
    "config",
    [
        RBF(reward=REWARD, particles=2, initial=3, beam=1, chunk=4, path="linear"),
        RBF(reward=REWARD, particles=2, initial=3, beam=1, chunk=4, path="linear", rule="threshold", threshold=1e9),
        RBF(reward=REWARD, particles=2, initial=3, beam=2, chunk=4, path="linear"),
        BoN(reward=REWARD, wave=8),
    ],
    ids=["rbf", "rbf-to-the-end", "rbf-beam", "bon"],
)
def test_memory_does_not_follow_the_budget(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents of what is let go are given back; of a chain only its states, its best and one chunk are alive."""
    most: list[int] = []
    keep = Pool.put

    def put(self: Pool, *rows: Tensor) -> Any:
        slots = keep(self, *rows)
        most.append(self.capacity - len(self.free))
        return slots

    monkeypatch.setattr(Pool, "put", put)
    peaks = []
    for budget in (100, 800):
        most.clear()
        search(replace(config, budget=budget))
        peaks.append(max(most))
    assert peaks[1] <= 1.5 * peaks[0]
    assert peaks[1] < 3 * 40


def test_memory_is_given_back() -> None:
    pool = Pool(torch.zeros(1, 1, 2, 2))
    slots = pool.put(torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2))
    assert (pool.capacity, len(pool.free)) == (3, 0)
    kept = slots.pop()
    del slots
    assert len(pool.free) == 2
    more = pool.put(torch.full((2, 1, 2, 2), 2.0), torch.zeros(2, 1, 2, 2))
    assert pool.capacity == 3 and kept.index not in {slot.index for slot in more}
    assert torch.equal(pool.get([kept])[0], torch.ones(1, 1, 2, 2))
    assert torch.equal(pool.get(more)[0], torch.full((2, 1, 2, 2), 2.0))
