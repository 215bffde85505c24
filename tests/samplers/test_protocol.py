"""What every plain sampler owes its driver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from analytic import BIMODAL, SHAPE, Mixture, drive, sample, session, start

from diffaccel.flow import LINEAR, VE_PATH, Path
from diffaccel.samplers import Ancestral, DPMpp2M, Euler, Heun

SAMPLERS = [Euler(), Heun(), DPMpp2M(), Ancestral(), Ancestral(eta=0.0)]
LEVELS = [
    pytest.param(LINEAR, torch.linspace(1.0, 0.0, 6), id="linear"),
    pytest.param(LINEAR, torch.linspace(0.9, 0.2, 6), id="linear inside"),
    pytest.param(VE_PATH, torch.tensor([9.0, 4.0, 2.0, 0.8, 0.2, 0.0]), id="ve"),
]
every_sampler = pytest.mark.parametrize("config", SAMPLERS, ids=["euler", "heun", "dpmpp2m", "ancestral", "ddim"])
on_every_path = pytest.mark.parametrize("path, sigmas", LEVELS)


def _generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


@every_sampler
@on_every_path
def test_one_step_a_level_and_no_prediction_at_zero_noise(config: Any, path: Path, sigmas: torch.Tensor) -> None:
    run = sample(config, BIMODAL, start(path, float(sigmas[0])), sigmas, path, _generators(3))
    assert [float(step.sigma) for step in run.steps] == sigmas[1:].tolist()
    assert all(float(e.sigma) > 0 for e in run.evals)
    assert {float(e.sigma) for e in run.evals} <= set(sigmas.tolist())
    assert len(run.evals) <= config.evals_per_step * len(run.steps)
    assert torch.equal(run.evals[0].x, start(path, float(sigmas[0])))
    assert bool(torch.isfinite(run.x).all())


@every_sampler
@on_every_path
def test_the_reply_to_a_step_is_the_state_that_goes_on(config: Any, path: Path, sigmas: torch.Tensor) -> None:
    """A callback may edit the latents after any step, the last one too."""
    x = start(path, float(sigmas[0]))
    here = session(x, sigmas, path, _generators(3))
    edited = torch.full_like(x, 0.25)
    run = drive(
        config.sample(here),
        lambda x, sigma: BIMODAL.velocity(path, x, sigma),
        path,
        edit=lambda index, x: edited if index == 1 else x + 1.0 if index == 4 else x,
    )
    after = [e for e in run.evals if float(e.sigma) == float(sigmas[2])]
    assert after[-1].x is edited
    assert run.x is run.replies[-1]
    assert torch.equal(run.x, run.steps[-1].x + 1.0)


@every_sampler
@on_every_path
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_latents_keep_their_dtype(config: Any, path: Path, sigmas: torch.Tensor, dtype: torch.dtype) -> None:
    run = sample(config, BIMODAL, start(path, float(sigmas[0]), dtype=dtype), sigmas, path, _generators(3))
    assert run.x.dtype == dtype
    assert all(e.x.dtype == dtype for e in run.evals)


@every_sampler
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 5, 4, 4)], ids=["images", "videos"])
def test_latents_of_any_layout(config: Any, shape: tuple[int, ...]) -> None:
    """Elementwise updates do not see the layout: the same numbers in another shape."""
    dim = torch.Size(shape[1:]).numel()
    data = Mixture((0.4, 0.6), ((0.5,) * dim, (-0.8,) * dim), (0.5, 0.7))
    x, sigmas = start(LINEAR, 1.0, shape), torch.linspace(1.0, 0.0, 6)
    run = sample(config, data, x, sigmas, generator=_generators(2))
    flat = sample(config, data, x.reshape(2, dim, 1, 1), sigmas, generator=_generators(2))
    assert run.x.shape == shape
    assert torch.equal(run.x.flatten(), flat.x.flatten())


@every_sampler
@on_every_path
def test_a_row_does_not_depend_on_the_batch(config: Any, path: Path, sigmas: torch.Tensor) -> None:
    x = start(path, float(sigmas[0]))
    together = sample(config, BIMODAL, x, sigmas, path, _generators(3)).x
    for i in range(len(x)):
        alone = sample(config, BIMODAL, x[i : i + 1], sigmas, path, [_generators(3)[i]]).x
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0.0, atol=1e-14)


@every_sampler
def test_the_start_is_not_written_to(config: Any) -> None:
    x = start(LINEAR, 1.0)
    sample(config, BIMODAL, x, torch.linspace(1.0, 0.0, 4), generator=_generators(3))
    assert torch.equal(x, start(LINEAR, 1.0))
    assert x.shape == SHAPE
