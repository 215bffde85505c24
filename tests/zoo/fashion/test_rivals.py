"""Rivals of the students: each against a closed form or an exact limit, and all through the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fashion_data import make_data
from torch import Tensor

from diffaccel.distill import SIM
from diffaccel.distill.steps import Draw, frozen
from diffaccel.errors import DiffAccelError
from diffaccel.files import write_json
from scripts.rivals import drifting, fashion, lcm, meanflow, methods
from scripts.rivals import recipe as recipes
from scripts.rivals.bed import Bed
from scripts.rivals.dmd2 import DMD2Run
from scripts.zoo.fashion import classifier, data, job, unet
from scripts.zoo.fashion import recipe as fashion_recipes

MEAN, STD = -0.3, 0.9
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("rivals") / "data")


def bed(pictures: Path, work: Path) -> Bed:
    made = Bed(
        fashion_recipes.TINY, recipes.TINY, data.load(pictures, "train", CPU), work, torch.float32, lambda text: None
    )
    made.__dict__["teacher"] = unet.build(fashion_recipes.TINY, 0).eval()
    return made


def spread(t: Tensor) -> Tensor:
    """Deviation at a time of the linear path from N(MEAN, STD^2) to noise."""
    return ((1 - t) ** 2 * STD**2 + t**2).sqrt()


def velocity(z: Tensor, t: Tensor) -> Tensor:
    """The marginal velocity of that path."""
    slope = (t - (1 - t) * STD**2) / spread(t) ** 2
    return -MEAN + slope * (z - (1 - t) * MEAN)


def average_velocity(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
    """Mean of the velocity along the trajectory through ``(z, t)``, which keeps ``(z - mean) / spread``."""
    at_r = (1 - r) * MEAN + spread(r) / spread(t) * (z - (1 - t) * MEAN)
    return (z - at_r) / (t - r)


def test_the_average_velocity_of_a_gaussian_is_what_meanflow_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(64, generator=generator, dtype=torch.float64)
    r, t = torch.rand(2, 64, generator=generator, dtype=torch.float64).sort(0).values
    value, wanted = meanflow.target(average_velocity, z, r, t, velocity(z, t))
    torch.testing.assert_close(wanted, value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(meanflow.target(average_velocity, z, r, t, velocity(z, t) + 1)[1] - wanted,
                               1 - (t - r) * (1 - spread(r) / spread(t)) / (t - r))  # fmt: skip
    _, plain = meanflow.target(lambda z, r, t: velocity(z, t), z, t, t, z)
    assert torch.equal(plain, z)  # equal times: flow matching


def test_the_forward_slope_of_the_network_is_its_difference_quotient() -> None:
    """Through convolutions, group norms and attention, by both times."""
    network = meanflow.TwoTimes(unet.build(fashion_recipes.TINY, 0)).double()
    generator = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, 3, 1, 32, 32, generator=generator, dtype=torch.float64)
    r, t = torch.tensor([0.1, 0.3, 0.5]).double(), torch.tensor([0.4, 0.9, 0.6]).double()

    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return network(z, 1000 * t, torch.arange(3), span=1000 * (t - r))[0]

    value, wanted = meanflow.target(u, z, r, t, v)
    h = 1e-3  # the waves of time are float32
    with torch.no_grad():
        slope = (u(z + h * v, r, t + h) - u(z - h * v, r, t - h)) / (2 * h)
    torch.testing.assert_close(wanted, v - (t - r)[:, None, None, None] * slope, rtol=5e-3, atol=5e-3)
    meanflow.weighted(value - wanted).backward()
    assert all(p.grad is not None for name, p in network.named_parameters())
    assert torch.equal(network(z, 1000 * t, torch.arange(3))[0], u(z, torch.zeros_like(t), t))


def points(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_drift_is_zero_where_both_sets_are_equal_and_turns_with_them() -> None:
    x, real, drawn = points(2, 5, 3, seed=0), points(2, 7, 3, seed=1), points(2, 7, 3, seed=2)
    for tau in (0.05, 1.0):
        assert float(drifting.field(x, real, real, tau).abs().max()) < 1e-14
        forth, back = drifting.field(x, real, drawn, tau), drifting.field(x, drawn, real, tau)
        torch.testing.assert_close(forth, -back, rtol=1e-12, atol=1e-14)
        assert float(forth.abs().max()) > 1e-3
    near = drifting.field(x, real + 50, x, 1.0, own=True)
    assert bool((near >= 0).all()) and float(near.max()) > 0  # towards pictures that lie to one side


def test_a_wide_kernel_drifts_by_the_difference_of_means() -> None:
    """All affinities are then ``1 / sqrt(n (m + k))``, and V = (m k / (n (m + k))) (mean of y+ - mean of y-)."""
    x, real, drawn = points(1, 4, 3, seed=0), points(1, 6, 3, seed=1), points(1, 6, 3, seed=2)
    expected = 6 * 6 / (4 * 12) * (real.mean(1) - drawn.mean(1))
    found = drifting.field(x, real, drawn, 1e9)
    torch.testing.assert_close(found, expected[:, None].expand_as(found), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_drifting_finds_place_and_width_of_a_gaussian() -> None:
    """A generator ``x = width z + place`` of ten classes, which is at rest where drawings and pictures are alike."""
    generator = torch.Generator().manual_seed(0)
    width, place = (torch.full((2,), value).requires_grad_() for value in (1.0, 0.0))
    optimizer = torch.optim.Adam([width, place], 0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 0.05 if step < 120 else 0.01
        real = 3 + 0.5 * torch.randn(10 * 16, 2, generator=generator)
        x = width * torch.randn(10 * 16, 2, generator=generator) + place
        optimizer.zero_grad()
        drifting.distance([x], [real]).backward()
        optimizer.step()
    assert float((place.detach() - 3).abs().max()) < 0.1 and float((width.detach() - 0.5).abs().max()) < 0.05


def test_features_of_a_constant_picture_have_a_slope() -> None:
    encoder = classifier.build(fashion_recipes.TINY, 0).requires_grad_(False)
    x = torch.zeros(3, 1, 32, 32, requires_grad=True)
    torch.stack([part.sum() for part in drifting.spaces(encoder, x)]).sum().backward()
    assert bool(torch.isfinite(x.grad).all())
    assert [part.shape[1] for part in drifting.spaces(encoder, x)] == [49, 36, 8, 72, 16, 72, 16, 8]


def test_the_fixed_point_of_consistency_is_the_teachers_trajectory() -> None:
    """Of a Gaussian, composed Euler steps are affine at every level: there the loss is zero, elsewhere it is not."""
    grid = 8
    gain, shift = torch.ones(grid + 1).double(), torch.zeros(grid + 1).double()  # f(x, t_n) = gain x + shift
    for place in range(grid):
        t = torch.tensor((place + 1) / grid, dtype=torch.float64)
        at_zero = velocity(torch.zeros((), dtype=torch.float64), t)
        slope = velocity(torch.ones((), dtype=torch.float64), t) - at_zero
        gain[place + 1] = gain[place] * (1 - slope / grid)
        shift[place + 1] = shift[place] - gain[place] * at_zero / grid

    def network(x: Tensor, t: Tensor) -> Tensor:
        row = (t * grid).round().long()
        return (x - gain[row, None] * x - shift[row, None]) / t[:, None]

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t[:, None])

    x, place = points(64, 1, seed=3), torch.arange(64) % grid
    assert float(lcm.distance(network, teacher, x, place, grid)) < 1e-12
    assert float(lcm.distance(teacher, teacher, x, place, grid)) > 1e-3
    drawn = gain[grid] * x + shift[grid]
    euler = x
    for step in range(grid):
        euler = euler - teacher(euler, torch.full((64,), 1 - step / grid, dtype=torch.float64)) / grid
    torch.testing.assert_close(drawn, euler)


def test_the_gradient_of_dmd2_is_the_difference_of_scores_and_the_critics(pictures: Path, tmp_path: Path) -> None:
    """By the drawing: ``w (D_F - D_T)`` a row, constants, and what the critic adds through ``x_t``."""
    made = bed(pictures, tmp_path)
    config = SIM.preset("dmd", batch=10, steps=3, ema_pictures=0)
    run = DMD2Run(made, unet.teacher_of(made.teacher, 10), config, tmp_path / "run", 0)
    with torch.no_grad():
        for p in run.assistant.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    draw = Draw.new(run.teacher, config.generator_law, config, torch.Generator().manual_seed(1), "cpu", (0, 1))
    drawn: list[Tensor] = []

    def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        output[0].retain_grad()
        drawn.append(output[0])

    handle = run.generator.register_forward_hook(keep)
    with frozen(run.teacher.network, run.assistant):
        matching, fooled, _ = run.generator_losses(draw)
        handle.remove()
        level = run.config.student_levels[0]
        by_matching = torch.autograd.grad(matching, drawn[0], retain_graph=True)[0] / -level  # v to x0 = z - level v
        by_critic = torch.autograd.grad(fooled, drawn[0])[0] / -level
        x0 = (draw.z - level * drawn[0]).detach().requires_grad_()
        sigma = draw.sigma[:, None, None, None]
        x_t = (1 - sigma) * x0 + sigma * draw.eps
        v_assistant = run.teacher.ask(run.assistant, x_t, draw.sigma, 0)
        logits = run.assistant.logits
        v_teacher = run.teacher.ask(run.teacher.network, x_t, draw.sigma, 0)
        weight = (x0 - (x_t - sigma * v_teacher)).abs().mean((1, 2, 3), keepdim=True)
        expected = -sigma * (v_assistant - v_teacher) / weight / len(x0)
        torch.testing.assert_close(by_matching, expected.detach(), rtol=1e-3, atol=1e-6)
        (of_critic,) = torch.autograd.grad(torch.nn.functional.softplus(-logits).mean(), x0)
    torch.testing.assert_close(by_critic, of_critic, rtol=1e-3, atol=1e-8)
    assert float(by_critic.abs().max()) > 0 and all(p.grad is None for p in run.assistant.parameters())


@pytest.mark.slow
def test_dmd2_goes_on_to_the_same_bits(pictures: Path, tmp_path: Path) -> None:
    made, config = (
        bed(pictures, tmp_path),
        SIM.preset("dmd", batch=10, steps=2, ema_pictures=10, lr=1e-3, assistant_steps=2),
    )
    runs = {}
    for name in ("whole", "broken"):
        run = DMD2Run(made, unet.teacher_of(made.teacher, 10), config, tmp_path / name, 0)
        if name == "broken":
            run.turn()
            run.step += 1
            run.save()
            run = DMD2Run(made, unet.teacher_of(made.teacher, 10), config, tmp_path / name, 0)
        assert run.run()
        runs[name] = [*run.generator.parameters(), *run.assistant.parameters(), *run.average.shadow]
    assert all(torch.equal(a, b) for a, b in zip(runs["whole"], runs["broken"], strict=True))


def test_rivals_are_named() -> None:
    assert fashion.Entry.parse("dmd2:1") == fashion.Entry("dmd2", 1) and fashion.Entry.parse("lcm").label == "lcm-0"
    with pytest.raises(DiffAccelError, match="Did you mean 'meanflow'"):
        fashion.Entry.parse("meanflw")
    with pytest.raises(DiffAccelError, match="is no rival"):
        fashion.Entry.parse("lcm:a")
    with pytest.raises(DiffAccelError, match="Did you mean 'full'"):
        recipes.get("ful")


@pytest.mark.slow
def test_all_rivals_are_trained_resumed_and_stand_in_one_table(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    common = ["--data", pictures, "--work", work, "--out", out, "--device", "cpu", "--recipe", "tiny", "--minutes", 4]

    def call(command: object, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        command()  # type: ignore[operator]
        return capsys.readouterr().out

    with pytest.raises(SystemExit, match="has no finished teacher"):
        call(fashion.main, *common, "--rivals", "lcm", "--lr", 1e-3)
    call(job.main, *common, "--stages", "classifier,teacher")
    of_student = {"fd": 2.0, "ratio": 1.5, "obeyed": 0.9, "seconds": 5.0, "turns": 7}
    of_teacher = {"2": {"fd": 1.5, "obeyed": 1.0}}
    write_json(out / "report.json", {"teacher": of_teacher, "students": {"sim-1step-0": of_student}})
    stopped = call(fashion.main, *common[:-1], 0.001, "--rivals", "meanflow:0", "--report", out / "report.json")
    assert "meanflow-0 goes on" in stopped or "meanflow-0 is finished" in stopped
    told = call(fashion.main, *common, "--report", out / "report.json")
    made = json.loads((out / "rivals.json").read_text())
    assert set(made["rivals"]) == {"meanflow-0", "drifting-0", "lcm-0", "dmd2-0"}
    assert set(made["students"]) == {"sim-1step-0"} and "sim-1step-0" in told and "teacher, 2 steps" in told
    assert made["teacher_fd"] == 1.5 and made["floor"] > 0
    for row in made["rivals"].values():
        assert row["lr"] in recipes.TINY.rates["lcm"] and row["turns"] > 0 and row["fd"] > 0
    assert [made["rivals"][name]["teacher"] for name in ("meanflow-0", "drifting-0", "lcm-0", "dmd2-0")] == [
        False, False, True, True,
    ]  # fmt: skip
    again = call(fashion.main, *common, "--report", out / "report.json", "--stages", "score")
    assert json.loads((out / "rivals.json").read_text())["rivals"] == made["rivals"] and "ratio" in again


def test_the_table_has_the_nearest_first() -> None:
    row = {"fd": 2.0, "ratio": 1.5, "obeyed": 0.9, "seconds": 5.0, "turns": 7}
    made = {
        "device": "cpu", "pictures": 40, "floor": 0.1, "teacher_seconds": 3.0,
        "rivals": {"lcm-0": {**row, "tuning_seconds": 1.0, "teacher": True},
                   "meanflow-0": {**row, "fd": 1.0, "tuning_seconds": 2.0, "teacher": False}},
        "students": {"sim-1step-0": {**row, "fd": 1.5}}, "teacher": {"50": {"fd": 0.5, "obeyed": 1.0}},
    }  # fmt: skip
    lines = fashion.table(made).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["meanflow-0", "sim-1step-0", "lcm-0", "teacher,"]
    assert "none" in lines[2] and "3.0" in lines[3] and lines[0] == "cpu, 40 pictures each, floor 0.1"


def test_means_of_methods_charge_the_teacher_to_what_begins_with_it() -> None:
    row = {"ratio": 1.5, "obeyed": 0.9, "turns": 7}
    made = {
        "floor": 0.5, "teacher_fd": 1.0, "teacher_seconds": 30.0,
        "rivals": {f"meanflow-{seed}": {**row, "fd": fd, "seconds": 10.0 + seed, "teacher": False}
                   for seed, fd in ((0, 1.0), (1, 2.0))},
        "students": {"sim-1step-0": {**row, "fd": 0.75, "seconds": 9.0}},
    }  # fmt: skip
    found = methods.means(made)
    assert list(found) == ["sim-1step", "meanflow"]
    assert found["meanflow"]["fd_range"] == [1.0, 2.0] and found["meanflow"]["ratio"] == 2.0
    assert found["meanflow"]["seconds"] == found["meanflow"]["seconds_with_teacher"] == 10.5
    assert found["sim-1step"]["ratio"] == 0.5 and found["sim-1step"]["seconds_with_teacher"] == 39.0
    assert "| meanflow | 2 | 1.500 | 1.000 to 2.000 |" in methods.shown(found, 4)
