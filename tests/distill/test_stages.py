"""Stages of distillation of a pipeline: a student of trajectories is saved, draws, and is what sim begins with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import diffaccel
from diffaccel.distill import SIM, TSCD, PipelineTeacher, TrajectoryRun, TrajectoryScheduler
from diffaccel.distill.drawing import generate
from diffaccel.distill.earlier import open_student
from diffaccel.distill.student import scheduler_of, student
from diffaccel.distill.train import distil
from diffaccel.errors import DiffAccelError

TEXTS = ("a", "b", "c")


def options(**changes: Any) -> TSCD:
    return TSCD(**{"steps": 2, "batch": 2, "grid": 4, "segments": (4, 2), "lr": 1e-3, "ema_pictures": 0, **changes})


def call_of(family: str) -> dict[str, Any]:
    call = dict(tiny.call_kwargs(family))
    for name in ("prompt", "generator", "negative_prompt", "output_type"):
        call.pop(name, None)
    return call if family == "flux" else {**call, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of two calls of the tiny flux."""
    folder = tmp_path_factory.mktemp("tscd")
    distil(tiny.make("flux"), TEXTS, options(), folder, name="tiny", arguments=call_of("flux"))
    return folder / "student"


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_the_pipeline_draws_what_training_draws(family: str, tmp_path: Path) -> None:
    config = options(noise_ratio=1000.0 if family == "flux" else 10.0)
    teacher = PipelineTeacher(tiny.make(family), TEXTS, 2, call_of(family))
    run = TrajectoryRun(teacher, config, tmp_path)
    session, pipe = teacher._session(0), student(run)
    latents = torch.randn(session.latents.shape, generator=torch.Generator().manual_seed(5))
    call = {**teacher.arguments, "num_inference_steps": 9, "output_type": "latent"}
    drawn = pipe(["a", "b"], latents=latents, **call).images
    assert type(pipe.scheduler) is TrajectoryScheduler and pipe.scheduler.steps_made == 2
    z, x0 = (session.family.spatial(pipe, x, session.height, session.width) for x in (latents, drawn))
    with torch.no_grad():
        expected = generate(teacher, run.generator, z, 0, config)
    torch.testing.assert_close(x0, expected, rtol=1e-3, atol=1e-3)


def test_a_saved_student_loads_through_diffusers_and_depends_on_its_noise_alone(saved: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.scheduler) is TrajectoryScheduler and len(pipe.scheduler.timesteps) == 2
    call = {**call_of("flux"), "output_type": "latent"}
    one, other = (pipe("a", generator=torch.Generator().manual_seed(3), **call).images for _ in range(2))
    assert torch.equal(one, other)
    known = json.loads((saved / "student.json").read_text())
    assert known["options"]["name"] == "tscd" and known["network_calls"] == 2
    assert "2404.13686" in (saved / "README.md").read_text()


@pytest.mark.slow
def test_sim_begins_with_a_student_of_trajectories(saved: Path, tmp_path: Path) -> None:
    config = SIM(steps=1, batch=2, student_steps=2, noise_ratio=1000.0, ema_pictures=0, lr=1e-9)
    pipe = tiny.make("flux")
    run = distil(pipe, TEXTS, config, tmp_path, name="tiny", arguments=call_of("flux"), begin=saved)
    before = diffaccel.load(saved).transformer
    for ours, theirs in zip(run.generator.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=1e-7)
    teacher = pipe.transformer
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), teacher.parameters(), strict=True))
    for ours, theirs in zip(run.assistant.parameters(), teacher.parameters(), strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
    known = json.loads((tmp_path / "student" / "student.json").read_text())
    assert known["options"]["name"] == "sim" and known["begins_with"]["options"]["name"] == "tscd"
    assert "beginning with a student of tscd" in (tmp_path / "student" / "README.md").read_text()
    with pytest.raises(DiffAccelError, match="began with another network"):
        distil(pipe, TEXTS, config, tmp_path, name="tiny", arguments=call_of("flux"))
    diffaccel.load(tmp_path / "student")


def test_beginnings_that_do_not_fit_are_refused(saved: Path, tmp_path: Path) -> None:
    teacher = PipelineTeacher(tiny.make("flux"), TEXTS, 2, call_of("flux"))
    fits: dict[str, Any] = {"batch": 2, "student_steps": 2, "noise_ratio": 1000.0, "ema_pictures": 0}
    assert open_student(saved, teacher, SIM(**fits)).provenance["options"]["grid"] == 4
    open_student(saved, teacher, options(segments=(2, 1)))  # trajectories need the first level alone
    with pytest.raises(DiffAccelError, match=r"draws in 2 calls from noise_ratio 1000.*--sim.noise-ratio 1000"):
        open_student(saved, teacher, SIM(**{**fits, "noise_ratio": 2.5}))
    with pytest.raises(DiffAccelError, match="this stage in 1 from 1000"):
        open_student(saved, teacher, SIM(**{**fits, "student_steps": 1}))
    with pytest.raises(DiffAccelError, match="is no student to begin with"):
        open_student(tmp_path, teacher, SIM(**fits))
    with torch.no_grad():
        next(teacher.network.parameters()).add_(1)
    with pytest.raises(DiffAccelError, match="of another teacher, or of one with other weights"):
        open_student(saved, teacher, SIM(**fits))


def test_levels_beyond_those_of_the_training_are_refused() -> None:
    teacher = PipelineTeacher(tiny.make("sd"), TEXTS, 2, call_of("sd"))
    alphas = teacher.pipe.scheduler.alphas_cumprod[-1]
    assert teacher.largest_ratio == pytest.approx(float(((1 - alphas) / alphas).sqrt()), rel=1e-5)
    with pytest.raises(DiffAccelError, match=r"noise_ratio is 1000, but .* was trained up to"):
        scheduler_of(teacher, options())
    assert PipelineTeacher(tiny.make("flux"), TEXTS, 2, call_of("flux")).largest_ratio == float("inf")


def _truncate(network: Path) -> None:
    weights = network / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])


def _change(network: Path, spoil: bool) -> None:
    weights = network / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensor = tensors.pop("proj_out.bias")
    save_file({**tensors, "proj_out.bias": tensor.fill_(torch.nan)} if spoil else tensors, weights)


def _retell(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder / "transformer"), "there is no such folder"),
        (lambda folder: _truncate(folder / "transformer"), "no network to begin with"),
        (lambda folder: _change(folder / "transformer", False), "it lacks the weight 'proj_out.bias'"),
        (lambda folder: _change(folder / "transformer", True), "'proj_out.bias' holds NaN or infinite values"),
        (lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text("[]"), "is no student to begin"),
        (lambda folder: _retell(folder / "student.json", options=[]), "its options are no table"),
    ],
    ids=["gone", "cut off", "a weight missing", "nan", "scheduler", "options"],
)
def test_a_damaged_student_is_named(saved: Path, tmp_path: Path, damage: Any, sentence: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "student"))
    damage(folder)
    teacher = PipelineTeacher(tiny.make("flux"), TEXTS, 2, call_of("flux"))
    with pytest.raises(DiffAccelError, match=sentence):
        open_student(folder, teacher, options())
