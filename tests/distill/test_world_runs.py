"""Runs that train and distil a world model: options, resuming to the bit, learning a small world."""

from __future__ import annotations

import copy
import math
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from dot_world import MOVES, DotClips, dot_options
from started import in_processes

from diffaccel.distill.next_frame.layouts import LevelLaw
from diffaccel.distill.next_frame.options import WorldConsistency, WorldForcing
from diffaccel.distill.next_frame.train import train_consistency, train_forcing
from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.world_model import psnr, squared_error
from diffaccel.models.next_frame.pipeline import NextFramePipeline
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.processes import Processes
from diffaccel.training.loop import TrainingPlan

SMALL = {"batch": 4, "frames": 8, "queries": 3, "drafts": (0.5, 0.5)}


def _plan(steps: int, **changes: float) -> TrainingPlan:
    return TrainingPlan(**{"lr": 2e-3, "samples": 4 * steps, "warmup": 2, "ema": 0.9, **changes})  # type: ignore[arg-type]


def _network(**options: int | str) -> NextFrameTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NextFrameTransformer(**dot_options(**{"num_layers": 1, **options}))  # type: ignore[arg-type]


class Killed(Exception):
    """The run was killed."""


class DyingClips(DotClips):
    """Clips that end the run at a step."""

    left = 10**9

    def draw(self, count, generator):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().draw(count, generator)


def _forcing(folder, clips):
    return train_forcing(_network(), clips, WorldForcing(**SMALL, plan=_plan(6, save_seconds=0)), folder, seed=3)


def _consistency(folder, clips, **changes):
    teacher = _network()
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    options = WorldConsistency(**SMALL, plan=_plan(6, save_seconds=0), **changes)
    return train_consistency(copy.deepcopy(teacher), teacher, clips, options, folder, seed=3)


def _published(folder, clips):
    paper = WorldConsistency.paper(plan=_plan(6), **{k: SMALL[k] for k in ("batch", "frames", "queries", "drafts")})
    changes = {k: getattr(paper, k) for k in ("situation", "norm", "adversarial", "unknown", "tangent", "anchor")}
    return _consistency(folder, clips, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("train", [_forcing, _consistency, _published])
def test_a_killed_run_ends_as_one_that_was_not(tmp_path, train):
    whole = train(tmp_path / "whole", DotClips(8))
    dying = DyingClips(8)
    dying.left = 3
    with pytest.raises(Killed):
        train(tmp_path / "cut", dying)
    resumed = train(tmp_path / "cut", DotClips(8))
    assert resumed.step == whole.step == 6
    for name, p in whole.module.named_parameters():
        assert torch.equal(p, dict(resumed.module.named_parameters())[name]), name
    assert all(torch.equal(a, b) for a, b in zip(whole.ema.shadow, resumed.ema.shadow, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(whole.parameters, _network().parameters(), strict=False))


def test_options_that_cannot_be_are_refused():
    plan = _plan(1)
    for changes, text in (
        ({"queries": 9}, "queries"), ({"drafts": (0.5, 0.4)}, "drafts"), ({"unknown": 2.0}, "unknown"),
        ({"cached": -0.1}, "cached"), ({"batch": 0}, "batch"), ({"fastest": 0.0}, "fastest"),
        ({"fastest": math.nan}, "fastest"), ({"drafts": (math.nan,)}, "drafts"),
    ):  # fmt: skip
        with pytest.raises(DiffAccelError, match=text):
            WorldForcing(**{**SMALL, **changes}, plan=plan)
    for changes, text in (
        ({"norm": "token"}, "norm"), ({"tangent": "exact"}, "tangent"), ({"step": 0.0}, "step"),
        ({"anchor": 0.9}, "anchor"), ({"adversarial": -1.0}, "adversarial"), ({"solver_steps": 0}, "solver_steps"),
        ({"sigma_data": math.nan}, "sigma_data is nan"), ({"mean": math.inf}, "mean inf"),
    ):  # fmt: skip
        with pytest.raises(DiffAccelError, match=text):
            WorldConsistency(**{**SMALL, **changes}, plan=plan)
    with pytest.raises(DiffAccelError, match="deviation is nan"):
        LevelLaw(deviation=math.nan)
    with pytest.raises(DiffAccelError, match="3 processes"):
        train_forcing(_network(), DotClips(8), WorldForcing(**SMALL, plan=plan), "", processes=Processes(0, 3))


def test_the_published_forms():
    paper = WorldConsistency.paper(plan=_plan(1))
    assert (paper.situation, paper.norm, paper.tangent, paper.adversarial > 0) == ("forcing", "clip", "jvp", True)
    forcing = WorldForcing.paper(plan=_plan(1))
    assert forcing.cached == forcing.law.prefix == forcing.law.tail == 0 and forcing.law.shift == 1


def _share_a_run(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=rank, world_size=2
    )
    options = WorldForcing(**SMALL, plan=_plan(4))
    train_forcing(_network(), DotClips(8), options, Path(folder) / "two", seed=3, processes=Processes(rank, 2))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """The batch is the same; sums of gradients are made in another order."""
    in_processes(_share_a_run, (str(tmp_path),), 2)
    options = WorldForcing(**SMALL, plan=_plan(4))
    one = train_forcing(_network(), DotClips(8), options, tmp_path / "one", seed=3)
    two = train_forcing(_network(), DotClips(8), options, tmp_path / "two", seed=3)  # finished: it only loads
    assert two.step == one.step == 4
    moved = max(float((p - q).abs().max()) for p, q in zip(one.parameters, _network().parameters(), strict=True))
    for p, q in zip(one.parameters, two.parameters, strict=True):
        assert (p - q).abs().max() < 0.1 * moved


def _follow(network: NextFrameTransformer, steps: int) -> tuple[list[float], list[float]]:
    """PSNR at each of five frames under the true and under other actions."""
    frames, actions = DotClips(8).draw(48, torch.Generator().manual_seed(99))
    other = torch.randint(len(MOVES), actions.shape, generator=torch.Generator().manual_seed(98))
    pipe = NextFramePipeline(network.eval())
    results = []
    for taken in (actions, other):
        drawn = pipe(taken[:, 3:], frames[:, :3], actions[:, :3], num_inference_steps=steps).frames
        results.append(psnr(squared_error(drawn, frames[:, 3:])).tolist())
    return results[0], results[1]


@pytest.mark.slow
def test_a_small_world_is_learnt(tmp_path):
    """The loss falls, and frames are nearer to the truth under the actions taken than under others (delta-PSNR)."""
    teacher = _network(num_layers=3)
    losses: list[float] = []
    options = WorldForcing(
        batch=24, frames=10, queries=4, plan=TrainingPlan(lr=2e-3, samples=24 * 500, warmup=50, ema=0.98, log_seconds=2)
    )
    run = train_forcing(
        teacher,
        DotClips(10),
        options,
        tmp_path,
        tell=lambda text: losses.append(float(text.split("loss=")[1].split()[0])),
    )
    assert losses[-1] < 0.3 * losses[0]
    run.ema.swap()
    right, other = _follow(teacher, 4)
    assert right[0] > 14 and all(obeyed > not_obeyed for obeyed, not_obeyed in zip(right, other, strict=True))
