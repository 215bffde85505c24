"""Noise paths and prediction types against closed forms, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from analytic import BIMODAL, gaussian, gaussian_flow
from diffusers import DDIMScheduler, EDMEulerScheduler
from torch import Tensor

from diffaccel.flow import (
    LINEAR,
    VE_PATH,
    VP,
    Path,
    Prediction,
    Tabulated,
    convert,
    karras_preconditioning,
    output,
    transport,
    x0_eps,
)

TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
TABLE = Tabulated(DDIMScheduler(**TRAINED).alphas_cumprod)
ZERO_SNR = Tabulated(DDIMScheduler(**TRAINED, rescale_betas_zero_snr=True).alphas_cumprod)
VP_PATH = VP(0.1, 20.0)
# A path, and times on it that cover its range without its singular ends.
PATHS: dict[str, tuple[Path, list[float]]] = {
    "linear": (LINEAR, [0.02, 0.31, 0.5, 0.87, 0.99]),
    "ve": (VE_PATH, [0.03, 0.7, 1.0, 5.3, 80.0]),
    "vp": (VP_PATH, [0.02, 0.2, 0.5, 0.77, 1.0]),
    "vp constant rate": (VP(7.0, 7.0), [0.02, 0.2, 0.5, 0.77, 1.0]),
    "table": (TABLE, [0.0, 17.3, 333.37, 700.5, 999.0]),
    "zero terminal ratio": (ZERO_SNR, [0.0, 17.3, 333.37, 700.5, 997.9]),
}
ON_PATHS = [pytest.param(path, t, id=f"{name} {t}") for name, (path, times) in PATHS.items() for t in times]
KINDS: tuple[Prediction, ...] = ("epsilon", "sample", "v_prediction", "velocity", "score")
# float64 has 1e-16; conversions divide by alpha or sigma, which are 0.005 or more here
EXACT = {"rtol": 0.0, "atol": 1e-12}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a dozen numbers: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _draw(seed: int = 0) -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("path, t", ON_PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_type_gives_back_the_clean_sample_and_the_noise(
    path: Path, t: float, kind: Prediction
) -> None:
    x0, eps, alpha, sigma = _draw(0), _draw(1), path.alpha(t), path.sigma(t)
    x = path.mix(x0, eps, t)
    pair = x0_eps(kind, output(kind, x0, eps, alpha, sigma), x, alpha, sigma)
    # a network that predicts one of the pair leaves the other to a division by alpha or sigma
    scale = max(1.0, float(abs(x).max())) / min(float(alpha), float(sigma), 1.0)
    for value, expected in zip(pair, (x0, eps), strict=True):
        torch.testing.assert_close(value, expected, rtol=0.0, atol=1e-15 * scale + 1e-13)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("path, t", [(path, times[2]) for path, times in PATHS.values()], ids=list(PATHS))
def test_conversion_between_two_types(path: Path, t: float, source: Prediction) -> None:
    x0, eps, alpha, sigma = _draw(0), _draw(1), path.alpha(t), path.sigma(t)
    out = output(source, x0, eps, alpha, sigma)
    for target in KINDS:
        got = convert(out, path.mix(x0, eps, t), alpha, sigma, source=source, target=target)
        torch.testing.assert_close(got, output(target, x0, eps, alpha, sigma), **EXACT)


def test_prediction_types_by_their_definitions() -> None:
    x0, eps, alpha, sigma = _draw(0), _draw(1), 0.8, 0.6
    assert torch.equal(output("epsilon", x0, eps, alpha, sigma), eps)
    assert torch.equal(output("sample", x0, eps, alpha, sigma), x0)
    assert torch.equal(output("velocity", x0, eps, alpha, sigma), eps - x0)
    torch.testing.assert_close(output("score", x0, eps, alpha, sigma), -eps / 0.6)
    # v-prediction is the velocity over the angle phi with alpha = cos(phi), sigma = sin(phi)
    phi = torch.tensor(math.atan2(sigma, alpha), dtype=torch.float64)
    turned = torch.autograd.functional.jacobian(lambda p: torch.cos(p) * x0 + torch.sin(p) * eps, phi)
    torch.testing.assert_close(output("v_prediction", x0, eps, alpha, sigma), turned, **EXACT)


@pytest.mark.parametrize(
    "call", [lambda k: output(k, *[_draw()] * 2, 0.8, 0.6), lambda k: x0_eps(k, *[_draw()] * 2, 1, 1)]
)
def test_unknown_prediction_type(call) -> None:
    with pytest.raises(ValueError, match=r"Unknown prediction type 'noise'\. Known: epsilon, sample, v_prediction"):
        call("noise")


@pytest.mark.parametrize("path, t", ON_PATHS)
def test_the_velocity_gives_back_the_clean_sample_and_the_noise(path: Path, t: float) -> None:
    x0, eps = _draw(0), _draw(1)
    x, v = path.mix(x0, eps, t), path.velocity(x0, eps, t)
    slowest = min(abs(float(path.alpha(t))), abs(float(path.sigma(t))), 1.0)
    size = max(float(abs(x).max()), float(abs(v).max()), 1.0)
    torch.testing.assert_close(path.x0(x, v, t), x0, rtol=0.0, atol=1e-14 * size / slowest)
    torch.testing.assert_close(path.eps(x, v, t), eps, rtol=0.0, atol=1e-14 * size / slowest)


@pytest.mark.parametrize("name", ["linear", "ve"])
def test_short_forms_are_the_general_ones(name: str) -> None:
    path, times = PATHS[name]
    x, v = _draw(0), _draw(1)
    for t in times:
        torch.testing.assert_close(path.x0(x, v, t), Path.x0(path, x, v, t), **EXACT)
        torch.testing.assert_close(path.eps(x, v, t), Path.eps(path, x, v, t), **EXACT)
        torch.testing.assert_close(path.velocity(x, v, t), Path.velocity(path, x, v, t), **EXACT)


@pytest.mark.parametrize("path, t", [p for p in ON_PATHS if p.values[1] not in (0.0, 999.0)])
def test_derivatives_of_the_coefficients(path: Path, t: float) -> None:
    time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        out = value(time)
        exact = torch.autograd.grad(out, time)[0] if out.requires_grad else torch.zeros(())
        assert float(derivative(t)) == pytest.approx(float(exact), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("path, t", ON_PATHS)
def test_time_of_a_signal_to_noise_ratio(path: Path, t: float) -> None:
    span = 1e3 if isinstance(path, Tabulated) else 1.0  # a table's time runs over a thousand steps
    assert float(path.at(path.rho(t))) == pytest.approx(t, rel=1e-12, abs=1e-12 * span)


@pytest.mark.parametrize("path, t", ON_PATHS)
def test_coefficients_do_not_depend_on_the_kind_of_number(path: Path, t: float) -> None:
    rows = torch.tensor([t, t], dtype=torch.float64)
    for value in (path.alpha, path.sigma, path.d_alpha, path.d_sigma, path.rho):
        from_float, from_rows = (torch.as_tensor(value(time), dtype=torch.float64).expand(2) for time in (t, rows))
        torch.testing.assert_close(from_float, from_rows, **EXACT)


def test_rho_is_half_the_log_signal_to_noise_ratio() -> None:
    for path, times in PATHS.values():
        for t in times:
            assert float(path.rho(t)) == pytest.approx(math.log(float(path.alpha(t)) / float(path.sigma(t))), abs=1e-12)


@pytest.mark.parametrize("name", ["vp", "vp constant rate", "table"])
def test_variance_is_preserved(name: str) -> None:
    path, times = PATHS[name]
    for t in times:
        assert float(path.alpha(t)) ** 2 + float(path.sigma(t)) ** 2 == pytest.approx(1.0, abs=1e-14)


def test_vp_follows_its_stochastic_equation() -> None:
    """``alpha = exp(-T/2)`` with ``T`` the integral of the rate ``beta`` (arXiv 2011.13456)."""
    grid = torch.linspace(0, 0.6, 20001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + 19.9 * grid, grid)  # exact: the rate is linear
    assert float(VP_PATH.alpha(0.6)) == pytest.approx(float(torch.exp(-0.5 * integral)), abs=1e-12)


def test_table_is_the_schedulers_own_and_log_linear_between() -> None:
    alphas = DDIMScheduler(**TRAINED).alphas_cumprod.double()
    t = torch.arange(1000)
    torch.testing.assert_close(TABLE.alpha(t), alphas.sqrt(), rtol=1e-14, atol=0.0)
    torch.testing.assert_close(TABLE.sigma(t), (1 - alphas).sqrt(), rtol=1e-12, atol=0.0)
    snr = torch.log(alphas / (1 - alphas))
    torch.testing.assert_close(2 * TABLE.rho(400.25), 0.75 * snr[400] + 0.25 * snr[401], rtol=1e-12, atol=0.0)
    for beyond in (float(TABLE.rho(0.0)) + 3, math.inf):  # outside the trained range: its nearest end
        assert float(TABLE.at(beyond)) == 0.0
        assert float(TABLE.at(-beyond)) == 999.0


def test_zero_terminal_signal_to_noise_ratio() -> None:
    """The last entry is pure noise (arXiv 2305.08891): exact in linear coordinates, never a division by zero."""
    assert float(ZERO_SNR.alpha(999)) == 0.0
    assert float(ZERO_SNR.sigma(999)) == 1.0
    assert float(ZERO_SNR.rho(999)) == -math.inf
    assert float(ZERO_SNR.at(torch.tensor(-math.inf))) == 999.0
    x0, eps = _draw(0), _draw(1)
    x, out = eps, -x0  # alpha = 0, sigma = 1: v-prediction is -x0
    got = x0_eps("v_prediction", out, x, ZERO_SNR.alpha(999), ZERO_SNR.sigma(999))
    assert torch.equal(got[0], x0)
    assert torch.equal(got[1], eps)
    moved, t = transport(x, 999.0, ZERO_SNR, LINEAR)
    assert float(t) == 1.0
    assert torch.equal(moved, x)
    # nothing is interpolated between the last finite ratio and minus infinity
    assert float(ZERO_SNR.at(ZERO_SNR.rho(998.0) - 1.0)) == 998.0
    for t in (998.3, 998.7):
        assert float(ZERO_SNR.rho(t)) == float(ZERO_SNR.rho(998.0))
        assert float(ZERO_SNR.d_alpha(t)) == float(ZERO_SNR.d_sigma(t)) == 0.0


# -- closed-form data -------------------------------------------------------------------------------------------------

AWAY = [p for p in ON_PATHS if p.values[1] not in (0.0, 0.03, 80.0, 999.0)]  # densities of moderate width


@pytest.mark.parametrize("path, t", AWAY)
@pytest.mark.parametrize("data", [gaussian(), BIMODAL], ids=["gaussian", "mixture"])
def test_score_is_the_gradient_of_the_log_density(path: Path, t: float, data) -> None:
    alpha, sigma = path.alpha(t), path.sigma(t)
    x = path.mix(0.8 * _draw(0), _draw(1), t).requires_grad_(True)
    gradient = torch.autograd.grad(data.log_density(x, alpha, sigma).sum(), x)[0]
    x = x.detach()
    convert(data.velocity(LINEAR, x, 0.5), x, alpha, sigma, source="score", target="score")  # type passes through
    v = data.velocity(path, x, t)
    score = output("score", path.x0(x, v, t), path.eps(x, v, t), alpha, sigma)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.x0(x, v, t), (x + sigma**2 * gradient) / alpha, rtol=1e-9, atol=1e-9)  # Tweedie


@pytest.mark.parametrize("path, t", AWAY)
def test_velocity_carries_gaussian_data_along_its_exact_flow(path: Path, t: float) -> None:
    """``d/dt`` of the closed-form flow map is the marginal velocity."""
    data, x = gaussian(), path.mix(0.8 * _draw(0) + 1, _draw(1), t)
    h = 1e-5 * max(t, 1e-3)
    ahead, back = (gaussian_flow(data, path, x, t, t + s * h) for s in (1, -1))
    # central differences: error h^2 |x'''| / 6 + 1e-16 |x| / h
    torch.testing.assert_close((ahead - back) / (2 * h), data.velocity(path, x, t), rtol=1e-6, atol=1e-6)


# -- transport between paths ------------------------------------------------------------------------------------------


def test_vp_in_linear_coordinates_in_numbers() -> None:
    """The end of VP(0.1, 20), and its grid ``sqrt(1 - (k/10)^2)`` (arXiv 2503.19385) as levels of the linear path."""
    assert float(VP_PATH.alpha(1.0)) == pytest.approx(0.006572, abs=5e-7)
    x, t = transport(torch.ones(1, dtype=torch.float64), 1.0, VP_PATH, LINEAR)
    assert float(t) == pytest.approx(0.993471, abs=5e-7)
    assert 1 / float(x) == pytest.approx(1.006550, abs=5e-7)
    grid = torch.tensor([math.sqrt(1 - (k / 10) ** 2) for k in range(11)], dtype=torch.float64)
    times = transport(torch.ones(11, dtype=torch.float64), grid, VP_PATH, LINEAR)[1]
    expected = [0.9935, 0.9931, 0.9920, 0.9898, 0.9856, 0.9776, 0.9617, 0.9289, 0.8591, 0.7087, 0.0]
    torch.testing.assert_close(times, torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=5.1e-5)


@pytest.mark.parametrize("source, t", AWAY)
@pytest.mark.parametrize("name", list(PATHS))
def test_transport_keeps_sample_and_noise(source: Path, t: float, name: str) -> None:
    target, times = PATHS[name]
    if name in ("table", "zero terminal ratio") and not float(target.rho(times[-1])) < source.rho(t) < target.rho(0.0):
        t = float(source.at(torch.tensor(0.3, dtype=torch.float64)))  # a table ends: stay in its range
    x0, eps = _draw(0), _draw(1)
    x, t_new = transport(source.mix(x0, eps, t), t, source, target)
    torch.testing.assert_close(x, target.mix(x0, eps, t_new), rtol=1e-10, atol=1e-10)
    back, t_back = transport(x, t_new, target, source)
    torch.testing.assert_close(back, source.mix(x0, eps, t), rtol=1e-10, atol=1e-10)
    assert float(t_back) == pytest.approx(t, rel=1e-9)


@pytest.mark.parametrize("target", [LINEAR, VE_PATH, VP_PATH], ids=["linear", "ve", "vp"])
@pytest.mark.parametrize("source", [LINEAR, VE_PATH, VP_PATH], ids=["linear", "ve", "vp"])
def test_transport_at_zero_noise_changes_nothing(source: Path, target: Path) -> None:
    x, t = transport(_draw(), 0.0, source, target)
    assert float(t) == 0.0
    assert torch.equal(x, _draw())


def test_transport_takes_one_time_per_row_and_keeps_the_dtype() -> None:
    x = _draw().float()
    t = torch.tensor([[0.2], [0.5], [0.9]], dtype=torch.float64)
    rows, times = transport(x, t, VP_PATH, LINEAR)
    assert rows.dtype == torch.float32
    for i in range(3):
        row, row_time = transport(x[i : i + 1], float(t[i]), VP_PATH, LINEAR)
        assert torch.equal(row, rows[i : i + 1])
        assert float(row_time) == float(times[i])


@pytest.mark.parametrize("s", [0.1, 0.5, 0.9, 1.0])
def test_transported_velocity_obeys_the_chain_rule(s: float) -> None:
    """``u' = (c'/c) x' + c t' u(x'/c, t)`` with ``t = sigma'/(alpha' + sigma')`` and ``c = alpha' + sigma'``."""
    a, b, da, db = (float(f(s)) for f in (VP_PATH.alpha, VP_PATH.sigma, VP_PATH.d_alpha, VP_PATH.d_sigma))
    c, t, dc, dt = a + b, b / (a + b), da + db, (db * a - b * da) / (a + b) ** 2
    x = _draw()
    linear, time = transport(x, s, VP_PATH, LINEAR)
    torch.testing.assert_close(linear, x / c, **EXACT)
    assert float(time) == pytest.approx(t, abs=1e-12)
    chained = dc / c * x + c * dt * BIMODAL.velocity(LINEAR, x / c, t)
    torch.testing.assert_close(BIMODAL.velocity(VP_PATH, x, s), chained, rtol=0.0, atol=1e-11)
    # the same through the posterior means, which two paths at one signal-to-noise ratio share
    v = BIMODAL.velocity(LINEAR, linear, time)
    x0, eps = LINEAR.x0(linear, v, time), LINEAR.eps(linear, v, time)
    torch.testing.assert_close(VP_PATH.velocity(x0, eps, s), chained, rtol=0.0, atol=1e-11)


# -- EDM preconditioning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
def test_preconditioning_equals_diffusers(sigma: float) -> None:
    scheduler = EDMEulerScheduler(sigma_data=0.5)
    c_skip, c_out, c_in, c_noise = karras_preconditioning(sigma, 0.5)
    x, out, level = _draw(0), _draw(1), torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(c_in * x, scheduler.precondition_inputs(x, level), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(c_skip * x + c_out * out, scheduler.precondition_outputs(x, out, level), **EXACT)
    assert c_noise == pytest.approx(float(scheduler.precondition_noise(level)), abs=1e-12)
    assert [float(c) for c in karras_preconditioning(level, 0.5)] == pytest.approx([c_skip, c_out, c_in, c_noise])


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
def test_preconditioning_keeps_unit_variance(sigma: float) -> None:
    """Table 1's reasons: unit variance in and out, and for ``N(0, sigma_data^2)`` data nothing is left to predict."""
    c_skip, c_out, c_in, _ = karras_preconditioning(sigma, 0.5)
    assert c_in**2 * (0.5**2 + sigma**2) == pytest.approx(1.0)
    assert (c_skip - 1) ** 2 * 0.5**2 + c_skip**2 * sigma**2 == pytest.approx(c_out**2)
    x = _draw()
    torch.testing.assert_close(gaussian(0.0, 0.5).x0(x, 1.0, sigma), c_skip * x, **EXACT)
    # and the network's answer round trips
    target = (_draw(1) - c_skip * x) / c_out
    torch.testing.assert_close(c_skip * x + c_out * target, _draw(1), rtol=0.0, atol=1e-12)
