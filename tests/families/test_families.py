"""Every further family: the stock loop to the bit, under its own scheduler and under Euler."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import tiny_more
import torch
from tiny_more import call_kwargs, make, result

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.runtime.native import Native
from diffaccel.samplers import DPMpp2M, Euler, Heun, Scheduler
from diffaccel.session import Decode, Eval

SIZES = {family: (32, 48) for family in tiny_more.TEXT} | dict.fromkeys(tiny_more.SIZELESS, (0,))
UNGUIDED = ("ddpm", "ddim")
CASES = [
    pytest.param(family, size, guided, id=f"{family}-{size}-{'guided' if guided else 'unguided'}")
    for family in tiny_more.FAMILIES
    for size in SIZES[family]
    for guided in ((False,) if family in UNGUIDED else (True, False))
]


def run(pipe: Any, family: str, *args: Any, **kwargs: Any) -> torch.Tensor:
    extra = kwargs.pop("extra", {})
    return result(pipe(**{**call_kwargs(family, *args, **kwargs), **extra}))


@pytest.mark.slow
@pytest.mark.parametrize("family, size, guided", CASES)
def test_the_own_scheduler_equals_the_stock_call(family: str, size: int, guided: bool) -> None:
    pipe = make(family)
    stock = run(pipe, family, size, guided)
    before = set(pipe.__dict__)
    diffaccel.accelerate(pipe, Scheduler())
    wrapped = run(pipe, family, size, guided)
    last = diffaccel.summary(pipe).last_run
    diffaccel.remove(pipe)
    assert torch.equal(wrapped, stock)
    assert last["steps"] == 4 and last["nfe"] == 8 and last["forwards"] == (16 if guided else 8)
    assert torch.equal(run(pipe, family, size, guided), stock)
    assert set(pipe.__dict__) == before


SOLVERS = {
    "ddim": {"eta": 0.0}, "ddpm": {}, "pndm": {}, "dpm": {}, "unipc": {}, "heun": {}, "kdpm2": {},
    "euler": {}, "ancestral": {}, "ddim-eta": {"eta": 0.7},
}  # fmt: skip


def _solver(name: str) -> Any:
    import diffusers

    kind = {
        "ddim": "DDIM", "ddim-eta": "DDIM", "ddpm": "DDPM", "pndm": "PNDM", "dpm": "DPMSolverMultistep",
        "unipc": "UniPCMultistep", "heun": "HeunDiscrete", "kdpm2": "KDPM2Discrete",
        "euler": "EulerDiscrete", "ancestral": "EulerAncestralDiscrete",
    }[name]  # fmt: skip
    return getattr(diffusers, f"{kind}Scheduler")(**tiny.TRAINED)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_keeps_its_own_history(name: str) -> None:
    """Multistep, two-stage and stochastic schedulers, twice in a row, on one pipeline."""
    pipe = tiny.make("sd", scheduler=_solver(name))
    stock = pipe(**tiny.call_kwargs("sd"), **SOLVERS[name]).images
    diffaccel.accelerate(pipe, Scheduler())
    for _ in range(2):
        assert torch.equal(pipe(**tiny.call_kwargs("sd"), **SOLVERS[name]).images, stock)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_first_families_under_their_own_scheduler(family: str) -> None:
    pipe = tiny.make(family)
    stock = pipe(**tiny.call_kwargs(family)).images
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(pipe(**tiny.call_kwargs(family)).images, stock)
    diffaccel.accelerate(diffaccel.remove(pipe), Scheduler(max_batch=1))
    torch.testing.assert_close(pipe(**tiny.call_kwargs(family)).images, stock, rtol=1e-4, atol=1e-4)


def test_cogvideox_under_its_dpm_scheduler() -> None:
    pipe = tiny_more.cogvideox(dpm=True)
    pipe.set_progress_bar_config(disable=True)
    stock = run(pipe, "cogvideox")
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(run(pipe, "cogvideox"), stock)


def test_a_scheduler_keeps_latents_in_the_pipelines_dtype() -> None:
    with pytest.raises(DiffAccelError, match="use 'stock'"):
        Scheduler(state="float32")


# -- samplers of ours --------------------------------------------------------------------------------------------------


def flow_euler(family: str) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = make(family)
    if family.startswith("wan"):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("family", ["hunyuan", "wan", "wan22", "wan5b"])
def test_euler_equals_the_stock_call_of_flow_models(family: str, guided: bool) -> None:
    pipe = flow_euler(family)
    stock = run(pipe, family, 32, guided)
    diffaccel.accelerate(pipe, Euler())
    assert torch.equal(run(pipe, family, 32, guided), stock)


@pytest.mark.parametrize("family", ["hunyuan", "wan", "wan22", "wan5b"])
def test_euler_in_stock_state_equals_the_stock_call_in_bf16(family: str) -> None:
    """FlowMatchEuler returns the dtype of the network's output: latents in fp32 become bf16 with the first step."""
    pipe = flow_euler(family).to(torch.bfloat16)
    stock = run(pipe, family)
    diffaccel.accelerate(pipe, Euler(state="stock"))
    wrapped = run(pipe, family)
    assert wrapped.dtype == stock.dtype == torch.bfloat16 and torch.equal(wrapped, stock)


def smooth(family: str) -> Any:
    """Make the family with a schedule on which Euler is DDIM."""
    from diffusers import DDIMScheduler

    pipe = make(family)
    if family in ("pixart", "pixart_alpha", "dit", "ddim", "ddpm"):
        pipe.scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return pipe


@pytest.mark.parametrize("family", ["cogvideox", "cogvideox15", "pixart", "pixart_alpha", "dit", "ddim"])
def test_euler_equals_ddim_of_vp_models(family: str) -> None:
    pipe = smooth(family)
    stock = run(pipe, family, steps=5)
    diffaccel.accelerate(pipe, Euler())
    torch.testing.assert_close(run(pipe, family, steps=5), stock, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in tiny_more.FAMILIES if name != "ddim"])  # whose network is ddpm's
def test_samplers_agree_when_steps_are_many(family: str) -> None:
    pipe = smooth(family)
    diffaccel.accelerate(pipe, Euler())
    steps = 300 if family in UNGUIDED else 50  # pixels are clamped, which hides differences
    euler = run(pipe, family, batch=1, steps=steps)
    for sampler in (Heun(), DPMpp2M()):
        if family == "wan22" and sampler.name == "dpmpp2m":
            continue  # a history of predictions does not survive the change of the network
        diffaccel.accelerate(diffaccel.remove(pipe), sampler)
        other = run(pipe, family, batch=1, steps=steps)
        assert (other - euler).norm() < 0.08 * euler.norm(), sampler.name


# -- what a sampler may ask for ----------------------------------------------------------------------------------------

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=tiny_more.FAMILIES)
def session(request: Any) -> Any:
    family = request.param
    with torch.no_grad(), diffaccel.open_session(smooth(family), **call_kwargs(family)) as opened_session:
        opened_session.test_family = family
        yield opened_session


def ask(session: Any, *evals: Eval, **driver: Any) -> list[Any]:
    return Native(session, **driver).predict(list(evals))


def test_branches_levels_rows_and_chunks(session: Any) -> None:
    """Guidance joins the branches linearly; rows at levels of their own, alone or in chunks, equal rows together."""
    x, high, low = session.x, session.sigmas[0], session.sigmas[2]
    assert x.dtype == torch.float32 and x.shape[0] == 2
    scale = session.family.guidance_scale(session.pipe, session.conds[0].arguments, session.timesteps[0])
    if scale is not None:
        guided, positive, negative = (
            ask(session, Eval(x, high, branch=b))[0].v for b in ("guided", "positive", "negative")
        )
        torch.testing.assert_close(guided, negative + scale * (positive - negative), rtol=1e-3, atol=1e-3)
    levels = torch.stack([high, low])
    if session.test_family == "wan22":
        with pytest.raises(DiffAccelError, match="both sides of the boundary"):
            ask(session, Eval(x, levels))
        levels = torch.stack([high, high])
    both = ask(session, Eval(x, levels))[0].v
    chunks = ask(session, Eval(x, levels), max_batch=1)[0].v
    torch.testing.assert_close(chunks, both, **CLOSE)
    for row, sigma in enumerate(levels):
        alone = ask(session, Eval(x[row : row + 1], sigma, rows=[row]))[0].v
        torch.testing.assert_close(alone, both[row : row + 1], **CLOSE)


def test_another_resolution_or_a_refusal(session: Any) -> None:
    if session.test_family in tiny_more.SIZELESS:
        with pytest.raises(DiffAccelError, match="one size only"):
            session.at(64, 64)
        return
    other = session.at(48, 32)
    with diffaccel.open_session(session.pipe, **{**call_kwargs(session.test_family), "height": 48}) as fresh:
        assert torch.equal(other.x, fresh.x) and session.at(48, 32) is other
    assert torch.isfinite(ask(session, Eval(other.x, session.sigmas[0], at=other))[0].v).all()


def test_decode_is_the_pipelines_own(session: Any) -> None:
    """Pixels of a Decode equal those that the stock call returns for the same latents."""
    pipe, family = session.pipe, session.test_family

    def kwargs() -> dict:
        return {**call_kwargs(family, steps=2), "output_type": "pt"}

    stock = result(pipe(**kwargs()))
    with diffaccel.open_session(pipe, **kwargs()) as short:
        driver = Native(short, state="stock")
        final = driver.run(Scheduler().sample(short))
        rows = short.family.unwrap(final, short.conds[0].arguments)
        latents = short.family.spatial(short.pipe, rows, short.height, short.width)
        pixels = Native(short)._decode(Decode(latents))
    if pixels.ndim == 5:
        pixels = pixels.transpose(1, 2)  # stock videos are (B, F, C, H, W)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), stock, **CLOSE)


# -- contracts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [f for f in tiny_more.TEXT if not f.startswith("pixart")])
def test_a_callback_that_edits_latents(family: str) -> None:
    def zero(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
        return {"latents": torch.zeros_like(kwargs["latents"])} if i == 1 else {}

    pipe = make(family)
    stock = run(pipe, family, extra={"callback_on_step_end": zero})
    diffaccel.accelerate(pipe, Scheduler())
    assert torch.equal(run(pipe, family, extra={"callback_on_step_end": zero}), stock)


@pytest.mark.parametrize("family", tiny_more.FAMILIES)
def test_a_pipeline_that_cannot_be_interrupted_pays_no_second_loop(family: str) -> None:
    """The network runs for the sampler's steps and never again; the stock loop's rest costs nothing."""
    pipe = make(family)
    networks = [pipe.unet] if family in ("ddpm", "ddim") else [pipe.transformer]
    networks += [pipe.transformer_2] if family == "wan22" else []
    calls = []
    for network in networks:
        network.register_forward_pre_hook(lambda *_: calls.append(1))
    diffaccel.accelerate(pipe, Scheduler())
    run(pipe, family)
    assert len(calls) == diffaccel.summary(pipe).last_run["calls"]


def test_both_networks_forget_their_caches_at_a_change_of_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, forgotten = flow_euler("wan22"), []
    with torch.no_grad(), diffaccel.open_session(pipe, **call_kwargs("wan22")) as session:
        for network in (pipe.transformer, pipe.transformer_2):
            monkeypatch.setattr(network, "_reset_stateful_cache", lambda network=network: forgotten.append(network))
        driver, other = Native(session), session.at(48, 32)
        driver.predict([Eval(session.x, session.sigmas[0])])
        driver.predict([Eval(session.x, session.sigmas[-2])])
        assert not forgotten
        driver.predict([Eval(other.x, session.sigmas[0], at=other)])
        assert forgotten == [pipe.transformer, pipe.transformer_2]


def test_cost_by_resolution_is_counted_under_the_own_scheduler() -> None:
    pipe = diffaccel.accelerate(make("wan"), Scheduler())
    run(pipe, "wan", 48)
    last = diffaccel.summary(pipe).last_run
    assert last["nfe_by_resolution"] == {"48x48": last["nfe"]} == {"48x48": 8}


def test_dynamic_guidance_is_refused() -> None:
    pipe = diffaccel.accelerate(make("cogvideox"), DPMpp2M())
    with pytest.raises(DiffAccelError, match="use_dynamic_cfg"):
        run(pipe, "cogvideox", extra={"use_dynamic_cfg": True})


def test_clipped_samples_are_refused_by_samplers_of_ours() -> None:
    pipe = diffaccel.accelerate(make("ddpm"), Euler())
    with pytest.raises(DiffAccelError, match="clip_sample"):
        run(pipe, "ddpm")


@pytest.mark.parametrize("family, size", [("wan5b", 40), ("hunyuan", 40), ("cogvideox", 36)])
def test_sizes_that_do_not_fit(family: str, size: int) -> None:
    pipe = diffaccel.accelerate(make(family), Scheduler())
    with pytest.raises(DiffAccelError, match="nearest valid size"):
        run(pipe, family, size)
