"""Searches in the coordinates of Euler-type schedulers are searches on the linear path: the same decisions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from analytic import BIMODAL
from search_bed import Found, found, latent_reward, schedule, stand_in
from torch import Tensor

from diffaccel.flow import LINEAR, VE_PATH, Path
from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, SoP

SHARES = [0.93, 0.8, 0.6, 0.4, 0.15, 0.0]  # of noise on the linear path
REWARD = latent_reward(lambda x0: x0.flatten(1).double().sum(1))
METHODS: list[Any] = [
    RBF(reward=REWARD, budget=70, particles=2, initial=3, chunk=2, path="linear", norm=1.5),
    RBF(reward=REWARD, budget=70, particles=2, initial=3, chunk=3, path="vp", stages=5, tail_steps=3),
    SVDD(reward=REWARD, budget=70, particles=2, path="native"),
    CoDe(reward=REWARD, budget=70, particles=2, path="linear", kernel="em", norm=0.7),
    CoDe(reward=REWARD, budget=70, particles=2, path="vp", kernel="em", norm=0.7),
    SMC(reward=REWARD, budget=70, path="native"), BoN(reward=REWARD, budget=70),
    SoP(reward=REWARD, budget=70, particles=1, walk=2),
]  # fmt: skip
every_method = pytest.mark.parametrize(
    "config", METHODS, ids=lambda c: "-".join([c.name, getattr(c, "path", ""), getattr(c, "kernel", "")])
)


def search(config: Any, path: Path, std: float = 1.0) -> Found:
    """``std`` is that of the first state."""
    levels = torch.tensor(SHARES) if path is LINEAR else torch.tensor([t / (1 - t) for t in SHARES])
    noise = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    here = stand_in(noise * std, levels, path, prompts=["a", "b"])
    here.read_schedule = schedule(path, levels.tolist())
    here.scheduler = SimpleNamespace(init_noise_sigma=std)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return BIMODAL.velocity(path, x.double(), sigma.double()).to(x.dtype)

    return found(config, here, velocity)


def begin(config: Any) -> float:
    """The size of a flow's first states: 1, or what pure noise of the VP path has on the linear one."""
    made = config.plan(SimpleNamespace(schedule=schedule(LINEAR, SHARES)))
    return 1.0 if made.start is None else float(made.start)


@every_method
def test_one_search_in_two_coordinates(config: Any) -> None:
    straight, exploding = search(config, LINEAR), search(config, VE_PATH, std=begin(config) / (1 - SHARES[0]))
    torch.testing.assert_close(exploding.x, straight.x, rtol=1e-3, atol=1e-3)
    for a, b in zip(straight.pictures, exploding.pictures, strict=True):
        assert b["reward"] == pytest.approx(a["reward"], abs=2e-3)
        assert a["nfe"] == b["nfe"]
        for one, other in zip(a["decisions"], b["decisions"], strict=True):
            assert {k: one[k] for k in one if k in ("chain", "stage", "tried", "quota", "accepted", "way")} == {
                k: other[k] for k in one if k in ("chain", "stage", "tried", "quota", "accepted", "way")
            }


@every_method
@pytest.mark.parametrize("path, std", [(LINEAR, 1.0), (VE_PATH, 14.6)], ids=["linear", "ve"])
def test_first_states_have_the_size_of_the_pipeline_s_own(config: Any, path: Path, std: float) -> None:
    """The first is the pipeline's, and the others are other noise of the same size; on the VP path of a flow the levels
    begin below pure noise, and all states with them."""
    run = search(config, path, std)
    first = run.evals[0].x
    own = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    size = begin(config) if path is LINEAR else std
    rows = torch.tensor(run.evals[0].rows)
    for row in (0, 1):
        torch.testing.assert_close(first[rows == row][0], own[row] * size, rtol=1e-5, atol=1e-5)
    others = torch.cat([first[rows == row][1:] for row in (0, 1)])
    if len(others):
        assert len({tuple(x.flatten().tolist()) for x in others}) == len(others)
        assert 0.7 < float(others.std() / size) < 1.4
