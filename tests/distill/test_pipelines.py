"""Pipelines as teachers: asked as they ask themselves, distilled, and their students saved and loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_more
import tiny_others
import torch

import diffaccel
from diffaccel.distill.run import Distillation
from diffaccel.distill.sim import SIM
from diffaccel.distill.student import PROVENANCE, save, scheduler_of, student
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.distill.train import distil
from diffaccel.errors import DiffAccelError
from diffaccel.families import network

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


@pytest.mark.slow
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
    own = student(run)
    for loaded, kept in zip(*(network(made).parameters() for made in (pipe, own)), strict=True):
        assert torch.equal(loaded, kept)
    of_loaded, of_made = (made("a", generator=torch.Generator().manual_seed(3), **call).images for made in (pipe, own))
    torch.testing.assert_close(of_loaded, of_made, rtol=1e-4, atol=1e-5)  # sums differ by where weights lie in memory
    session = teacher._session(0)
    z = session.family.spatial(pipe, session.latents, session.height, session.width)
    assert pipe.scheduler.config.s == pytest.approx(float(teacher.coefficients(torch.tensor([2.5 / 3.5]))[1]), rel=1e-5)
    assert bool(torch.isfinite(of_loaded).all()) and z.shape[1:] == teacher.shape
    diffaccel.remove(teacher.pipe)


def test_the_student_at_the_start_is_the_teacher_in_one_call(tmp_path: Path) -> None:
    """What the scheduler draws is what training draws: the same noise, the same picture."""
    from diffaccel.distill.drawing import generate

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


def arguments_of(family: str, **changes: Any) -> dict[str, Any]:
    call = tiny.call_kwargs(family)
    for name in ("prompt", "generator", "output_type"):
        call.pop(name)
    return {**call, "negative_prompt": "blue", **changes}


@pytest.mark.parametrize(
    ("family", "changes", "text"),
    [
        ("sd", {"guidance_rescale": 0.7}, "without guidance_rescale"),
        ("sd", {"num_images_per_prompt": 2}, "num_images_per_prompt is 2"),
        ("sd", {"prompt": "x"}, "arguments has prompt"),
        ("sd", {"prompt_embeds": torch.zeros(2, 3, 4)}, "arguments has prompt_embeds"),
        ("sd", {"negative_prompt": ["x"]}, "Give one text"),
    ],
)
def test_calls_that_a_teacher_does_not_follow_are_refused(family: str, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(DiffAccelError, match=text):
        PipelineTeacher(tiny.make(family), ("a", "b"), 2, arguments_of(family, **changes))


def test_prompts_are_a_list_of_texts_for_a_pipeline_that_takes_some() -> None:
    for prompts in ("abc", [1, 2]):
        with pytest.raises(DiffAccelError, match="must be a list of texts"):
            PipelineTeacher(tiny.make("sd"), prompts, 2)  # type: ignore[arg-type]
    with pytest.raises(DiffAccelError, match=r"Take PipelineTeacher\(batch=2\)"):
        Distillation(PipelineTeacher(tiny.make("sd"), ("a",), 1), OPTIONS, "nowhere")
    with pytest.raises(DiffAccelError, match=r"batch is 0"):
        PipelineTeacher(tiny.make("sd"), ("a",), 0)
    for family in ("dit", "ddpm"):
        with pytest.raises(DiffAccelError, match="takes no prompt"):
            PipelineTeacher(tiny_more.make(family), ("a",), 2)


@pytest.mark.parametrize("name", ["chroma", "ltx"])
def test_a_pipeline_that_nobody_listed_is_distilled(name: str, tmp_path: Path) -> None:
    call = tiny_others.call_kwargs(name)
    call = {key: call[key] for key in ("height", "width", "num_frames", "guidance_scale") if key in call}
    call |= {"max_sequence_length": 24, "negative_prompt": "blue"}
    run = distil(tiny_others.make(name), ("a", "b"), OPTIONS, tmp_path, arguments=call)
    assert run.step == 2 and run.teacher.guidance == call["guidance_scale"]
    pipe = diffaccel.load(tmp_path / "student")
    call |= {"guidance_scale": 1.0, "output_type": "latent"}
    assert bool(torch.isfinite(torch.as_tensor(pipe("a", **call)[0])).all())


def test_published_settings_are_refused_before_training_where_no_student_can_be_saved(tmp_path: Path) -> None:
    config = SIM.paper(steps=2, batch=2, ema_pictures=0)
    with pytest.raises(DiffAccelError, match="start='unit'"):
        distil(tiny.make("flux"), ("a", "b"), config, tmp_path, arguments=arguments_of("flux"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_teacher_of_16_bits_learns_by_default_and_its_student_keeps_the_dtype_of_each_weight(tmp_path: Path) -> None:
    pipe = tiny.make("flux").to(torch.bfloat16)
    pipe.transformer.proj_out.float()
    with pytest.raises(DiffAccelError, match="Leave dtype out"):
        distil(pipe, ("a", "b"), OPTIONS, tmp_path, arguments=arguments_of("flux"), dtype=torch.float32)
    run = distil(pipe, ("a", "b"), OPTIONS, tmp_path, arguments=arguments_of("flux"))
    assert run.dtype == torch.bfloat16
    ours, own = (dict(network.named_parameters()) for network in (student(run).transformer, pipe.transformer))
    assert {key: p.dtype for key, p in ours.items()} == {key: p.dtype for key, p in own.items()}
    assert own["proj_out.weight"].dtype == torch.float32 != own["x_embedder.weight"].dtype


def test_networks_that_have_no_plain_copy_are_refused(tmp_path: Path) -> None:
    from diffaccel.quant import W8A8

    pipe = tiny.make("flux")
    diffaccel.accelerate(pipe, W8A8())
    with pytest.raises(DiffAccelError, match="before it is quantized"):
        distil(pipe, ("a", "b"), OPTIONS, tmp_path, arguments=arguments_of("flux"))
    from peft import LoraConfig

    pipe = tiny.make("flux")
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(DiffAccelError, match="fuse_lora"):
        distil(pipe, ("a", "b"), OPTIONS, tmp_path, arguments=arguments_of("flux"))


def test_a_student_keeps_the_switches_of_its_pipeline(tmp_path: Path) -> None:
    pipe = tiny_more.make("wan5b")
    call = tiny_more.call_kwargs("wan5b")
    for name in ("prompt", "generator", "output_type"):
        call.pop(name, None)
    run = Distillation(PipelineTeacher(pipe, ("a", "b"), 2, {**call, "negative_prompt": "b"}), OPTIONS, tmp_path)
    assert pipe.config.expand_timesteps and student(run).config.expand_timesteps


@pytest.mark.slow
def test_another_prompt_or_size_is_not_the_run_of_a_checkpoint(tmp_path: Path) -> None:
    pipe = tiny.make("sd")
    for prompts, changes, text in (
        (("a", "b"), {}, ""),
        (("a", "c"), {}, "prompts"),
        (("a", "b"), {"negative_prompt": "red"}, "negative_prompt"),
        (("a", "b"), {"height": 48}, "height|shape"),
        (("a", "b"), {"guidance_scale": 2.0}, "guidance"),
    ):
        teacher = PipelineTeacher(pipe, prompts, 2, arguments_of("sd", **changes))
        if text:
            with pytest.raises(DiffAccelError, match=f"another way .*({text})"):
                Distillation(teacher, OPTIONS, tmp_path)
        else:
            Distillation(teacher, OPTIONS, tmp_path).run()


def test_a_student_that_is_there_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Distillation(teacher_of("sd"), OPTIONS, tmp_path / "run")
    folder = save(run, tmp_path / "student", "the first")
    (folder / "of the first").touch()
    before = {path.name for path in folder.iterdir()}

    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sys.modules[save.__module__], "write_text", stopped)  # the last of its files
        save(run, folder, "the second")
    assert {path.name for path in folder.iterdir()} == before
    assert json.loads((folder / PROVENANCE).read_text())["teacher"] == "the first"
    save(run, folder, "the second")
    assert json.loads((folder / PROVENANCE).read_text())["teacher"] == "the second"
    assert {path.name for path in folder.iterdir()} == before - {"of the first"}
    diffaccel.remove(run.source.pipe)
