"""Superposition on a CUDA device: it computes what the CPU does, and no step of it waits for the device."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from analytic import session
from diffusers.utils.torch_utils import randn_tensor

import diffaccel
from diffaccel.flow import LINEAR
from diffaccel.samplers import SuperDiff
from diffaccel.samplers.superdiff import opening
from diffaccel.samplers.superdiff.components import Component, Components
from diffaccel.session import Pred, Step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def linear_model(shift: float) -> Any:
    """The exact velocity of ``N(shift, 1)``, in operations that do not wait."""
    return lambda x, sigma: x * ((2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2)) - shift


@pytest.mark.parametrize("source", ["cuda", "cpu"])
@pytest.mark.parametrize(
    "config",
    [
        SuperDiff(), SuperDiff(op="or"), SuperDiff(op="product", particles=4), SuperDiff(op="dombi", particles=2),
        SuperDiff(regions=("10", "01")), SuperDiff(curvature=True), SuperDiff(eta=0.0),
    ],
    ids=lambda config: f"{config.op}-{config.particles}-{config.eta}-{len(config.regions)}-{config.curvature}",
)  # fmt: skip
def test_no_step_waits_for_the_device(config: SuperDiff, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator(source).manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator, device=source, dtype=torch.float32).to("cuda")
    here = session(x, torch.linspace(0.98, 0, 13), LINEAR, generator)
    monkeypatch.setattr(
        opening, "open_components", lambda session, separate: Components(here, tuple(Component(i) for i in range(3)))
    )
    models = [linear_model(shift) for shift in (-0.5, 0.0, 0.7)]
    sampling, reply, steps = opening.superposition(config, here).sample(), None, 0
    try:
        while True:
            event = sampling.send(reply)
            if isinstance(event, Step):
                steps, reply = steps + 1, event.x
                if steps == 2:  # libraries have started
                    torch.cuda.set_sync_debug_mode("error")
                if steps == 11:
                    torch.cuda.set_sync_debug_mode("default")
                continue
            requests = event if isinstance(event, list) else [event]
            reply = [Pred(LINEAR, e.x, e.sigma, models[e.cond](e.x, float(e.sigma))) for e in requests]
            reply = reply if isinstance(event, list) else reply[0]
    except StopIteration as stop:
        assert stop.value.isfinite().all()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == 12


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_a_pipeline_draws_what_it_draws_on_a_cpu(family: str) -> None:
    results = []
    for device in ("cpu", "cuda"):
        pipe = diffaccel.accelerate(tiny.make(family).to(device), SuperDiff())
        arguments = tiny.call_kwargs(family, steps=4) | {"prompt": ["a | b", "red | two cats"]}
        results.append(pipe(**arguments).images.float().cpu())
    torch.testing.assert_close(results[1], results[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [1, 3])
def test_noise_of_generators_on_the_cpu_is_that_of_diffusers(rows: int) -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(rows)]

    x = torch.zeros(rows, 4, 16, 16, dtype=torch.float32, device="cuda")
    here = session(x, torch.linspace(0.98, 0, 13), LINEAR, generators())
    expected = randn_tensor(tuple(x.shape), generator=generators(), device=x.device, dtype=x.dtype)
    assert torch.equal(here.randn_like(x), expected)
