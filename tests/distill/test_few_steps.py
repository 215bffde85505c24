"""Students of a few steps: closed forms of what they draw, gradients, checkpoints, and their pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distill_toys import Velocity, gaussian_teacher, small_teacher
from torch import Tensor

import diffaccel
from diffaccel.distill.drawing import generate
from diffaccel.distill.run import Distillation
from diffaccel.distill.scheduler import SIMFewStepScheduler, SIMOneStepScheduler
from diffaccel.distill.sim import SIM
from diffaccel.distill.steps import Draw, assistant_loss, generator_step
from diffaccel.distill.student import save, scheduler_of, student
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.errors import DiffAccelError

MEAN, STD = -0.3, 0.9


def options(calls: int, **changes: Any) -> SIM:
    return SIM(**{"student_steps": calls, "steps": 4, "batch": 8, "lr": 1e-3, "ema_pictures": 8, **changes})


def posterior(x: Tensor, sigma: float) -> Tensor:
    """Return E[x0 | x] of data N(MEAN, STD^2) on the linear path."""
    a = 1 - sigma
    return MEAN + a * STD**2 / (a * a * STD**2 + sigma**2) * (x - a * MEAN)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_levels_fall_evenly_from_the_first() -> None:
    assert options(1).student_levels == pytest.approx([2.5 / 3.5])
    assert options(4).student_levels == pytest.approx([share * 2.5 / 3.5 for share in (1, 0.75, 0.5, 0.25)])
    with pytest.raises(DiffAccelError, match="student_steps is 0"):
        options(0)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_gaussian_is_drawn_as_its_closed_form_says(steps: int) -> None:
    teacher, config = gaussian_teacher(MEAN, STD), options(steps)
    z, fresh = normal(64, 1), normal(steps - 1, 64, 1, seed=1)
    x = z
    turn = torch.arange(64) % steps
    expected, stopped = z, z.clone()
    for call, sigma in enumerate(config.student_levels):
        expected = posterior(x, sigma)
        stopped[turn == call] = expected[turn == call]
        if call + 1 < steps:
            level = config.student_levels[call + 1]
            x = (1 - level) * expected + level * fresh[call]
    noise = fresh if steps > 1 else None
    with torch.no_grad():
        drawn = generate(teacher, teacher.network, z, 0, config, noise)
        of_turn = generate(teacher, teacher.network, z, 0, config, noise, turn)
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(of_turn, stopped, rtol=1e-6, atol=1e-6)


def test_the_noise_of_one_step_does_not_depend_on_the_option() -> None:
    teacher = small_teacher()
    draws = []
    for steps in (1, 3):
        generator, config = torch.Generator().manual_seed(4), options(steps)
        draws.append(Draw.new(teacher, config.generator_law, config, generator, "cpu", (0, 1)))
    one, few = draws
    for name in ("z", "eps", "sigma"):
        assert torch.equal(getattr(one, name), getattr(few, name))
    assert one.fresh is None and one.call_of_row is None and few.fresh is not None and few.fresh.shape == (2, 8, 2)


def test_rows_at_their_first_call_are_those_of_a_student_of_one_step() -> None:
    teacher, z = small_teacher(), normal(6, 2).float()
    turn = torch.tensor([0, 1, 0, 2, 0, 1])
    with torch.no_grad():
        one = generate(teacher, teacher.network, z, 0, options(1))
        few = generate(teacher, teacher.network, z, 0, options(3), normal(2, 6, 2, seed=1).float(), turn)
    torch.testing.assert_close(few[turn == 0], one[turn == 0], rtol=1e-6, atol=1e-6)
    assert not torch.isclose(few[turn > 0], one[turn > 0]).any()


def test_gradients_run_through_the_last_call_alone() -> None:
    teacher, generator, config = small_teacher(), Velocity(seed=1), options(2)
    z, fresh = normal(8, 2).float(), normal(1, 8, 2, seed=1).float()
    generate(teacher, generator, z, 0, config, fresh).sum().backward()
    own = [p.grad.clone() for p in generator.parameters() if p.grad is not None]
    generator.zero_grad()
    with torch.no_grad():
        x0 = generate(teacher, generator, z, 0, config, fresh, torch.zeros(8, dtype=torch.long))
    level = config.student_levels[1]
    x, sigma = (1 - level) * x0 + level * fresh[0], torch.full((8,), level)
    (x - level * teacher.ask(generator, x, sigma, 0)).sum().backward()
    for ours, p in zip(own, generator.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-5, atol=1e-6)


def test_processes_and_memory_savings_see_the_same_draws() -> None:
    teacher, config, generator = small_teacher(), options(3), torch.Generator()
    teacher.conditions = tuple(float(i) for i in range(6))
    parts = [
        Draw.new(teacher, config.generator_law, config, generator.manual_seed(4), "cpu", share)
        for share in ((0, 1), (0, 2), (1, 2))
    ]
    assert torch.equal(torch.cat([part.call_of_row for part in parts[1:]]), parts[0].call_of_row)  # type: ignore[misc]
    assert torch.equal(torch.cat([part.fresh for part in parts[1:]], dim=1), parts[0].fresh)  # type: ignore[misc]
    gradients = []
    for sequential in (False, True):
        network, assistant = Velocity(seed=1), Velocity(seed=2)
        generator_step(teacher, network, assistant, parts[0], options(3, sequential=sequential))
        gradients.append([p.grad for p in network.parameters()])
    for joint, one_at_a_time in zip(*gradients, strict=True):
        torch.testing.assert_close(one_at_a_time, joint, rtol=1e-4, atol=1e-6)


def test_the_last_call_alone_is_matched_where_that_is_asked_for() -> None:
    teacher = small_teacher()
    for match, calls in (("mixture", {0, 1, 2}), ("last", {2})):
        config = options(3, batch=64, student_match=match)
        draw = Draw.new(teacher, config.generator_law, config, torch.Generator().manual_seed(0), "cpu", (0, 1))
        assert draw.call_of_row is not None and set(draw.call_of_row.tolist()) == calls
    with pytest.raises(DiffAccelError, match="student_match is last, which has no effect with student_steps=1"):
        options(1, student_match="last")


def test_a_student_whose_drawings_are_the_data_is_at_rest() -> None:
    """Where every call draws the data, assistant and teacher agree: the generator's gradient is zero."""
    teacher, config = gaussian_teacher(MEAN, STD), options(2, distance="l2")
    draw = Draw.new(teacher, config.generator_law, config, torch.Generator().manual_seed(0), "cpu", (0, 1))
    generator, assistant = gaussian_teacher(0.5, 1.3).network, gaussian_teacher(MEAN, STD).network
    generator_step(teacher, generator, assistant, draw, config)
    assert all(float(p.grad.abs().max()) < 1e-6 for p in generator.parameters() if p.grad is not None)
    assert float(assistant_loss(teacher, generator, assistant, draw, config).detach()) > 0


def test_a_killed_run_of_two_steps_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole = Distillation(small_teacher(), options(2), tmp_path / "whole")
    assert whole.run()
    broken = Distillation(small_teacher(), options(2), tmp_path / "broken")
    broken.turn()
    broken.step += 1
    broken.save()
    with pytest.raises(DiffAccelError, match="other options \\(student_steps\\)"):
        Distillation(small_teacher(), options(1), tmp_path / "broken")
    resumed = Distillation(small_teacher(), options(2), tmp_path / "broken")
    assert resumed.run() and resumed.step == 4
    for ours, theirs in zip(resumed.generator.parameters(), whole.generator.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def teacher_of(family: str) -> PipelineTeacher:
    call = dict(tiny.call_kwargs(family))
    for name in ("prompt", "generator", "negative_prompt"):
        call.pop(name, None)
    if family != "flux":
        call["guidance_scale"] = 1.0
    return PipelineTeacher(tiny.make(family), ("a", "b", "c"), 2, call)


@pytest.mark.parametrize(("family", "start"), [("flux", "unit"), ("sd", "unit"), ("sd", "scaled")])
def test_the_pipeline_draws_what_training_draws(family: str, start: str, tmp_path: Path) -> None:
    teacher, config = teacher_of(family), options(2, batch=2, start=start)
    run = Distillation(teacher, config, tmp_path)
    session, pipe = teacher._session(0), student(run)
    latents = torch.randn(session.latents.shape, generator=torch.Generator().manual_seed(5))
    call = {**teacher.arguments, "num_inference_steps": 9, "output_type": "latent"}
    drawn = pipe(["a", "b"], latents=latents, **call).images
    scheduler = pipe.scheduler
    assert type(scheduler) is SIMFewStepScheduler and scheduler.steps_made == 2
    scheduler.steps_made = 1  # where the noise of the second call was made
    spatial = [session.family.spatial(pipe, x, session.height, session.width) for x in (latents, drawn)]
    fresh = session.family.spatial(pipe, scheduler._noise(latents), session.height, session.width)[None]
    with torch.no_grad():
        x0 = generate(teacher, run.generator, spatial[0], 0, config, fresh)
    torch.testing.assert_close(spatial[1], x0, rtol=1e-3, atol=1e-3)


def test_a_student_of_four_steps_is_saved_and_a_picture_depends_on_its_seed_alone(tmp_path: Path) -> None:
    teacher = teacher_of("flux")
    run = Distillation(teacher, options(4, batch=2, steps=1, ema_pictures=0), tmp_path / "run")
    assert run.run()
    pipe = diffaccel.load(save(run, tmp_path / "student", "a tiny teacher"))
    assert type(pipe.scheduler) is SIMFewStepScheduler and len(pipe.scheduler.timesteps) == 4
    assert "draws in 4 network calls" in (tmp_path / "student" / "README.md").read_text()
    size = {k: teacher.arguments[k] for k in ("height", "width", "max_sequence_length") if k in teacher.arguments}

    def draw(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        torch.manual_seed(sum(seeds))  # has no effect
        return pipe(["a"] * len(seeds), generator=generators, output_type="latent", **size).images

    both, alone = draw([3, 4]), draw([4])
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[:1], alone, atol=1e-2)
    one = scheduler_of(teacher, options(1))
    assert type(one) is SIMOneStepScheduler
    assert tuple(pipe.scheduler.config.levels[0]) == pytest.approx((one.config.a, one.config.s, one.config.timestep))
