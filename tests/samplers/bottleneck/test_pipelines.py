"""Stages on tiny pipelines of every family that draws at more than one size."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny
import tiny_more
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.samplers import Bottleneck, Euler, Heun, Scheduler, TaylorSeer
from diffaccel.session import Pred
from tests.support.small_pipelines import Drifting, draw, make

FAST = ("flux", "sdxl", "wan")  # of each kind one
FAMILIES = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in (*tiny.FAMILIES, "wan", "hunyuan", "cogvideox")
]
RULES = {
    "speed": Bottleneck(preset="speed", tolerance=0.2, spectrum=(3.0, 1.4)),
    "bottleneck": Bottleneck(
        preset="bottleneck", scales=(1.0, 0.5, 1.0), stage_steps=(1, 2, 1), starts=(1.0, 0.8, 0.6)
    ),
    "lightx2v": Bottleneck(preset="lightx2v", scales=(0.5, 1.0)),
    "selflift-zero": Bottleneck(preset="selflift-zero"),
}


def module_of(family: str) -> Any:
    return tiny if family in tiny.FAMILIES else tiny_more


def call(pipe: Any, family: str, **changes: Any) -> torch.Tensor:
    extra = changes.pop("extra", {})
    kwargs = {**module_of(family).call_kwargs(family, **{"size": 64, **changes}), **extra}
    return tiny_more.result(pipe(**kwargs)).clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_stage_is_euler_to_the_bit(family: str) -> None:
    pipe = module_of(family).make(family)
    stock = call(pipe, family)
    expected = call(diffaccel.accelerate(pipe, Euler()), family)
    diffaccel.accelerate(diffaccel.remove(pipe), Bottleneck(preset="speed", scales=(1.0,)))
    assert torch.equal(call(pipe, family), expected)
    assert torch.equal(call(diffaccel.remove(pipe), family), stock)


def test_one_stage_of_every_preset_is_euler_and_so_is_auto_in_one_step() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Euler())
    expected = {steps: call(pipe, "flux", steps=steps) for steps in (1, 2)}
    presets: tuple[Any, ...] = ("bottleneck", "selflift-zero", "lightx2v")
    for config, steps in ((Bottleneck(), 1), *((Bottleneck(preset=name, scales=(1.0,)), 2) for name in presets)):
        diffaccel.accelerate(diffaccel.remove(pipe), config)
        assert torch.equal(call(pipe, "flux", steps=steps), expected[steps])


def test_a_pipeline_is_warned_of_once(caplog) -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Bottleneck(preset="speed"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            call(pipe, "flux", steps=2)
    assert [record.getMessage().partition(" ")[0] for record in caplog.records] == ["The", "2"]  # spectrum, steps
    with caplog.at_level(logging.WARNING):
        call(pipe, "flux", steps=2, size=16)
    assert len(caplog.records) == 3 and "All stages of a call of 16x16 are rounded" in caplog.records[2].getMessage()


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("family", FAMILIES)
def test_stages(family: str, rule: str) -> None:
    """Each rule draws a finite picture of the asked size, with steps at two sizes and every row by itself."""
    is_video = family not in tiny.FAMILIES
    pipe = module_of(family).make(family)
    stock = call(pipe, family)
    diffaccel.accelerate(pipe, RULES[rule])
    if rule == "selflift-zero" and is_video:
        with pytest.raises(DiffAccelError, match="for pictures"):
            call(pipe, family)
        return
    drawn = call(pipe, family)
    assert drawn.shape == stock.shape and torch.isfinite(drawn).all() and not torch.equal(drawn, stock)
    run = diffaccel.summary(pipe).last_run
    assert set(run["nfe_by_resolution"]) == {"32x32", "64x64"} and run["nfe"] == sum(run["nfe_by_resolution"].values())
    assert torch.equal(call(pipe, family), drawn)
    torch.testing.assert_close(call(pipe, family, batch=1), drawn[:1], rtol=1e-3, atol=1e-3)
    assert torch.equal(call(diffaccel.remove(pipe), family), stock)


def test_a_pattern_of_real_steps_is_made_stage_by_stage() -> None:
    """The steps that a run's record has are those that were asked for, and every step real is no cache."""
    pipe = tiny.make("flux")
    told = Bottleneck(preset="speed", switches=(0.5,))
    stages = call(diffaccel.accelerate(pipe, told), "flux", steps=6)
    diffaccel.accelerate(diffaccel.remove(pipe), told, TaylorSeer(real_steps=(0, 1, 2, 0, 1, 2)))
    assert torch.equal(call(pipe, "flux", steps=6), stages)
    diffaccel.accelerate(diffaccel.remove(pipe), told, TaylorSeer(real_steps=(0, 2, 0, 1), payload="last"))
    call(pipe, "flux", steps=6)
    run = diffaccel.summary(pipe).last_run
    assert run["caches"]["real_steps"]["cond"] == [0, 2, 0, 1]
    assert set(run["nfe_by_resolution"].values()) == {6}  # of two pictures
    diffaccel.remove(pipe)
    for steps, why in (((0, 3, 0, 1), "stage 1 of the call makes 3"), ((0, 0, 0), "of 3 stages, and the call has 2")):
        with pytest.raises(DiffAccelError, match=why):
            call(diffaccel.accelerate(pipe, told, TaylorSeer(real_steps=steps)), "flux", steps=6)
        diffaccel.remove(pipe)
    with pytest.raises(DiffAccelError, match="must begin with one"):
        TaylorSeer(real_steps=(1, 0, 2, 0))


def test_a_second_size_is_a_fresh_call_of_it() -> None:
    """The network is asked at 32x32 what a plain call of that size asks it."""
    pipe = tiny.make("flux")
    asked: list[dict[str, Any]] = []
    handle = pipe.transformer.register_forward_pre_hook(lambda m, a, kw: asked.append(kw), with_kwargs=True)
    call(diffaccel.accelerate(pipe, Bottleneck(preset="lightx2v", scales=(0.5, 1.0), noise="fresh")), "flux")
    low, asked[:] = asked[0], []
    diffaccel.remove(pipe)
    call(pipe, "flux", size=32)
    handle.remove()
    for name, value in asked[0].items():
        if isinstance(value, torch.Tensor) and name != "timestep":
            assert torch.equal(low[name], value), name


def test_a_callback_sees_each_stage_and_its_edits_count() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), RULES["bottleneck"])
    plain, seen = call(pipe, "flux"), []

    def watch(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, kwargs["stage"], kwargs["resolution"], kwargs["latents"].shape[1]))
        return {}

    assert torch.equal(call(pipe, "flux", extra={"callback_on_step_end": watch}), plain)
    assert [entry[:3] for entry in seen] == [(0, 0, (64, 64)), (1, 1, (32, 32)), (2, 1, (32, 32)), (3, 2, (64, 64))]
    assert seen[0][3] == 4 * seen[1][3]

    def erase(pipe: Any, index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.zeros_like(kwargs["prompt_embeds"])} if index == 0 else {}

    extra = {"callback_on_step_end": erase, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert not torch.equal(call(pipe, "flux", extra=extra), plain)  # the later stages have it, too


def test_an_interrupt_in_a_small_stage_gives_a_picture_of_the_asked_size() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), RULES["bottleneck"])
    whole = call(pipe, "flux")

    def stop(pipe: Any, index: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        pipe._interrupt = index == 1
        return {}

    assert call(pipe, "flux", extra={"callback_on_step_end": stop}).shape == whole.shape


def test_presets_by_the_number_of_steps(caplog) -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Bottleneck())
    call(pipe, "flux")  # four steps
    assert diffaccel.summary(pipe).last_run["encodes"] == 2  # of two rows, through pixels
    call(pipe, "flux", extra={"num_inference_steps": 12})
    assert diffaccel.summary(pipe).last_run["encodes"] == 0
    diffaccel.accelerate(diffaccel.remove(pipe), RULES["speed"])
    with caplog.at_level(logging.WARNING):
        call(pipe, "flux")
    assert "preset='selflift-zero' is made for such calls" in caplog.text


def test_errors_of_a_call() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Bottleneck.paper())
    with pytest.raises(DiffAccelError, match="Pass num_inference_steps=34"):
        call(pipe, "flux")
    latents = torch.randn(2, 16, 64)
    diffaccel.accelerate(diffaccel.remove(pipe), RULES["speed"])
    with pytest.raises(DiffAccelError, match="Leave `latents` out"):
        call(pipe, "flux", extra={"latents": latents})
    pipe = diffaccel.accelerate(tiny.make("sdxl"), Bottleneck(preset="bottleneck", shifts=(9.0, 6.0, 9.0)))
    with pytest.raises(DiffAccelError, match="table of noise levels"):
        call(pipe, "sdxl")


@pytest.mark.slow
def test_a_plan_is_what_the_call_does() -> None:
    pipe, config = tiny.make("flux"), RULES["speed"]
    kwargs = {k: v for k, v in tiny.call_kwargs("flux", size=64).items() if k not in ("generator", "output_type")}
    plan = Bottleneck.plan(pipe, config=config, **kwargs)
    call(diffaccel.accelerate(pipe, config), "flux")
    run = diffaccel.summary(pipe).last_run
    by_size = {f"{s.size[1]}x{s.size[0]}": s.steps * 2 for s in plan.stages}
    assert run["nfe_by_resolution"] == by_size
    assert plan.speedup == pytest.approx(plan.plain_tflop / plan.tflop) and plan.speedup > 1
    assert "predicted:" in str(plan) and plan.to_dict()["stages"][0]["size"] == (32, 32)
    diffaccel.remove(pipe)
    reached = Bottleneck.plan(pipe, target_speedup=1.02, **{**kwargs, "num_inference_steps": 20})
    assert reached.speedup >= 1.02 and reached.config.preset == "speed"
    with pytest.raises(DiffAccelError, match="No plan of 4 steps reaches 50x"):
        Bottleneck.plan(pipe, target_speedup=50, **kwargs)


@pytest.mark.parametrize("config", [Euler(), Bottleneck])
def test_a_plan_of_something_else_is_refused(config: Any) -> None:
    with pytest.raises(DiffAccelError, match="as config; pass Bottleneck with its options"):
        Bottleneck.plan(tiny.make("flux"), config=config)
    with pytest.raises(DiffAccelError, match="Got NoneType; pass a diffusers pipeline"):
        Bottleneck.plan(None)


@pytest.mark.parametrize("speed", [0.5, -1, float("nan"), float("inf"), True, "1.3"])
def test_a_target_that_is_no_speed_is_refused(speed: object) -> None:
    with pytest.raises(DiffAccelError, match=r"target_speedup is .*; it must be a number from 1"):
        Bottleneck.plan(None, target_speedup=speed)


# -- late guidance stop ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_guidance_stops_after_a_share_of_the_steps(family: str) -> None:
    """From step ceil(f n) on the network sees the positive branch alone; 1 is the plain call to the bit."""
    pipe = module_of(family).make(family)
    for sampler in (Euler, Scheduler):
        diffaccel.accelerate(pipe, sampler())
        plain = call(pipe, family)
        whole = diffaccel.summary(pipe).last_run
        diffaccel.accelerate(diffaccel.remove(pipe), sampler(guidance_stop=0.5))
        stopped = call(pipe, family)
        run = diffaccel.summary(pipe).last_run
        assert (whole["forwards"], run["forwards"]) == (16, 12) and whole["nfe"] == run["nfe"]
        assert not torch.equal(stopped, plain)
        diffaccel.accelerate(diffaccel.remove(pipe), sampler(guidance_stop=1.0))
        assert torch.equal(call(pipe, family), plain)
        diffaccel.remove(pipe)


def test_no_guidance_at_all_is_the_unguided_call() -> None:
    pipe = diffaccel.accelerate(tiny.make("flux"), Euler())
    unguided = call(pipe, "flux", guided=False)
    diffaccel.accelerate(diffaccel.remove(pipe), Euler(guidance_stop=0.0))
    assert torch.equal(call(pipe, "flux"), unguided)
    diffaccel.accelerate(diffaccel.remove(pipe), Heun(guidance_stop=0.5))
    call(pipe, "flux")
    assert 0 < diffaccel.summary(pipe).last_run["forwards"] < 28
    with pytest.raises(DiffAccelError, match=r"guidance_stop is 1\.5; it must be from 0"):
        Euler(guidance_stop=1.5)


@pytest.mark.parametrize("sampler", [Euler, Scheduler])
def test_a_call_in_its_own_loop_cannot_stop_guidance(sampler: Any) -> None:
    pipe = make(Drifting)
    diffaccel.accelerate(pipe, sampler(guidance_stop=0.5))
    with pytest.raises(DiffAccelError, match=r"guidance_stop=0\.5 was asked of a call of Drifting that only its own"):
        draw(pipe)


def test_rows_stop_each_at_its_own_level() -> None:
    """A search asks for rows of several levels at once; each is guided as it would be alone."""
    from diffaccel.runtime.native import Native
    from diffaccel.session import Eval

    pipe = tiny.make("flux")
    with torch.no_grad(), diffaccel.open_session(pipe, **tiny.call_kwargs("flux")) as session:
        high, low = session.sigmas[1], session.sigmas[3]
        driver = Native(session, halves=True, guidance_stop=0.5)
        both = driver.predict([Eval(session.x, torch.stack([high, low]))])[0]
        guided = Native(session).predict([Eval(session.x, torch.stack([high, low]))])[0]
        alone = Native(session).predict([Eval(session.x, torch.stack([high, low]), branch="positive")])[0]
    assert isinstance(both, Pred)
    torch.testing.assert_close(both.v[0], guided.v[0])
    torch.testing.assert_close(both.v[1], alone.v[1])
