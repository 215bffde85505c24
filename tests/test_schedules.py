"""What is read from a scheduler is exactly what the installed scheduler does."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from analytic import BIMODAL
from installed_schedulers import ALL, FLOW, STEPS, make
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR, VE_PATH, output
from diffaccel.schedules import FLOW_STATE, VE_STATE, VP_STATE, Schedule, read

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, from inside diffusers


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a dozen numbers: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _draw(seed: int) -> Tensor:
    return torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(seed))


def _index(scheduler: Any, i: int) -> int:
    """Return the index of the i-th level in the scheduler's own tables: second order solvers count every step twice."""
    if hasattr(scheduler, "prk_timesteps"):
        times = scheduler.timesteps.tolist()
        return times.index(read(scheduler).timesteps[i].item())
    return 2 * i if len(scheduler.timesteps) >= 2 * STEPS - 1 else i


def _at(scheduler: Any, index: int) -> Any:
    """Copy a scheduler and set its step index."""
    scheduler = copy.deepcopy(scheduler)
    scheduler._step_index = index
    return scheduler


def _noised(scheduler: Any, i: int, x0: Tensor, eps: Tensor) -> Tensor:
    """Noise a sample by the scheduler's own forward process at its i-th level."""
    index = _index(scheduler, i)
    t = scheduler.timesteps[index]
    if type(scheduler).__name__ == "FlowMatchLCMScheduler":  # takes one step for the whole batch
        return _at(scheduler, index).scale_noise(x0, t[None], eps)
    if hasattr(scheduler, "scale_noise"):
        return _at(scheduler, index).scale_noise(x0, t[None].expand(len(x0)), eps)
    if type(scheduler).__name__ == "SASolverScheduler":  # its add_noise goes by the truncated time, its solver by sigma
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        return alpha * x0 + sigma * eps
    scheduler = copy.deepcopy(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)  # without a search by time, which truncated times would make ambiguous
    return scheduler.add_noise(x0, eps, t[None].expand(len(x0)))


@pytest.mark.parametrize("name, config", ALL)
def test_forward_process_and_network_input(name: str, config: dict[str, Any]) -> None:
    scheduler = make(name, **config)
    schedule, x0, eps = read(scheduler), _draw(0), _draw(1)
    assert schedule.path is (VE_PATH if name in VE_STATE else LINEAR)
    for i, sigma in enumerate(schedule.sigmas[:-1]):
        noised = _noised(scheduler, i, x0, eps)
        x = schedule.path.mix(x0, eps, sigma)
        # fp32: the scheduler rounds alpha and sigma, and VE states grow with sigma
        close = {"rtol": 2e-6, "atol": 2e-6 * max(1.0, float(sigma))}
        torch.testing.assert_close(schedule.to_pipeline(x, sigma), noised, **close)
        if i == 0:
            torch.testing.assert_close(schedule.from_pipeline(noised), x, **close)
        here = _at(scheduler, _index(scheduler, i))
        t = scheduler.timesteps[_index(scheduler, i)]
        fed = here.scale_model_input(noised, t) if hasattr(here, "scale_model_input") else noised
        if schedule.path is VE_PATH:
            assert torch.equal(schedule.network_input(noised, sigma), fed)
        torch.testing.assert_close(schedule.network_input(x, sigma), fed, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name, config", ALL)
def test_levels_and_times_of_the_grid(name: str, config: dict[str, Any]) -> None:
    scheduler = make(name, **config)
    schedule = read(scheduler)
    sigmas = schedule.sigmas
    assert sigmas.dtype == torch.float32
    assert bool((sigmas[1:] < sigmas[:-1]).all())
    assert bool((schedule.timesteps[1:] <= schedule.timesteps[:-1]).all())
    steps = len(sigmas) - 1
    assert len(schedule.timesteps) == steps
    # a last step that changes no level is dropped: some schedulers end on their smallest trained level twice
    timesteps = scheduler.timesteps
    if hasattr(scheduler, "prk_timesteps"):
        expected = torch.from_numpy(scheduler._timesteps[::-1].copy()).to(timesteps.dtype)
    elif len(timesteps) == 2 * STEPS - 1:  # second order solvers: the network's time at a level is at even places
        expected = timesteps[::2]
    else:
        expected = timesteps
    assert steps in (STEPS, STEPS - 1)
    assert torch.equal(schedule.timesteps, expected[:steps])
    for i in range(steps):
        assert torch.equal(schedule.timestep(sigmas[i]), schedule.timesteps[i])
    assert torch.equal(schedule.timestep(sigmas[:-1].flip(0)), schedule.timesteps.flip(0))


def test_second_order_solvers_count_their_steps_twice() -> None:
    """So that the rule of the test above is not empty: these are the ones with repeated levels."""
    twice = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
    for name in (*twice, "FlowMatchHeunDiscreteScheduler"):
        assert len(make(name).timesteps) == 2 * STEPS - 1
        assert len(read(make(name)).timesteps) == STEPS


@pytest.mark.parametrize(
    "name", ["DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler"]
)
def test_times_rounded_to_equal_integers_keep_their_levels(name: str) -> None:
    scheduler = make(name, 40, use_exponential_sigmas=True)
    schedule = read(scheduler)
    assert len(scheduler.timesteps.unique()) < 40  # the case at hand
    assert len(schedule.sigmas) == 41
    assert torch.equal(schedule.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    "name, config", [c for c in ALL if c.values[0] not in FLOW_STATE and "use_flow_sigmas" not in c.values[1]]
)
def test_between_the_levels_log_snr_is_linear_in_time(name: str, config: dict[str, Any]) -> None:
    scheduler = make(name, **config)
    schedule = read(scheduler)
    sigmas = schedule.sigmas[:-1]
    between = torch.sqrt(sigmas[1:] * sigmas[:-1])
    times = schedule.timestep(between)
    assert times.shape == between.shape
    if config.get("timestep_type") == "continuous":
        torch.testing.assert_close(times, 0.25 * torch.log(between))
        return
    alphas = scheduler.alphas_cumprod.double()
    rho = 0.5 * torch.log(alphas / (1 - alphas))
    low = times.double().floor().clamp(max=998).long()
    interpolated = torch.lerp(rho[low], rho[low + 1], times.double() - low)
    expected = schedule.path.rho(between.double())
    inside = expected > rho[rho.isfinite()].min()  # a zero terminal ratio has no neighbour to interpolate with
    # times are fp32: 1000 * 6e-8, at a slope of log-SNR of up to 0.3 a step
    torch.testing.assert_close(interpolated[inside], expected[inside], rtol=0.0, atol=5e-5)
    assert int(inside.sum()) >= STEPS - 2
    if hasattr(scheduler, "_sigma_to_t"):
        ve = (between / (1 - between) if schedule.path is LINEAR else between).double().numpy()
        logs = torch.log(((1 - alphas) / alphas) ** 0.5).numpy()
        expected_times = torch.tensor([float(scheduler._sigma_to_t(s, logs)) for s in ve])
        torch.testing.assert_close(times[inside], expected_times[inside].float(), rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("name", sorted(FLOW_STATE))
def test_between_the_levels_a_flow_models_time_is_its_level(name: str) -> None:
    schedule = read(make(name, shift=3.0))
    sigma = torch.tensor([0.123, 0.456])
    torch.testing.assert_close(schedule.timestep(sigma), 1000 * sigma)
    assert schedule.timestep(sigma[0]).shape == ()


@pytest.mark.parametrize(
    "name, config", [("UniPCMultistepScheduler", FLOW), ("DDIMScheduler", {}), ("EulerDiscreteScheduler", {})]
)
def test_a_rows_time_does_not_depend_on_the_other_rows(name: str, config: dict[str, Any]) -> None:
    """Flow UniPC truncates its times to integers, so that a level of the grid is not told as a level beside it."""
    schedule = read(make(name, **config))
    on, off = schedule.sigmas[3], schedule.sigmas[3] * 0.99
    both = schedule.timestep(torch.stack([on, off]))
    assert both[0] == schedule.timestep(on)
    assert both[1] == schedule.timestep(off)
    assert both[1] != schedule.timesteps[3]


# -- predictions ------------------------------------------------------------------------------------------------------

PREDICTIONS = ("epsilon", "v_prediction", "sample")
NO_SAMPLE = {  # diffusers: "prediction_type not implemented yet: sample"
    "HeunDiscreteScheduler", "PNDMScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverSDEScheduler",
}  # fmt: skip


def _own_x0(scheduler: Any, i: int, out: Tensor, x: Tensor) -> Tensor:
    """Return the clean sample that the scheduler itself computes from a network's output."""
    index, name = _index(scheduler, i), type(scheduler).__name__
    here, t = _at(scheduler, index), scheduler.timesteps[index]
    if name == "PNDMScheduler":  # its transfer formula to zero noise gives the clean sample
        here.final_alpha_cumprod = torch.tensor(1.0)
        return here._get_prev_sample(x, int(t), -1, out)
    if hasattr(here, "convert_model_output"):
        converted = here.convert_model_output(out, sample=x)
        if name == "DEISMultistepScheduler":  # converts to noise
            alpha, sigma = here._sigma_to_alpha_sigma_t(here.sigmas[index])
            return (x - sigma * converted) / alpha
        return converted
    if name == "TCDScheduler":  # returns a noised sample, at train step 0 when this is its last one
        here.timesteps, here.num_inference_steps, here._step_index = t[None], 1, 0
        noised, abar = here.step(out, int(t), x, eta=0.0).pred_noised_sample, here.alphas_cumprod[[int(t), 0]]
        (a, a0), (s, s0) = abar.sqrt(), (1 - abar).sqrt()
        return (noised - s0 / s * x) / (a0 - a * s0 / s)
    if name == "LCMScheduler":  # blends the clean sample with the state (its boundary condition)
        skip, keep = here.get_scalings_for_boundary_condition_discrete(int(t))
        return (here.step(out, t, x, generator=torch.Generator()).denoised - skip * x) / keep
    here.is_scale_input_called = True
    if name == "CogVideoXDPMScheduler":
        return here.step(out, None, int(t), None, x)[1]
    return here.step(out, int(t) if name in VP_STATE else t, x).pred_original_sample


@pytest.mark.parametrize(
    "name, prediction",
    [(n, p) for n in sorted(VE_STATE | VP_STATE) for p in PREDICTIONS if not (p == "sample" and n in NO_SAMPLE)],
)
def test_predictions_are_the_schedulers_own(name: str, prediction: str) -> None:
    scheduler = make(name, prediction_type=prediction)
    schedule, out = read(scheduler), _draw(3)
    for i, sigma in enumerate(schedule.sigmas[:-1]):
        x = schedule.path.mix(_draw(0), _draw(1), sigma)
        expected = _own_x0(scheduler, i, out, schedule.to_pipeline(x, sigma))
        v = schedule.velocity(out, x, sigma)
        x0, eps = schedule.path.x0(x, v, sigma), schedule.path.eps(x, v, sigma)
        # epsilon at sigma 14 in fp32: x0 is the difference of numbers of size 15 (x over alpha for VP states)
        torch.testing.assert_close(
            x0, expected, rtol=1e-4, atol=3e-6 * max(1.0, float(torch.exp(-schedule.path.rho(sigma))))
        )
        torch.testing.assert_close(schedule.path.mix(x0, eps, sigma), x, rtol=1e-5, atol=1e-5)
        # and the network's output again, at the variance-preserving weights
        alpha, noise = schedule.path.alpha(sigma), sigma
        norm = (alpha**2 + noise**2) ** 0.5
        again = output(schedule.prediction, x0, eps, alpha / norm, noise / norm)
        scale = float(1 / torch.minimum(alpha, noise / norm))
        torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "trailing"},
        {"use_karras_sigmas": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"final_sigmas_type": "sigma_min"},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_one_euler_step_is_that_of_euler_discrete_to_the_bit(config: dict[str, Any], prediction: str) -> None:
    scheduler = make("EulerDiscreteScheduler", prediction_type=prediction, **config)
    schedule = read(scheduler)
    for i in range(len(schedule.timesteps)):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        x, out = _draw(0) * (1 + sigma), _draw(1)
        here = _at(scheduler, i)
        here.is_scale_input_called = True
        expected = here.step(out, scheduler.timesteps[i], x).prev_sample
        assert torch.equal(x + (sigma_next - sigma) * schedule.velocity(out, x, sigma), expected)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "mu": 0.8},
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()) or "plain",
)
def test_one_euler_step_is_that_of_flow_match_euler_to_the_bit(config: dict[str, Any]) -> None:
    scheduler = make("FlowMatchEulerDiscreteScheduler", **config)
    schedule = read(scheduler)
    for i in range(STEPS):
        x, out = _draw(0), _draw(1)
        expected = _at(scheduler, i).step(out, scheduler.timesteps[i], x).prev_sample
        stepped = x + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * schedule.velocity(out, x, schedule.sigmas[i])
        assert torch.equal(stepped, expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler"])
@pytest.mark.parametrize(
    "config",
    [
        {"timestep_spacing": "leading"},
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
        {"timestep_spacing": "trailing"},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()),
)
def test_one_euler_step_is_that_of_ddim(name: str, config: dict[str, Any], prediction: str) -> None:
    """Ten steps divide the thousand: DDIM takes the step before as ``t - 1000 // n`` and not from its own grid."""
    scheduler = make(name, prediction_type=prediction, **config)
    if prediction == "epsilon" and config.get("rescale_betas_zero_snr"):
        with pytest.raises(DiffAccelError):
            read(scheduler)
        return
    schedule = read(scheduler)
    for i in range(len(schedule.timesteps)):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        x, out = _draw(0), _draw(1)
        state = x * schedule.state_scale(sigma)
        stepped = state + (sigma_next - sigma) * schedule.velocity(out, state, sigma)
        expected = scheduler.step(out, scheduler.timesteps[i], x, eta=0.0).prev_sample
        torch.testing.assert_close(schedule.to_pipeline(stepped, sigma_next), expected, rtol=1e-5, atol=1e-5)


class Renamed(diffusers.DDIMScheduler):
    """A subclass that keeps every rule, as pipelines' own schedulers often do."""


class Solver(diffusers.UniPCMultistepScheduler):
    """A subclass with a step of its own."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


class FurtherSolver(Solver):
    pass


def test_a_subclass_has_the_convention_of_its_base() -> None:
    base, renamed = (cls(clip_sample=False, set_alpha_to_one=False) for cls in (diffusers.DDIMScheduler, Renamed))
    for scheduler in (base, renamed):
        scheduler.set_timesteps(STEPS)
    expected, schedule = read(base), read(renamed)
    assert torch.equal(schedule.sigmas, expected.sigmas) and torch.equal(schedule.timesteps, expected.timesteps)


@pytest.mark.parametrize("cls", [Solver, FurtherSolver])
@pytest.mark.parametrize("config", [{}, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}])
def test_a_subclass_with_a_rule_of_its_own_is_refused(cls: type, config: dict[str, Any]) -> None:
    scheduler = cls(**config)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(DiffAccelError, match="Solver is not supported: it replaces step of UniPCMultistepScheduler"):
        read(scheduler)


def test_the_time_of_a_last_level_above_zero() -> None:
    """It is off the grid, also for a view of the levels themselves; second order samplers ask there."""
    schedule = read(make("PNDMScheduler", skip_prk_steps=True, steps_offset=1))
    last = schedule.stock_sigmas[-1]
    assert torch.equal(schedule.timestep(last), schedule.timestep(last.clone()))
    assert schedule.timestep(last) < schedule.timesteps[-1]


def test_the_entry_of_every_level() -> None:
    heun = read(make("HeunDiscreteScheduler"))
    assert heun.entries == (*range(0, 2 * STEPS, 2), 2 * STEPS - 1)
    assert heun.since(2).entries == tuple(entry - 4 for entry in heun.entries[2:])
    whole = read(make("PNDMScheduler"))  # three Runge-Kutta steps of four calls, then one call a step
    scheduler = make("PNDMScheduler")
    assert whole.entries[:4] == (0, 4, 8, 12) and whole.entry(len(whole.timesteps)) == len(scheduler.timesteps)
    assert torch.equal(scheduler.timesteps[list(whole.entries[:-1])], whole.timesteps)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_euler_step_is_the_transfer_of_pndm(prediction: str) -> None:
    """Stable Diffusion's default scheduler: it ends at its first trained level, not at zero."""
    scheduler = make("PNDMScheduler", skip_prk_steps=True, steps_offset=1, prediction_type=prediction)
    schedule = read(scheduler)
    assert schedule.sigmas[-1] > 0.02
    for i in range(STEPS):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        t = int(schedule.timesteps[i])
        x, out = _draw(0), _draw(1)
        state = x * schedule.state_scale(sigma)
        stepped = state + (sigma_next - sigma) * schedule.velocity(out, state, sigma)
        expected = scheduler._get_prev_sample(x, t, t - 100, out)
        torch.testing.assert_close(schedule.to_pipeline(stepped, sigma_next), expected, rtol=1e-5, atol=1e-5)


def test_velocity_takes_one_level_per_row() -> None:
    for name in ("EulerDiscreteScheduler", "DDIMScheduler", "FlowMatchEulerDiscreteScheduler"):
        schedule = read(make(name))
        levels = schedule.sigmas[[2, 5]].reshape(2, 1, 1, 1)
        x, out = _draw(0), _draw(1)
        rows, fed = schedule.velocity(out, x, levels), schedule.network_input(x, levels)
        for i in range(2):
            row = slice(i, i + 1)
            sigma = levels[i, 0, 0, 0]
            torch.testing.assert_close(rows[row], schedule.velocity(out[row], x[row], sigma), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(fed[row], schedule.network_input(x[row], sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler"])
def test_marginal_velocity_of_known_data(name: str) -> None:
    """A perfect epsilon network gives the perfect velocity of the schedule's own path."""
    schedule = read(make(name))
    for sigma in schedule.sigmas[:-1].double():
        alpha = schedule.path.alpha(sigma)
        x = schedule.path.mix(_draw(0).double(), _draw(1).double(), sigma)
        eps = BIMODAL.eps(x, alpha, sigma)
        exact = BIMODAL.velocity(schedule.path, x, sigma)
        # fp64: x0 = (x - sigma eps) / alpha cancels to 1e-16 * sigma / alpha
        torch.testing.assert_close(schedule.velocity(eps, x, sigma), exact, rtol=1e-12, atol=1e-12)


# -- shifts in closed form --------------------------------------------------------------------------------------------


def test_shifts_are_read_and_not_applied_again() -> None:
    plain = torch.linspace(1.0, 0.001, STEPS, dtype=torch.float64)
    for config, shifted in [
        ({"shift": 1.0}, plain),
        ({"shift": 3.0}, 3 * (first := _shifted(plain, 3.0)) / (1 + 2 * first)),
        ({"use_dynamic_shifting": True, "mu": 0.8}, math.exp(0.8) / (math.exp(0.8) + 1 / plain - 1)),
    ]:
        levels = read(make("FlowMatchEulerDiscreteScheduler", **config)).sigmas
        torch.testing.assert_close(levels[:-1].double(), shifted, rtol=1e-5, atol=1e-6)
        assert levels[-1] == 0


def _shifted(plain: Tensor, shift: float) -> Tensor:
    """Return the scheduler's grid, which is even between ends that are shifted already."""
    low = shift * plain[-1] / (1 + (shift - 1) * plain[-1])
    return torch.linspace(1.0, float(low), len(plain), dtype=torch.float64)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("DDIMScheduler", {"clip_sample": True}, r"clip_sample=True.*from_config\(.*config, clip_sample=False\)"),
        ("UniPCMultistepScheduler", {"thresholding": True}, r"thresholding=True.*thresholding=False"),
        ("UniPCMultistepScheduler", {**FLOW, "thresholding": True}, r"thresholding=True.*thresholding=False"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, r"invert_sigmas=True.*invert_sigmas=False"),
        ("EDMEulerScheduler", {}, r"EDMEulerScheduler is not supported. Set pipe.scheduler to one of: CogVideoXDDIM"),
        ("DDIMScheduler", {"prediction_type": "noise"}, r"prediction_type 'noise'; supported are epsilon, sample"),
        (
            "DDIMScheduler",
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            r"zero terminal signal-to-noise ratio.*Use a v_prediction model",
        ),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, r"'epsilon' with use_flow_sigmas=True.*needs both"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, r"use_flow_sigmas=False.*needs both"),
    ],
)  # fmt: skip
def test_errors_name_the_scheduler_and_the_fix(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(DiffAccelError, match=message) as caught:
        read(make(name, **config))
    assert name in str(caught.value)


@pytest.mark.parametrize("flag", ["clip_sample", "thresholding"])
def test_the_fix_that_an_error_names_works(flag: str) -> None:
    scheduler = make("DDIMScheduler", **{flag: True})
    with pytest.raises(DiffAccelError) as caught:
        read(scheduler)
    assert f"DDIMScheduler.from_config(pipe.scheduler.config, {flag}=False)" in str(caught.value)
    fixed = diffusers.DDIMScheduler.from_config(scheduler.config, **{flag: False})
    fixed.set_timesteps(STEPS)
    assert isinstance(read(fixed), Schedule)


def test_a_level_of_the_schedulers_own_device_knows_its_time() -> None:
    """Stock state reads levels from a copy on the scheduler's device; their times are found without reading values."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    schedule = read(scheduler)
    levels = schedule.stock_sigmas
    assert torch.equal(levels, schedule.sigmas) and levels.data_ptr() != schedule.sigmas.data_ptr()
    times = [schedule.timestep(level) for level in levels[:-1]]
    assert torch.equal(torch.stack(times), schedule.timesteps)
    levels.mul_(0)  # the values are not looked at
    assert torch.equal(torch.stack([schedule.timestep(level) for level in levels[:-1]]), schedule.timesteps)
