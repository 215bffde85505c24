"""Pipelines as teachers: asked as they ask themselves, distilled, and their students saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import diffaccel
from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import SIM
from diffaccel.distill.student import PROVENANCE, save, scheduler_of, student
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.errors import DiffAccelError

OPTIONS = SIM(steps=2, batch=2, lr=1e-3, ema_pictures=0)


def teacher_of(family: str, guidance: bool = False) -> PipelineTeacher:
    pipe = tiny.make(family)
    call = dict(tiny.call_kwargs(family))
    call.pop("prompt")
    for name in ("generator", "negative_prompt"):
        call.pop(name, None)
    if family == "flux":
        call |= {"true_cfg_scale": 2.0, "negative_prompt": "blue"} if guidance else {}
    else:
        call["guidance_scale"] = 2.0 if guidance else 1.0
    return PipelineTeacher(pipe, ("a", "b", "c"), 2, call)


def network_calls(teacher: PipelineTeacher, make_call: Any) -> list[dict[str, Any]]:
    """Return the arguments of every network call."""
    seen: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        import inspect

        names = list(inspect.signature(module.forward).parameters)
        seen.append({**dict(zip(names, args, strict=False)), **kwargs})

    handle = teacher.network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        make_call()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_network_is_asked_as_its_pipeline_asks_it(family: str) -> None:
    teacher = teacher_of(family)
    pipe, session = teacher.pipe, teacher._session(0)
    call = {**teacher.arguments, "output_type": "latent"}
    stock = network_calls(teacher, lambda: pipe(["a", "b"], generator=torch.Generator().manual_seed(0), **call))[0]
    name = session.family.latent_arg
    x = session.family.spatial(pipe, stock[name], session.height, session.width)
    first = session.sigmas[0]
    sigma = first / (1 + first) if float(session.path.alpha(first)) == 1 and session.schedule.vp else first
    own = network_calls(teacher, lambda: teacher.ask(teacher.network, x, sigma.expand(2), 0))[0]
    assert set(own) - {"return_dict"} == {key for key, value in stock.items() if value is not None} - {
        "return_dict"
    } | {key for key, value in own.items() if value is None}
    for key, value in stock.items():
        if isinstance(value, torch.Tensor):
            ours, theirs = torch.broadcast_tensors(own[key].to(value.dtype), value)
            torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_is_saved_loaded_and_draws_in_one_call(family: str, tmp_path: Path) -> None:
    teacher = teacher_of(family, guidance=True)
    assert teacher.guidance == 2.0 and teacher.groups == 2
    run = Distillation(teacher, OPTIONS, tmp_path / "run")
    assert run.run()
    folder = save(run, tmp_path / "student", "a tiny teacher")
    assert (folder / PROVENANCE).is_file()
    pipe = diffaccel.load(folder)
    size = {k: teacher.arguments[k] for k in ("height", "width", "max_sequence_length") if k in teacher.arguments}
    off = {"true_cfg_scale": 1.0} if family == "flux" else {"guidance_scale": 1.0}
    call = {**size, **off, "num_inference_steps": 7, "output_type": "latent"}
    of_loaded, of_made = (
        made("a", generator=torch.Generator().manual_seed(3), **call).images for made in (pipe, student(run))
    )
    torch.testing.assert_close(of_loaded, of_made, rtol=0, atol=0)
    session = teacher._session(0)
    z = session.family.spatial(pipe, session.latents, session.height, session.width)
    assert pipe.scheduler.config.s == pytest.approx(float(teacher.coefficients(torch.tensor([2.5 / 3.5]))[1]), rel=1e-5)
    assert bool(torch.isfinite(of_loaded).all()) and z.shape[1:] == teacher.shape
    diffaccel.remove(teacher.pipe)


def test_the_student_at_the_start_is_the_teacher_in_one_call(tmp_path: Path) -> None:
    """What the scheduler draws is what training draws: the same noise, the same picture."""
    from diffaccel.distill.steps import generate

    teacher = teacher_of("flux")
    run = Distillation(teacher, OPTIONS, tmp_path)
    session = teacher._session(0)
    pipe = student(run)
    seeds = torch.Generator().manual_seed(5)
    latents = torch.randn(session.latents.shape, generator=seeds)
    call = {**teacher.arguments, "output_type": "latent"}
    drawn = pipe(["a", "b"], latents=latents, **call).images
    z = session.family.spatial(pipe, latents, session.height, session.width)
    with torch.no_grad():
        x0 = generate(teacher, run.generator, z, 0, OPTIONS)
    torch.testing.assert_close(
        session.family.spatial(pipe, drawn, session.height, session.width), x0, rtol=1e-4, atol=1e-4
    )


def test_errors_of_teachers() -> None:
    with pytest.raises(DiffAccelError, match="No prompts"):
        PipelineTeacher(tiny.make("flux"), (), 2)
    with pytest.raises(DiffAccelError, match="start='unit'"):
        scheduler_of(teacher_of("flux"), SIM(start="scaled", ema_pictures=0))
    assert scheduler_of(teacher_of("sd"), SIM(start="scaled", ema_pictures=0)).config.start == "scaled"
