"""The operators against closed forms: mixtures, equal densities, products, logic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from analytic import Mixture, gaussian
from density_bed import VP_PATH, A, B, Superposed, levels, superpose
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR, VE_PATH, Path
from diffaccel.samplers import Euler, SuperDiff
from diffaccel.samplers.superdiff import composition, formulas
from diffaccel.samplers.superdiff.probes import orthonormal

NARROW, WIDE = Mixture((1.0,), ((-1.0,),), (0.4,)), Mixture((1.0,), ((1.0,),), (0.8,))
PATHS = [VP_PATH, VE_PATH, LINEAR]


def to_clean(path: Path, steps: int, top: float = 1.0) -> Tensor:
    """Levels that end at the clean sample."""
    times = levels(path, steps) if path is not LINEAR else torch.linspace(top, 0, steps + 1, dtype=torch.float64)
    times[-1] = 0
    return times


# -- OR ----------------------------------------------------------------------------------------------------------------


def shares(run: Superposed) -> list[float]:
    """Share of samples in each quadrant, a mode each."""
    x, y = run.x[:, 0, 0, 0] < 0, run.x[:, 1, 0, 0] > 0
    return [float((a & b).double().mean()) for a in (x, ~x) for b in (y, ~y)]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("weights", [(), (0.8, 0.2)])
def test_or_samples_the_mixture(path: Path, weights: tuple[float, ...]) -> None:
    rows = 1500
    run = superpose(SuperDiff(op="or", data_std=1.5, weights=weights), [A, B], path, levels(path, 64), rows)
    for share, weight in zip(shares(run), (weights or (0.5, 0.5)) * 2, strict=True):
        expected = weight / 2
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / rows)


@pytest.mark.slow
def test_or_of_three_samples_their_mixture() -> None:
    middle, rows, weights = Mixture((1.0,), ((0.0, 0.0),), (0.2,)), 1500, (0.5, 0.3, 0.2)
    run = superpose(SuperDiff(op="or", data_std=1.5, weights=weights), [A, B, middle], LINEAR, levels(LINEAR, 64), rows)
    centers = torch.tensor([*A.means, *B.means, *middle.means], dtype=torch.float64)
    nearest = torch.cdist(run.x.flatten(1), centers).argmin(1).bincount(minlength=5) / rows
    for share, expected in zip(nearest.tolist(), (0.25, 0.25, 0.15, 0.15, 0.2), strict=True):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / rows)


def spreads(run: Superposed, path: Path, time: float) -> tuple[Tensor, Tensor]:
    """Second and fourth moments of the samples of a run, over those of N(-1, .4^2) and N(1, .4^2) at its last level."""
    a, s = (float(f(time)) for f in (path.alpha, path.sigma))
    x, variance = run.x.flatten() / a, 0.4**2 + (s / a) ** 2
    return x.square().mean() / (1 + variance), x.pow(4).mean() / (1 + 6 * variance + 3 * variance**2)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("steps", [3, 8])
def test_or_by_one_component_a_step_samples_the_mixture_at_any_number_of_steps(path: Path, steps: int) -> None:
    """Each model's own sampler is exact with the spread of its data; the mean of both loses what lies between them."""
    models, times = [Mixture((1.0,), ((mean,),), (0.4,)) for mean in (-1.0, 1.0)], levels(path, steps)
    found = {}
    for switch in ("auto", "never"):
        run = superpose(SuperDiff(op="or", data_std=0.4, switch=switch), models, path, times, 4000, dim=1)
        found[switch] = spreads(run, path, float(times[-1]))
        assert abs(float((run.x > 0).double().mean()) - 0.5) < 4 * math.sqrt(0.25 / 4000)
    assert all(abs(float(ratio) - 1) < 0.06 for ratio in found["auto"])  # four standard errors
    assert all(float(ratio) < 0.88 for ratio in found["never"])


def test_a_switched_step_is_of_one_component_drawn_by_its_weight() -> None:
    kappa = torch.tensor([[[0.2, 0.5, 0.3]]], dtype=torch.float64).expand(1, 1000, 3)
    u = (torch.arange(1000, dtype=torch.float64)[None] + 0.5) / 1000
    picked = composition.switched(kappa, u, 3, 1.0)
    assert picked.sum(1).tolist() == [[200.0, 500.0, 300.0]] and set(picked.unique().tolist()) == {0.0, 1.0}
    assert SuperDiff(op="or").switches(1.0) and not SuperDiff(op="or").switches(2.0)
    assert SuperDiff(op="or", switch="always").switches(2.0) and not SuperDiff.paper(op="or").switches(1.0)
    assert not any(SuperDiff(op=op).switches(1.0) for op in ("and", "average", "product"))
    assert not SuperDiff(op="or", eta=0.0).switches(1.0) and not SuperDiff(op="or", particles=2).switches(1.0)
    guided = torch.cat([2.5 * kappa, torch.full((1, 1000, 1), -1.5, dtype=torch.float64)], -1)
    assert torch.equal(composition.switched(guided, u, 3, 2.5), torch.cat([2.5 * picked, guided[..., 3:]], -1))


def test_two_copies_of_a_model_are_that_model_to_the_bit() -> None:
    times = levels(LINEAR, 10)
    plain = superpose(SuperDiff(op="average"), [A], LINEAR, times, 16)
    for op in ("or", "average", "and", "dombi"):
        for config in (SuperDiff(op=op), *([SuperDiff(op="or", switch="never")] if op == "or" else [])):
            one, two = (superpose(config, [A] * count, LINEAR, times, 16) for count in (1, 2))
            assert torch.equal(two.x, one.x), config
            assert config.switches(1.0) or torch.equal(one.x, plain.x)  # a draw a step comes in between


def test_all_of_the_prior_on_one_model_is_that_model() -> None:
    times = levels(VP_PATH, 10)
    one = superpose(SuperDiff(op="or"), [A], VP_PATH, times, 16)
    torch.testing.assert_close(
        superpose(SuperDiff(op="or", weights=(1.0, 0.0)), [A, B], VP_PATH, times, 16).x, one.x, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("config", [SuperDiff(op="or", switch="never"), SuperDiff(op="and")], ids=["or", "and"])
def test_permuted_models_permute_their_weights(config: SuperDiff) -> None:
    models = [A, B, gaussian(0.3, 0.9, 2)]
    run, swapped = (superpose(config, m, LINEAR, levels(LINEAR, 12), 8) for m in (models, models[::-1]))
    kappa, other = (torch.tensor(r.report["kappa"]) for r in (run, swapped))
    torch.testing.assert_close(other.flip(-1), kappa, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(swapped.x, run.x, rtol=1e-8, atol=1e-8)


# -- AND ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("steps", [2, 9])
def test_and_of_equal_covariances_ends_on_the_hyperplane(count: int, steps: int) -> None:
    """Densities of Gaussians that differ in their means are equal where the distances to the means are."""
    draw = torch.Generator().manual_seed(count)
    means = torch.randn(count, 4, generator=draw, dtype=torch.float64)
    models = [Mixture((1.0,), (tuple(m.tolist()),), (0.7,)) for m in means]
    run = superpose(SuperDiff(data_std=0.7), models, LINEAR, levels(LINEAR, steps), 30, dim=4)
    apart = (run.x.flatten(1)[:, None] - (1 - 0.005) * means).square().sum(-1)
    assert (apart - apart[:, :1]).abs().max() <= 1e-9


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[pytest.mark.slow] * (p is not LINEAR), id=type(p).__name__) for p in PATHS]
)
def test_the_curvature_term_makes_densities_equal_and_without_it_they_are_not(path: Path) -> None:
    """The projection takes the noise along the difference away; what that does to densities has to be added."""
    gaps = {}
    for curvature in (False, True):
        for steps in (32, 128):
            config = SuperDiff(data_std=1.5, curvature=curvature, probe=1e-5 if curvature else SuperDiff.probe)
            run = superpose(config, [NARROW, WIDE], path, levels(path, steps), 400, dim=1)
            true = run.true([NARROW, WIDE], float(levels(path, steps)[-1]))
            gaps[curvature, steps] = float((true[:, 0] - true[:, 1]).abs().median())
    assert 0.5 < gaps[False, 128] < 0.8
    assert gaps[True, 128] < 0.06 and gaps[True, 128] < 0.6 * gaps[True, 32]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_curvature_term_on_mixtures(path: Path) -> None:
    a = Mixture((0.5, 0.5), ((-1.5, 1.0), (1.5, 1.0)), (0.3, 0.5))
    b = Mixture((0.4, 0.6), ((-1.0, -1.0), (1.5, -0.5)), (0.5, 0.4))
    gaps = []
    for steps in (64, 512):
        run = superpose(SuperDiff(data_std=1.5, curvature=True, probe=1e-5), [a, b], path, levels(path, steps), 500)
        true = run.true([a, b], float(levels(path, steps)[-1]))
        gaps.append(float((true[:, 0] - true[:, 1]).abs().median()))
    assert gaps[1] < 0.06 and gaps[1] < 0.5 * gaps[0]


@pytest.mark.slow
@pytest.mark.parametrize("models", [[A, B], [NARROW, WIDE]], ids=["mixtures", "gaussians"])
def test_and_without_noise_converges(models: list[Mixture]) -> None:
    """One sign vector is shared by all components, so that the probe's noise cancels where they agree."""
    gaps = []
    for steps in (32, 256):
        times = torch.linspace(0.999, 0.005, steps + 1, dtype=torch.float64)
        dim = len(models[0].means[0])
        run = superpose(SuperDiff(eta=0.0, probe=1e-5), models, LINEAR, times, 200, dim=dim)
        true = run.true(models, float(times[-1]))
        gaps.append(float((true[:, 0] - true[:, 1]).abs().median()))
    assert gaps[1] < 0.1 and gaps[1] < max(0.5 * gaps[0], 1e-6)


@pytest.mark.parametrize("first", [1.0, 0.999999, 0.9999])
def test_and_without_noise_leaves_out_the_steps_that_hold_no_signal(first: float) -> None:
    times = levels(LINEAR, 32)
    times[0] = first
    run = superpose(SuperDiff(eta=0.0), [A, B], LINEAR, times, 100)
    true = run.true([A, B], float(times[-1]))
    assert float((true[:, 0] - true[:, 1]).abs().max()) < 0.2


@pytest.mark.parametrize("bias", [(3.0, 0.0), (-2.0, 1.0), (0.0, 2.5, -1.0)])
def test_a_bias_sets_the_final_difference(bias: tuple[float, ...]) -> None:
    models = [A, B, gaussian(0.3, 0.9, 3)][: len(bias)]
    models = [Mixture(m.weights, tuple((*mean[:2], 0.0) for mean in m.means), m.stds) for m in models]
    run = superpose(SuperDiff(bias=bias), models, LINEAR, to_clean(LINEAR, 30), 12, dim=3)
    log_density = run.tracked()
    for i in range(1, len(bias)):
        difference = log_density[:, 0] - log_density[:, i]
        torch.testing.assert_close(difference, torch.full_like(difference, bias[0] - bias[i]), rtol=1e-6, atol=1e-6)


def test_models_that_are_one_up_to_rounding_leave_the_state_in_place() -> None:
    near = Mixture(A.weights, tuple((m[0] + 1e-9, m[1]) for m in A.means), A.stds)
    one = superpose(SuperDiff(op="or"), [A], LINEAR, levels(LINEAR, 12), 16)
    both = superpose(SuperDiff(), [A, near], LINEAR, levels(LINEAR, 12), 16)
    assert both.x.isfinite().all() and (both.x - one.x).abs().max() < 5


def test_the_papers_form_is_the_two_model_formula() -> None:
    """On the VE path: ``kappa`` from noise predictions and the step alone (arXiv 2412.17762, proposition 6)."""
    times = torch.tensor([10.0, 8.0], dtype=torch.float64)
    run = superpose(SuperDiff.paper(bias=(0.3, 0.0)), [A, B], VE_PATH, times, 5)
    x = run.evals[0].x
    first, second = (m.velocity(VE_PATH, x, times[0]).flatten(1) for m in (A, B))
    generator = torch.Generator().manual_seed(0)
    torch.randn(5, 2, 1, 1, generator=generator, dtype=torch.float64)
    z = torch.randn(5, 2, 1, 1, generator=generator, dtype=torch.float64).flatten(1)
    ds, s, lift = -2.0, 10.0, -0.3  # positive lift favours the second
    independent = 2 * ds * second + math.sqrt(2 * abs(ds) * s) * z
    apart = first - second
    top = abs(ds) * (-apart * (first + second)).sum(1) - (independent * apart).sum(1) + s * lift
    kappa = top / (2 * ds * apart.square().sum(1))
    expected = x.flatten(1) + independent + 2 * ds * kappa[:, None] * apart
    torch.testing.assert_close(run.x.flatten(1), expected, rtol=1e-10, atol=1e-10)


# -- products and particles --------------------------------------------------------------------------------------------

ONE, OTHER = Mixture((1.0,), ((1.0,),), (0.5,)), Mixture((1.0,), ((-1.0,),), (1.0,))


def moments(
    config: SuperDiff, models: list[Any], times: Tensor, path: Path = VP_PATH, rows: int = 1
) -> tuple[float, float]:
    """Weighted mean and variance of the particles of all pictures."""
    run = superpose(config, models, path, times, rows, dim=1)
    x = run.run.x.flatten()
    weights = run.run.densities.log_weights.reshape(rows, -1).softmax(1).flatten() / rows
    mean = (weights * x).sum()
    return float(mean), float((weights * (x - mean) ** 2).sum())


@pytest.mark.slow
@pytest.mark.parametrize("path", [VP_PATH, LINEAR], ids=lambda path: type(path).__name__)
def test_the_product_has_its_moments_and_the_sum_of_scores_has_not(path: Path) -> None:
    """N(1, .25) times N(-1, 1) is N(.6, .2)."""
    times = to_clean(path, 50)
    mean, variance = moments(SuperDiff(op="product", particles=500, data_std=0.6), [ONE, OTHER], times, path, 8)
    assert abs(mean - 0.6) < 0.05 and abs(variance - 0.2) < 0.03
    mean, _ = moments(SuperDiff(op="product"), [ONE, OTHER], times, path, 1000)
    assert mean < 0.5


@pytest.mark.slow
def test_a_negative_exponent_divides() -> None:
    """N(1, .25)^2 / N(-1, 1)^.5 is N(1.133, .133)."""
    config = SuperDiff(op="product", weights=(2.0, -0.5), particles=500, data_std=0.5)
    mean, variance = moments(config, [ONE, OTHER], to_clean(VP_PATH, 60), rows=8)
    assert abs(mean - 17 / 15) < 0.06 and abs(variance - 2 / 15) < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("op", ["product", "fkc"])
def test_many_particles_at_many_steps(op: Any) -> None:
    config = SuperDiff(op=op, particles=8000)
    mean, variance = moments(config, [ONE, OTHER], to_clean(VP_PATH, 100 if op == "product" else 400))
    assert abs(mean - 0.6) < 0.06 and abs(variance - 0.2) < 0.02


def test_langevin_moves_come_nearer_to_the_product() -> None:
    times = to_clean(VP_PATH, 25)
    plain, _ = moments(SuperDiff(op="product"), [ONE, OTHER], times, rows=1000)
    moved, _ = moments(SuperDiff(op="mcmc", langevin=3, snr=0.3), [ONE, OTHER], times, rows=1000)
    assert abs(moved - 0.6) < abs(plain - 0.6)


@pytest.mark.slow
def test_guidance_with_particles_follows_the_tilted_density() -> None:
    """``q_u^(1-w) q^w`` with ``w = 2`` of N(0, 1) and N(1, 1) is N(2, 1): by weights, also of one prompt."""
    null, prompted = gaussian(0.0, 1.0, 1), gaussian(1.0, 1.0, 1)
    run = superpose(
        SuperDiff(op="product", particles=800), [prompted, null], VP_PATH, to_clean(VP_PATH, 50), 4, dim=1, guidance=2.0
    )
    weights = run.run.densities.log_weights.reshape(4, -1).softmax(1).flatten() / 4
    assert abs(float((weights * run.run.x.flatten()).sum()) - 2) < 0.1


@pytest.mark.parametrize(
    ("means", "guidance", "exact"), [((1.0,), 2.0, 1.0), ((0.5, -0.2), 1.3, 0.15)], ids=["one", "a product"]
)
def test_particles_follow_the_target_when_guidance_ends(means: Any, guidance: float, exact: float) -> None:
    models = [gaussian(mean, 1.0, 1) for mean in (*means, 0.0)]
    config = SuperDiff(op="product", particles=2000, guidance_stop=0.8)
    run = superpose(config, models, VP_PATH, to_clean(VP_PATH, 40), 4, dim=1, guidance=guidance)
    weights = run.run.densities.log_weights.reshape(4, -1).softmax(1).flatten() / 4
    assert abs(float((weights * run.run.x.flatten()).sum()) - exact) < 0.06


# -- logic -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_dombi_and_is_the_harmonic_mean() -> None:
    """Of N(+-1, .5) at hardness 1: the variance is .225 by numerical integration, the total variation below .02."""
    pair = [Mixture((1.0,), ((m,),), (0.5**0.5,)) for m in (1.0, -1.0)]
    config = SuperDiff(op="dombi", hardness=1.0, particles=1500)
    run = superpose(config, pair, VP_PATH, to_clean(VP_PATH, 60), 8, dim=1)
    found, weights = run.run.x.flatten(), run.run.densities.log_weights.reshape(8, -1).softmax(1).flatten() / 8
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    p, q = (torch.exp(-((x - m) ** 2)) for m in (1.0, -1.0))
    target = p * q / (p + q) / (p * q / (p + q)).sum()
    assert abs(float((weights * found).sum())) < 0.06
    assert float((weights * found**2).sum()) == pytest.approx(float((target * x**2).sum()), abs=0.03)
    edges = torch.linspace(-6, 6, 25, dtype=torch.float64)
    masses = [
        torch.zeros(26, dtype=torch.float64).index_add(0, torch.bucketize(at, edges), mass)
        for at, mass in ((found, weights), (x, target))
    ]
    assert float((masses[0] - masses[1]).abs().sum()) / 2 < 0.02


def test_a_nested_formula_is_the_formula_expanded_by_hand() -> None:
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tree = formulas.parse("(p1 or p2) and not p3", 3)
    kappa, log_density = formulas.logic(tree, 2.0, 0.5, None)(values)
    either = torch.logsumexp(2 * values[:, :2], 1) / 2
    reference = values.logsumexp(1) - math.log(3)
    neither = 1.5 * reference - 0.5 * values[:, 2]
    expected = -torch.logsumexp(-2 * torch.stack([either, neither], 1), 1) / 2
    torch.testing.assert_close(log_density, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kappa.sum(-1), torch.ones(7, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.functional.jacobian(lambda v: formulas.logic(tree, 2.0, 0.5, None)(v)[1].sum(), values)
    torch.testing.assert_close(kappa, gradient, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("formula", "same"),
    [
        ("p1 ^ p2", "(p1 or p2) and (not p1 or not p2)"), ("not (p1 and p2)", "not p1 or not p2"),
        ("not not p1", "p1"), ("not (p1 or not p2)", "not p1 and p2"),
    ],
)  # fmt: skip
def test_formulas_are_rewritten_by_the_laws_of_logic(formula: str, same: str) -> None:
    assert formulas.parse(formula, 2) == formulas.parse(same, 2)


def test_logic_at_the_ends_of_its_options() -> None:
    """OR of hardness 1 is the mixture; a not of strength 0 is the reference; A and A is A."""
    values = torch.randn(5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kappa, _ = formulas.logic(formulas.parse("p1 or p2", 2), 1.0, 1.0, None)(values)
    torch.testing.assert_close(kappa, formulas.mixture(torch.full((2,), 0.5, dtype=torch.float64), 1.0)(values)[0])
    kappa, _ = formulas.logic(formulas.parse("not p1", 2), 1.0, 0.0, None)(values)
    torch.testing.assert_close(kappa, values.softmax(1))
    times = levels(LINEAR, 10)
    one = superpose(SuperDiff(op="average"), [A], LINEAR, times, 8)
    assert torch.equal(superpose(SuperDiff(op="dombi", formula="p1 and p1"), [A], LINEAR, times, 8).x, one.x)


@pytest.mark.parametrize("formula", ["p1 +", "p1 and q", "p0", "p3", "f(p1)", "p1 and 2"])
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(DiffAccelError, match="formula"):
        formulas.parse(formula, 2)


@pytest.mark.slow
@pytest.mark.parametrize("formula", ["p1 ^ p2", "p1 and not p2"])
def test_particles_follow_the_formulas_density(formula: str) -> None:
    """Two overlapping mixtures share a mode; each mode has the mass that the formula's own density gives it."""
    pair = [
        Mixture((0.6, 0.4), ((-2.0,), (0.0,)), (0.3, 0.3)), Mixture((0.4, 0.6), ((0.0,), (2.0,)), (0.3, 0.3)),
    ]  # fmt: skip
    config = SuperDiff(op="dombi", formula=formula, hardness=1.0, particles=800)
    run = superpose(config, pair, VP_PATH, to_clean(VP_PATH, 40), 6, dim=1)
    weights = run.run.densities.log_weights.reshape(6, -1).softmax(1).flatten() / 6
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64)[:, None]
    values = torch.stack([m.log_density(x, 1.0, 0.0) for m in pair], 1)
    target = formulas.logic(formulas.parse(formula, 2), 1.0, 1.0, None)(values)[1].softmax(0)
    for low, high in ((-4, -1), (-1, 1), (1, 4)):
        mass = float(target[((x >= low) & (x < high))[:, 0]].sum())
        found = float(weights[((run.run.x >= low) & (run.run.x < high)).flatten()].sum())
        assert abs(found - mass) < 0.08, (low, found, mass)


# -- regions, the flow -------------------------------------------------------------------------------------------------


def test_regions_have_densities_of_their_own() -> None:
    """Where a region gives one component all the weight, that part of the picture is that component's alone."""
    one, other = gaussian(2.0, 0.3, 4), gaussian(-2.0, 0.3, 4)
    times = to_clean(LINEAR, 20)
    begin = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    config = SuperDiff(op="average", regions=("10", "01"), weights=(1.0, 0.0, 0.0, 1.0))
    run = superpose(config, [one, other], LINEAR, times, 5, dim=1, begin=begin)
    assert (run.x[..., 0] > 0.5).all() and (run.x[..., 1] < -0.5).all()
    assert torch.tensor(run.report["log_density"]).shape == (20, 2, 5, 2)
    both = superpose(SuperDiff(regions=("10", "01")), [one, other], LINEAR, times, 5, dim=1, begin=begin)
    differences = both.run.densities.log_density
    torch.testing.assert_close(differences, torch.zeros_like(differences), rtol=0, atol=1e-6)


def test_a_region_for_the_whole_picture_changes_nothing() -> None:
    times, begin = to_clean(LINEAR, 12), torch.randn(3, 2, 2, 2, dtype=torch.float64)
    models = [gaussian(0.5, 0.6, 8), gaussian(-0.5, 0.9, 8)]
    plain, whole = (
        superpose(SuperDiff(regions=regions), models, LINEAR, times, 3, begin=begin) for regions in ((), ("1",))
    )
    torch.testing.assert_close(whole.x, plain.x, rtol=1e-9, atol=1e-9)


def test_one_model_without_noise_is_eulers_method_to_the_bit() -> None:
    from analytic import BIMODAL, sample, start

    times = torch.linspace(0.9, 0, 9, dtype=torch.float32)
    x = start(LINEAR, 0.9, dtype=torch.float32)
    runs = [sample(config, BIMODAL, x, times) for config in (Euler(), SuperDiff(op="average", eta=0.0))]
    assert torch.equal(runs[0].x, runs[1].x) and len(runs[1].evals) == 8


def test_a_basis_of_vectors_on_one_line_and_in_one_plane_has_zero_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 50, generator=generator, dtype=torch.float64)
    vectors = torch.stack([a, -2 * a, b, a + 3 * b, 0 * a], 1)  # (3, 5, 50)
    basis = orthonormal(vectors @ vectors.mT) @ vectors
    expected = torch.diag(torch.tensor([1.0, 0, 1, 0, 0], dtype=torch.float64, device="cpu"))
    torch.testing.assert_close(basis @ basis.mT, expected.expand(3, 5, 5))
    inside = (vectors @ basis.mT) @ basis
    torch.testing.assert_close(inside, vectors)
