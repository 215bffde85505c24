"""Schedules, losses and options of QVGen: closed forms, and errors before any work."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.quant import QVGen
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.timesteps import TimeGroups
from diffaccel.quant.qvgen.losses import teacher_share, training_loss
from diffaccel.quant.qvgen.optimizer import rate_share
from diffaccel.quant.qvgen.schedule import RankPoint, RankSchedule


def test_the_published_schedule() -> None:
    schedule = QVGen.paper().schedule
    assert schedule.ranks == [32, 16, 8, 4, 2, 1, 0] and schedule.phases == 6 and schedule.phase_steps == 444
    assert schedule.at(0) == RankPoint(32, 16, 1.0)
    assert schedule.at(222) == RankPoint(32, 16, pytest.approx(0.5))
    assert schedule.at(444) == RankPoint(16, 8, 1.0)
    assert schedule.at(2220) == RankPoint(1, 0, 1.0)
    assert [schedule.at(step).rank for step in (2663, 2664, 2666)] == [1, 0, 0]


@pytest.mark.parametrize("shrink", (0.1, 0.25, 0.5, 0.9))
@pytest.mark.parametrize(("rank", "last"), ((32, 0), (10, 0), (32, 8), (1, 0), (0, 0)))
def test_ranks_fall_strictly_to_the_last(rank: int, last: int, shrink: float) -> None:
    ranks = RankSchedule(rank, last, shrink, "linear", 3).ranks
    assert ranks[0] == rank and ranks[-1] == min(last, rank)
    assert all(a > b for a, b in itertools.pairwise(ranks))


def test_the_line_of_the_gate() -> None:
    schedule = RankSchedule(4, 0, 0.5, "linear", 4)
    assert [schedule.at(step).gate for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 1.0]


def test_the_share_of_the_teacher() -> None:
    u = torch.tensor([0.0, 0.1, 0.3, 0.5, 1.0], dtype=torch.float64)
    share = teacher_share(u, 5.0)
    expected = [(math.exp(5 * (1 - float(x))) - 1) / (math.exp(5) - 1) for x in u]
    assert share.tolist() == pytest.approx(expected, abs=1e-12)
    assert [round(float(x), 2) for x in share] == [1.0, 0.60, 0.22, 0.08, 0.0]
    assert torch.allclose(teacher_share(u, 1e-9), 1 - u, atol=1e-8) and torch.equal(teacher_share(u, 0.0), 1 - u)


def test_a_share_of_one_is_distillation_to_the_bit() -> None:
    student, teacher, target = (torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert torch.equal(
        training_loss(student, teacher, target, torch.ones(3)), training_loss(student, teacher, None, None)
    )
    data = training_loss(student, teacher, target, torch.zeros(3))
    torch.testing.assert_close(data, (student - target).square().mean())


def test_rates_rise_and_fall() -> None:
    config = QVGen(steps=100, warmup=0.1)
    shares = [rate_share(step, config) for step in range(100)]
    assert shares[0] == pytest.approx(1 / 11) and max(shares) == shares[10] == 1.0 and shares[-1] < 1e-3
    assert shares[:10] == sorted(shares[:10]) and shares[10:] == sorted(shares[10:], reverse=True)


def test_groups_follow_from_the_time_of_each_sample() -> None:
    groups = TimeGroups(50, 1000.0, 1)
    assert groups.groups(torch.tensor([0.0, 19.9, 20.0, 999.0, 1000.0])).tolist() == [0, 0, 1, 49, 49]
    assert groups.groups(torch.tensor(500)).tolist() == [25]
    assert groups.groups(torch.tensor([[0.0, 500.0], [20.0, 0.0]])).tolist() == [25, 1]
    with pytest.raises(DiffAccelError, match="called at time 1200"):
        groups.groups(torch.tensor([1200.0]))


def test_formats_are_written_and_read() -> None:
    for form in (LowBit(), LowBit(weight_bits=3, act_groups=50, rank=8, dense=True), LowBit(symmetric=True)):
        assert LowBit.read(str(form)) == form
    for text in ("low_bit:w9a4:g1:r0", "low_bit:w4a4", "low_bit:w4a4:g0:r0", "low_bit"):
        with pytest.raises(DiffAccelError, match="no format of a layer of few bits"):
            LowBit.read(text)


@pytest.mark.parametrize(
    ("options", "words"),
    (
        ({"weight_bits": 1}, "must be 2 to 8"),
        ({"act_bits": 9}, "must be 2 to 8"),
        ({"rank": -1}, "at least 0"),
        ({"steps": 5}, "vanishes in 6 phases"),
        ({"phase_steps": 444, "steps": 2000}, "6 phases of 444 steps"),
        ({"symmetric": True}, "2.9 points"),
        ({"alpha": 3.0}, "no effect with recipe='distill'"),
        ({"keep_rank": 64}, "starts with rank 32"),
        ({"rank": 0, "keep_rank": 4}, "starts with rank 0"),
        ({"rank": 0, "phase_steps": 444}, "phase_steps is 444, which has no effect: a rank of 0"),
        ({"rank": 8, "keep_rank": 8, "gate": "linear"}, "gate is 'linear', which has no effect"),
        ({"rank": 0, "shrink": 0.25}, "shrink is 0.25, which has no effect"),
        ({"shrink": 1.0}, "inside of"),
        ({"groups": 0}, "at least 1"),
        ({"dropout": 1.0}, "in \\[0, 1\\)"),
        ({"lr": 0.0}, "above 0"),
    ),
)
def test_errors_of_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DiffAccelError, match=words):
        QVGen(**options)


def test_presets() -> None:
    assert QVGen.paper().layers == "all" and QVGen.preset("lsq").rank == 0
    assert QVGen.preset("dsa").symmetric and QVGen.preset("dsa+rank").rank == 32
    with pytest.raises(DiffAccelError, match="Did you mean 'dsa'"):
        QVGen.preset("dsaa")
    config = QVGen.preset("dsa", skip=("a",))
    assert QVGen.from_dict(config.to_dict()) == config
