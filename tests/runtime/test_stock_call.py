"""``Scheduler()`` on calls that the native driver cannot follow: the pipeline's own call, counted from outside."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import tiny
import tiny_more
import tiny_others
import tiny_variants
import torch
import toy

import diffaccel
from diffaccel.errors import DiffAccelError, UnsupportedBySampler
from diffaccel.runtime import call as runtime_call
from diffaccel.samplers import Euler, Heun, Scheduler

UNFOLLOWED = (
    "controlnet", "residual", "squared time", "no time", "taller", "truncated", "interval", "two networks", "perturbed",
    "inpainting", "clipped", "rescaled in place",
)  # fmt: skip


def last_run(pipe: Any) -> dict[str, Any]:
    last = diffaccel.summary(pipe).last_run
    assert last is not None
    return last


@pytest.mark.parametrize("does", UNFOLLOWED)
def test_every_habit_of_a_loop(does: str) -> None:
    pipe = toy.make()
    before = pipe(**toy.call_kwargs(does))["latents"]
    scheduler_class = type(pipe.scheduler)
    diffaccel.accelerate(pipe, Scheduler())
    for _ in range(2):  # the second call is not watched again
        assert torch.equal(pipe(**toy.call_kwargs(does))["latents"], before)
    last = last_run(pipe)
    assert last["path"] == "stock call"
    assert (last["steps"], last["nfe"]) == (6, 12) and "nfe" not in last["not_counted"]
    assert type(pipe.scheduler) is scheduler_class and "step" not in vars(pipe.scheduler)
    assert not pipe.transformer._forward_pre_hooks


def test_what_is_counted_and_what_is_not() -> None:
    pipe = diffaccel.accelerate(toy.make(), Scheduler())
    pipe(**toy.call_kwargs("controlnet"))
    last = last_run(pipe)
    assert last["report"]["networks"] == {"controlnet": 6, "transformer": 12}
    assert (last["calls"], last["forwards"]) == (12, 24)  # a ControlNet predicts nothing
    assert last["not_counted"] == ["decodes", "nfe_by_resolution"] and "second network" in last["report"]["reason"]
    pipe(**toy.call_kwargs())
    assert last_run(pipe)["path"] == "native" and last_run(pipe)["not_counted"] == []


def test_a_callback_that_changes_the_prompt_or_the_guidance(caplog: pytest.LogCaptureFixture) -> None:
    def swap(pipe: Any, i: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": tensors["prompt_embeds"] * 0.5} if i == 1 else {}

    inputs = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    pipe = toy.make()
    before = pipe(**toy.call_kwargs(**inputs))["latents"]
    diffaccel.accelerate(pipe, Scheduler(max_batch=1))
    assert torch.equal(pipe(**toy.call_kwargs(**inputs))["latents"], before)
    assert "max_batch=1 was not applied" in caplog.text


def test_a_tensor_that_a_callback_returns_without_asking() -> None:
    """Every tensor that the pipeline's own loop takes over is taken over."""

    def swap(pipe: Any, i: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.zeros(4, 16, 32)} if i == 1 else {}

    pipe = tiny_others.make("ltx")
    before = tiny_others.latents_of(pipe(**tiny_others.call_kwargs("ltx"), callback_on_step_end=swap))
    diffaccel.accelerate(pipe, Scheduler())
    after = tiny_others.latents_of(pipe(**tiny_others.call_kwargs("ltx"), callback_on_step_end=swap))
    assert torch.equal(before, after)
    assert not torch.equal(before, tiny_others.latents_of(pipe(**tiny_others.call_kwargs("ltx"))))


def test_the_old_callback_of_stable_diffusion() -> None:
    steps: list[tuple[int, torch.Tensor]] = []
    pipe = tiny.make("sd")
    old = {"callback": lambda i, t, latents: steps.append((i, latents.clone())), "callback_steps": 2}
    with pytest.warns(FutureWarning, match="callback"):
        before = pipe(**tiny.call_kwargs("sd"), **old).images
        stock = steps.copy()
        steps.clear()
        diffaccel.accelerate(pipe, Scheduler())
        assert torch.equal(pipe(**tiny.call_kwargs("sd"), **old).images, before)
    assert len(steps) == 2 and all(i == j and torch.equal(a, b) for (i, a), (j, b) in zip(steps, stock, strict=True))


def test_options_whose_rule_is_the_pipelines_own() -> None:
    pipe = tiny_more.make("cogvideox")

    def run() -> torch.Tensor:
        return tiny_more.result(pipe(**tiny_more.call_kwargs("cogvideox"), use_dynamic_cfg=True)).clone()

    before = run()
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(run(), before) and "use_dynamic_cfg" in last_run(pipe)["report"]["reason"]


def test_the_refused_attempt_leaves_no_trace() -> None:
    """Noise from torch's own state, drawn while the call prepares, is that of the plain call."""
    pipe = toy.make()
    torch.manual_seed(3)
    before = pipe(**toy.call_kwargs("inpainting", generator=None))["latents"]
    later = torch.rand(1)
    diffaccel.accelerate(pipe, Scheduler())
    torch.manual_seed(3)
    assert torch.equal(pipe(**toy.call_kwargs("inpainting", generator=None))["latents"], before)
    assert torch.equal(torch.rand(1), later)


def test_an_attempt_that_fails_after_the_preparation_is_rewound(monkeypatch: pytest.MonkeyPatch) -> None:
    """By then latents were drawn from the caller's generators."""
    pipe = tiny.make("flux")
    kwargs = tiny.call_kwargs("flux")
    before = pipe(**kwargs).images
    states = [g.get_state() for g in kwargs["generator"]]

    def refuse(*args: Any) -> Any:
        raise DiffAccelError("not followed")

    monkeypatch.setattr(runtime_call, "make_session", refuse)
    diffaccel.accelerate(pipe, Scheduler())
    kwargs = tiny.call_kwargs("flux")
    assert torch.equal(pipe(**kwargs).images, before) and last_run(pipe)["report"]["reason"] == "not followed"
    assert all(torch.equal(g.get_state(), s) for g, s in zip(kwargs["generator"], states, strict=True))


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_a_controlnet(family: str) -> None:
    pipe = tiny_variants.controlnet(family)
    before = pipe(**tiny_variants.controlnet_kwargs(family)).images
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(pipe(**tiny_variants.controlnet_kwargs(family)).images, before)
    assert last_run(pipe)["report"]["networks"]["controlnet"] == last_run(pipe)["steps"]


def test_a_scheduler_that_no_sampler_follows() -> None:
    parts = tiny.make("sd").components
    pipe = diffusers.StableDiffusionPAGPipeline(
        **{**parts, "scheduler": diffusers.EDMEulerScheduler()}, requires_safety_checker=False, pag_applied_layers="mid"
    )
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"pag_scale": 3.0, "guidance_scale": 1.0}
    call = {k: v for k, v in tiny.call_kwargs("sd").items() if k not in kwargs}
    before = pipe(**call, **kwargs).images
    diffaccel.accelerate(pipe, Scheduler())
    call = {k: v for k, v in tiny.call_kwargs("sd").items() if k not in kwargs}
    assert torch.equal(pipe(**call, **kwargs).images, before)


def test_a_copy_of_the_scheduler_steps_itself() -> None:
    """Pipelines of sound and picture step one of each; some ask for the very class of their scheduler."""

    def look(pipe: Any, i: int, t: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
        return {}

    for sampler in (Scheduler(), Euler()):
        pipe = toy.make()
        before = pipe(**toy.call_kwargs("second stream"))["latents"]
        diffaccel.accelerate(pipe, sampler)
        assert torch.equal(pipe(**toy.call_kwargs("second stream", callback_on_step_end=look))["latents"], before)
        assert last_run(pipe)["steps"] == 6
    diffaccel.accelerate(diffaccel.remove(pipe), Heun())
    with pytest.raises(UnsupportedBySampler, match="steps a copy of its scheduler"):
        pipe(**toy.call_kwargs("second stream"))


def test_errors_of_the_call_are_the_callers_own() -> None:
    def fail(*args: Any) -> Any:
        raise LookupError("of the caller")

    pipe = diffaccel.accelerate(toy.make(), Scheduler())
    with pytest.raises(LookupError, match="of the caller"):
        pipe(**toy.call_kwargs("inpainting", callback_on_step_end=fail))
    with pytest.raises(TypeError, match="unknown_option"):
        pipe(**toy.call_kwargs("inpainting", unknown_option=1))
    pipe = diffaccel.accelerate(tiny.make("flux"), Scheduler())
    with pytest.raises(DiffAccelError, match="num_inference_steps is 0"):
        pipe(**{**tiny.call_kwargs("flux"), "num_inference_steps": 0})


def test_the_order_of_the_arithmetic_is_the_pipelines() -> None:
    """Three ways to write guidance are known; another one is left to the pipeline itself."""
    paths = []
    for does in ("plain", "weighted", "halves"):
        pipe = toy.make()
        before = pipe(**toy.call_kwargs(does))["latents"]
        diffaccel.accelerate(pipe, Scheduler())
        assert torch.equal(pipe(**toy.call_kwargs(does))["latents"], before)
        paths.append(last_run(pipe)["path"])
    assert paths == ["native", "native", "stock call"]
