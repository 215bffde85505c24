"""On a CUDA device: parity in bf16, offloading, compilation, memory accounting."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import diffaccel
from diffaccel.families import find
from diffaccel.samplers import Ancestral, DPMpp2M, Euler, Heun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=tiny.FAMILIES)
def family(request) -> str:
    return request.param


def run(pipe: Any, family: str, size: int = 32, **extra: Any) -> torch.Tensor:
    return pipe(**{**tiny.call_kwargs(family, size), **extra}).images


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("size", [32, 64])
def test_euler_is_within_one_bf16_ulp_of_the_stock_call(family: str, size: int, guided: bool) -> None:
    pipe = tiny.make(family).to("cuda", torch.bfloat16)
    stock = pipe(**tiny.call_kwargs(family, size, guided)).images
    diffaccel.accelerate(pipe, Euler(state="stock"))
    wrapped = pipe(**tiny.call_kwargs(family, size, guided)).images
    assert wrapped.dtype == torch.bfloat16
    ulp = torch.finfo(torch.bfloat16).eps * stock.abs().float()
    assert ((wrapped.float() - stock.float()).abs() <= ulp).all()


def test_fp32_state_stays_close_in_bf16(family: str) -> None:
    pipe = tiny.make(family).to("cuda", torch.bfloat16)
    stock = run(pipe, family).float()
    diffaccel.accelerate(pipe, Euler())
    assert (run(pipe, family).float() - stock).norm() < 0.03 * stock.norm()


@pytest.mark.parametrize("sampler", [Heun(), DPMpp2M(), Ancestral()], ids=lambda s: s.name)
def test_other_samplers_run(family: str, sampler: Any) -> None:
    pipe = diffaccel.accelerate(tiny.make(family).to("cuda", torch.float16), sampler)
    images = run(pipe, family, output_type="pt")
    assert torch.isfinite(images).all() and images.shape == (2, 3, 32, 32)
    assert diffaccel.summary(pipe).last_run["peak_memory"] > 0


@pytest.mark.parametrize("offload", ["model", "sequential", "group"])
def test_offloading_under_a_sampler(family: str, offload: str) -> None:
    """The result is that of the pipeline on the device, and the weights go back to where they rest."""
    plain = tiny.make(family).to("cuda")
    stock = run(plain, family, output_type="pt")
    pipe = tiny.make(family)
    if offload == "model":
        pipe.enable_model_cpu_offload()
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(
            onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
    own = run(pipe, family, output_type="pt")
    diffaccel.accelerate(pipe, Euler())
    wrapped = run(pipe, family, output_type="pt")
    assert torch.equal(wrapped, own)
    torch.testing.assert_close(wrapped.cpu(), stock.cpu(), rtol=1e-3, atol=1e-3)
    denoiser = getattr(pipe, find(pipe).denoiser)
    rests = {"model": "cpu", "sequential": "meta", "group": "cpu"}[offload]
    assert {p.device.type for p in denoiser.parameters()} == {rests}
    with diffaccel.open_session(pipe, **tiny.call_kwargs(family)) as session:
        assert session.device.type == "cuda"
    assert {p.device.type for p in denoiser.parameters()} == {rests}


@pytest.mark.parametrize("how", ["repeated blocks", "whole"])
def test_compiled_networks(how: str) -> None:
    pipe = tiny.make("flux").to("cuda", torch.bfloat16)
    if how == "whole":
        pipe.transformer.compile()
    else:
        pipe.transformer.compile_repeated_blocks()
    stock = run(pipe, "flux")
    diffaccel.accelerate(pipe, Euler(state="stock"))
    assert torch.equal(run(pipe, "flux"), stock)


@pytest.mark.parametrize("state", ["float32", "stock"])
def test_a_step_does_not_wait_for_the_device(family: str, state: Any) -> None:
    """No host synchronisation inside the loop: the queue stays full."""
    pipe = diffaccel.accelerate(tiny.make(family).to("cuda"), Euler(state=state))
    run(pipe, family)

    def at_step(pipe: Any, i: int, t: Any, kwargs: Any) -> dict:
        torch.cuda.set_sync_debug_mode("error" if i == 0 else "default" if i == 3 else "error")
        return {}

    try:
        run(pipe, family, callback_on_step_end=at_step, callback_on_step_end_tensor_inputs=["latents"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
