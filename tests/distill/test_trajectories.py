"""Consistency along a teacher's trajectories: closed forms of a Gaussian, edges of segments, resuming, refusals."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_toys import Velocity, gaussian_teacher, small_teacher
from safetensors.torch import load_file
from started import in_processes
from torch import Tensor, nn

from diffaccel.distill import TSCD, TrajectoryRun
from diffaccel.distill.drawing import generate, guided
from diffaccel.distill.sim import SIM
from diffaccel.distill.train import run_of
from diffaccel.errors import DiffAccelError
from diffaccel.processes import Processes

MEAN, STD = -0.3, 0.9
SMALL: dict[str, Any] = {"steps": 6, "batch": 8, "grid": 4, "segments": (2, 1), "lr": 1e-3, "ema_pictures": 8}


def options(**changes: Any) -> TSCD:
    return TSCD(**{**SMALL, **changes})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


class Table(nn.Module):
    """A velocity that is affine in ``x`` at every level of a grid, by which jumps of any length can be told."""

    def __init__(self, levels: tuple[float, ...], gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels[:-1]))
        self.gain, self.shift = nn.Parameter(gain), nn.Parameter(shift)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        place = (sigma[:, None] - self.levels).abs().argmin(1)
        return self.gain[place, None] * x + self.shift[place, None]


def affine(teacher: Any, sigma: float) -> tuple[float, float]:
    """Return slope and intercept of the exact velocity of the Gaussian at a level."""
    with torch.no_grad():
        zero, one = teacher.ask(teacher.network, torch.tensor([[0.0], [1.0]]), torch.full((2,), sigma), 0)[:, 0]
    return float(one - zero), float(zero)


def composed(teacher: Any, config: TSCD, segments: int) -> Table:
    """Return the student whose jumps are Euler's steps of the teacher, composed: the fixed point of consistency."""
    levels, length = config.levels, config.grid // segments
    gain, shift = torch.zeros(config.grid), torch.zeros(config.grid)
    for place in range(config.grid):
        edge = (place // length + 1) * length
        scale, offset = 1.0, 0.0
        for at in range(place, edge):
            slope, zero = affine(teacher, levels[at])
            step = levels[at + 1] - levels[at]
            scale, offset = scale * (1 + step * slope), offset * (1 + step * slope) + step * zero
        jump = levels[edge] - levels[place]
        gain[place], shift[place] = (scale - 1) / jump, offset / jump
    return Table(levels, gain, shift)


def test_trajectories_are_those_of_the_flow_to_first_order() -> None:
    """``x = a m + (V(t) / V(1))^(1/2) (z - a_1 m)``: Euler's error halves where the grid is twice as fine."""
    teacher, z = gaussian_teacher(MEAN, STD), normal(32, 1)
    errors = []
    for grid in (32, 64, 128):
        config = options(grid=grid, segments=(1,), batch=32)
        run = TrajectoryRun(teacher, config, "nowhere")
        first = config.levels[0]
        spread = ((1 - first) ** 2 * STD**2 + first**2) ** 0.5
        exact = MEAN + STD / spread * (z - (1 - first) * MEAN)
        errors.append(float((run.trajectory(z, 0)[-1] - exact).abs().max()))
    assert errors[2] < 0.02 and errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("segments", [8, 4, 2, 1])
def test_the_fixed_point_is_the_teachers_composed_steps(segments: int) -> None:
    teacher = gaussian_teacher(MEAN, STD)
    config = options(grid=8, segments=(segments,), c=0.0, batch=16)
    run = TrajectoryRun(teacher, config, "nowhere", begin=composed(teacher, config, segments))
    points, place = run.trajectory(normal(16, 1), 0), torch.arange(16) % 8
    loss, distance = run.loss(points, place, 0, segments)
    assert float(loss.detach()) < 1e-5 and float(distance) < 1e-5
    with torch.no_grad():
        drawn = generate(teacher, run.generator, points[0], 0, config)
    torch.testing.assert_close(drawn, points[-1], rtol=1e-4, atol=1e-5)  # its calls are the edges
    own = TrajectoryRun(teacher, config, "nowhere")
    if segments == 8:  # every jump is one step, and the teacher makes it
        loss, _ = own.loss(points, place, 0, segments)
        loss.backward()
        assert float(loss.detach()) < 1e-6 and all(float(p.grad.abs()) < 1e-5 for p in own.generator.parameters())
    else:
        assert float(own.loss(points, place, 0, segments)[0].detach()) > 1e-3


@pytest.mark.slow
def test_a_student_learns_the_trajectories(tmp_path: Path) -> None:
    """From the teacher's own velocities, through 4 segments and 2 to one."""
    teacher = gaussian_teacher(MEAN, STD)
    config = options(
        grid=8, segments=(4, 2, 1), batch=64, steps=600, lr=2e-2, c=0.05, target_decay=0.5, ema_pictures=640
    )
    slopes = [affine(teacher, level) for level in config.levels[:-1]]
    begin = Table(config.levels, *torch.tensor(slopes).T.contiguous())
    run = TrajectoryRun(teacher, config, tmp_path, begin=begin)
    before = run.meter()["trajectory_error"]
    assert run.run()
    with run.average:
        after = run.meter()["trajectory_error"]
    assert before > 0.1 and after < 0.02


def test_a_teacher_is_followed_with_its_guidance() -> None:
    teacher, z = small_teacher(guidance=3.0), normal(8, 2)
    run = TrajectoryRun(teacher, options(), "nowhere")
    points, (first, second, *_) = run.trajectory(z, 1), run.config.levels
    sigma = torch.full((8,), first)
    with torch.no_grad():
        positive = teacher.ask(teacher.network, z, sigma, 1)
        negative = teacher.ask(teacher.network, z, sigma, 1, "negative")
        assert torch.equal(guided(teacher, z, sigma, 1), negative + 3 * (positive - negative))
    expected = z + (second - first) * (negative + 3 * (positive - negative))
    torch.testing.assert_close(points[1], expected, rtol=1e-4, atol=1e-5)


def test_segments_and_levels() -> None:
    config = TSCD(steps=40, ema_pictures=0)
    assert [config.segments_at(step) for step in (0, 9, 10, 20, 30, 39)] == [8, 8, 4, 2, 1, 1]
    assert config.levels[0] == pytest.approx(1000 / 1001) and config.levels[-1] == 0 and len(config.levels) == 33
    two = TSCD(steps=40, segments=(4, 2), ema_pictures=0)
    assert two.calls == 2 and two.student_levels == pytest.approx((two.levels[0], two.levels[16]))
    assert two.student_levels == pytest.approx(SIM(student_steps=2, noise_ratio=1000.0).student_levels)


def test_every_row_learns_once_at_every_point_of_a_round() -> None:
    run = TrajectoryRun(small_teacher(), options(), "nowhere")
    points, order, group = run._trajectories(0)
    assert points.shape == (5, 8, 2) and group in (0, 1)
    assert (
        all(sorted(row.tolist()) == [0, 1, 2, 3] for row in order) and len({tuple(row.tolist()) for row in order}) > 1
    )
    shares = []
    for rank in range(2):
        half = TrajectoryRun(small_teacher(), options(), "nowhere", processes=Processes(rank, 2))
        shares.append(half._trajectories(0)[1])
    assert torch.equal(torch.cat(shares), order)
    assert not torch.equal(run._trajectories(1)[0][0], points[0])


def test_a_killed_run_goes_on_to_the_same_bits_inside_of_a_round(tmp_path: Path) -> None:
    whole = TrajectoryRun(small_teacher(guidance=2.0), options(), tmp_path / "whole")
    assert whole.run()
    broken = TrajectoryRun(small_teacher(guidance=2.0), options(), tmp_path / "broken")
    for _ in range(3):
        broken.turn()
        broken.step += 1
    broken.save()
    broken.turn()  # lost with the process
    resumed = TrajectoryRun(small_teacher(guidance=2.0), options(), tmp_path / "broken")
    assert resumed.step == 3 and resumed.run(every=2, evaluate=lambda run: run.meter())
    one, other = (load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys() and any(name.startswith("target.") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "broken" / "log.jsonl").read_text().count("trajectory_error") == 2


def test_only_the_student_moves(tmp_path: Path) -> None:
    teacher = small_teacher()
    before = [p.detach().clone() for p in teacher.network.parameters()]
    run = TrajectoryRun(teacher, options(), tmp_path)
    run.turn()
    assert all(
        torch.equal(p, old) and p.grad is None for p, old in zip(teacher.network.parameters(), before, strict=True)
    )
    moved = zip(run.generator.parameters(), run.averages["target"].shadow, run.average.shadow, strict=True)
    for live, target, average in moved:
        assert not torch.equal(live, target) and not torch.equal(live, average)


def test_checkpoints_of_other_options_or_beginnings_are_refused(tmp_path: Path) -> None:
    run = run_of(small_teacher(), options(), tmp_path, begin=Velocity(seed=5))
    assert isinstance(run, TrajectoryRun) and run.run()
    with pytest.raises(DiffAccelError, match="other options \\(grid\\)"):
        TrajectoryRun(small_teacher(), options(grid=8), tmp_path, begin=Velocity(seed=5))
    with pytest.raises(DiffAccelError, match="began with another network"):
        TrajectoryRun(small_teacher(), options(), tmp_path)
    with pytest.raises(DiffAccelError, match="other options"):
        run_of(small_teacher(), SIM(steps=6, batch=8, ema_pictures=8), tmp_path)
    whole = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(bytes([*whole[:-100], whole[-100] ^ 1, *whole[-99:]]))
    with pytest.raises(DiffAccelError, match="has not the SHA-256"):
        TrajectoryRun(small_teacher(), options(), tmp_path, begin=Velocity(seed=5))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"segments": (2, 4)}, "the numbers must fall"),
        ({"segments": ()}, "it needs numbers"),
        ({"segments": (3, 1)}, "which 3 segments do not divide"),
        ({"steps": 1, "ema_pictures": 0}, "2 numbers for 1 steps"),
        ({"target_decay": 1.0}, "target_decay is 1.0"),
        ({"c": -1.0}, "c is -1.0"),
        ({"noise_ratio": 2000.0}, "noise_ratio is 2000"),
        ({"ema_pictures": 1000}, "would still be the teacher"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(DiffAccelError, match=text):
        options(**changes)


def _learn(rank: int, size: int, folder: str) -> None:
    if size > 1:
        torch.distributed.init_process_group(
            "gloo", f"file://{folder}/store", timeout=timedelta(seconds=30), rank=rank, world_size=size
        )
    teacher = small_teacher(guidance=2.0)
    teacher.conditions = (0.5,)  # the same for all rows
    TrajectoryRun(teacher, options(), Path(folder, str(size)), processes=Processes(rank, size)).run()
    if size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    _learn(0, 1, str(tmp_path))
    in_processes(_learn, (2, str(tmp_path)), 2)
    one, two = (load_file(tmp_path / str(size) / "checkpoint.safetensors") for size in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=name)
