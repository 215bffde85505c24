"""The program of bits: against every plan there is, the exact solver, and its bound."""

from __future__ import annotations

import itertools
import random
import sys

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.quant.mixdq.allocate import LayerChoices, allocate, allocate_exactly, group_budgets
from diffaccel.quant.mixdq.choose import Choosing, choose, uniform

BITS = (2, 4, 8)


def random_layers(count: int, seed: int) -> list[LayerChoices]:
    draw = random.Random(seed)
    layers = []
    for i in range(count):
        size, values = draw.randint(1, 50), sorted(draw.random() for _ in BITS)
        layers.append(
            LayerChoices(f"layer{i}", {b: float(b * size) for b in BITS}, dict(zip(BITS, values, strict=True)))
        )
    return layers


def weights_of(layers: list[LayerChoices]) -> float:
    return sum(layer.cost[2] for layer in layers) / 2


def best_of(layers: list[LayerChoices], budget: float) -> float:
    plans = itertools.product(BITS, repeat=len(layers))
    return max(
        sum(layer.value[b] for layer, b in zip(layers, plan, strict=True))
        for plan in plans
        if sum(layer.cost[b] for layer, b in zip(layers, plan, strict=True)) <= budget
    )


@pytest.mark.parametrize("seed", range(20))
def test_within_the_budget_under_the_bound_and_near_the_best(seed: int) -> None:
    layers = random_layers(6, seed)
    budget = random.Random(seed).uniform(2, 8) * weights_of(layers)
    plan, best = allocate(layers, budget), best_of(layers, budget)
    assert plan.cost <= budget * (1 + 1e-6) and plan.objective <= best + 1e-12 <= plan.bound + 1e-9
    assert plan.objective >= 0.97 * best and plan.gap == pytest.approx((plan.bound - plan.objective) / plan.bound)


def test_the_exact_solver_finds_the_best_of_all_plans() -> None:
    pytest.importorskip("scipy.optimize")
    for seed in range(10):
        layers = random_layers(6, seed)
        budget = 4.3 * weights_of(layers)
        plan = allocate_exactly(layers, budget)
        assert plan.objective == pytest.approx(best_of(layers, budget), abs=1e-9) and plan.cost <= budget * (1 + 1e-6)
        assert allocate(layers, budget).objective <= plan.objective + 1e-9 <= plan.bound + 2e-9


def test_the_exact_solver_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(DiffAccelError, match="needs scipy"):
        allocate_exactly(random_layers(2, 0), 1e9)


def test_the_ends_and_monotony() -> None:
    layers = random_layers(8, 3)
    size = weights_of(layers)
    assert set(allocate(layers, 8 * size).bits.values()) == {8} and allocate(layers, 8 * size).gap == 0
    assert set(allocate(layers, 2 * size).bits.values()) == {2}
    objectives = [allocate(layers, average * size).objective for average in (2, 2.5, 3, 4, 5, 6, 7, 8)]
    assert objectives == sorted(objectives)
    with pytest.raises(DiffAccelError, match="Allow more"):
        allocate(layers, 1.9 * size)


def test_equal_values_give_more_bits_to_the_smallest_layers() -> None:
    layers = [LayerChoices(f"{s}", {b: float(b * s) for b in BITS}, {2: 0.1, 4: 0.5, 8: 0.9}) for s in (30, 10, 20)]
    assert allocate(layers, 4 * 60).bits == {"30": 2, "20": 4, "10": 8} or allocate(layers, 4 * 60).bits["10"] >= 4
    assert allocate(layers, 2 * 60 + 20).bits == {"30": 2, "20": 2, "10": 4}


def test_a_choice_that_is_worth_no_more_is_not_paid_for() -> None:
    layer = LayerChoices("a", {2: 2.0, 4: 4.0, 8: 8.0}, {2: 0.5, 4: 0.4, 8: 0.9})
    assert layer.useful() == [2, 8] and allocate([layer], 5.0).bits == {"a": 2}
    assert LayerChoices("a", {2: 2.0, 4: 4.0, 8: 8.0}, {2: 0.0, 4: 0.1, 8: 0.9}).hull() == [2, 8]


def test_averages_of_groups_make_the_total() -> None:
    for ratio in (0.46, 1.0, 1.36):
        first, second = group_budgets(5.02, ratio, 3e8, 1.3e8)
        assert first == pytest.approx(ratio * second)
        assert 3e8 * first + 1.3e8 * second == pytest.approx(5.02 * 4.3e8, rel=1e-12)


def test_the_candidate_with_the_nearest_pictures_is_kept() -> None:
    layers = random_layers(8, 5)
    sizes = {layer.name: int(layer.cost[2] / 2) for layer in layers}
    names = [layer.name for layer in layers]
    what = Choosing(sizes, {layer.name: layer.value for layer in layers}, [names[:4], names[4:]])
    asked: list[dict[str, int]] = []

    def error(bits: dict[str, int]) -> float:
        asked.append(bits)
        return float(sum(bits[name] for name in names[:4]))  # prefers few bits in the first group

    found = choose(what, 5.0, "weight", 5, 2, error)
    tried = list(asked)
    assert len(tried) > 1 and error(found.bits) == min(map(error, tried)) and found.average <= 5.0 + 1e-9
    assert found.results["candidates"] == len({tuple(bits.items()) for bits in tried})
    with pytest.raises(DiffAccelError, match=r"from 2\.00 to 8\.00"):
        choose(what, 1.0, "weight", 3, 1, error)


@pytest.mark.parametrize("target", (4.0, 4.02, 4.6))
def test_every_average_within_the_ends_has_a_plan(target: float) -> None:
    names, values = ["a", "b", "c"], {name: {4: 0.0, 8: 1.0} for name in "abc"}
    what = Choosing({"a": 300, "b": 7, "c": 13}, values, [names[:1], names[1:]])
    found = choose(what, target, "activation", 10, 1, lambda bits: 0.0)
    assert 4 <= found.average <= target + 1e-9


def test_time_as_the_cost() -> None:
    names, values = ["a", "b"], {"a": {4: 0.1, 8: 1.0}, "b": {4: 0.5, 8: 0.6}}
    times = {"a": {4: 1.0, 8: 2.0}, "b": {4: 1.0, 8: 2.0}}
    what = Choosing({"a": 1, "b": 1}, values, [names], times, share=0.5)
    assert choose(what, 8.0, "weight", 1, 1, lambda bits: 0.0).bits == {"a": 8, "b": 4}


def test_the_same_bits_everywhere() -> None:
    sizes = {"a": 10, "b": 10, "c": 20}
    assert uniform(list(sizes), sizes, BITS, 4) == {"a": 4, "b": 4, "c": 4}
    assert uniform(list(sizes), sizes, BITS, 5) == {"a": 8, "b": 4, "c": 4}
    assert uniform(list(sizes), sizes, (4, 8), 8) == {"a": 8, "b": 8, "c": 8}


@pytest.mark.slow
def test_the_size_of_a_real_unet() -> None:
    """794 layers: within a ten-thousandth of the bound."""
    draw = random.Random(0)
    layers = []
    for i in range(794):
        size = draw.choice([320 * 320, 1280 * 1280, 1280 * 10240, 640 * 640 * 9])
        values = sorted(1 - 0.1 * draw.random() ** 4 for _ in BITS)
        layers.append(LayerChoices(f"{i}", {b: float(b * size) for b in BITS}, dict(zip(BITS, values, strict=True))))
    for average in (3.66, 4.0, 5.02):
        assert allocate(layers, average * weights_of(layers)).gap < 1e-4
