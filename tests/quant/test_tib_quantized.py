"""The quantized temporal information block: closed forms, losses that fall, and errors beside round-to-nearest."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import matrix
import pytest
import torch

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.quant import TIB
from diffaccel.quant.learned_rounding import SoftRounding, largest_code, nearest
from diffaccel.quant.tib.quantized import affine_codes, feature_error


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def told(pipe: Any) -> dict[str, Any]:
    return diffaccel.summary(pipe).reports["tib"]["tables"][0]["quantized"]


# -- closed forms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_one_range_are_off_by_half_a_step(bits: int) -> None:
    x = drawn(1000)
    low, high = x.amin(), x.amax()
    step = (high - low) / (2**bits - 1)
    assert float((affine_codes(x, low, high, bits) - x).abs().max()) <= float(step) * 0.5 * 1.01
    codes = ((affine_codes(x, low, high, bits)) / step).round()
    assert len(codes.unique()) <= 2**bits and float(affine_codes(torch.zeros(1), low, high, bits)) == 0.0


def test_codes_of_sixteen_bits_equal_the_features() -> None:
    x = drawn(64)
    torch.testing.assert_close(affine_codes(x, x.amin(), x.amax(), 16), x, rtol=0, atol=1e-4)


def test_scales_lower_the_error_below_that_of_the_largest_magnitude() -> None:
    weight, n = drawn(16, 64), largest_code(4)
    largest = weight.abs().amax(dim=1, keepdim=True) / n
    plain = ((weight / largest).round() * largest - weight).abs().pow(2.4).sum(dim=1)
    searched = (nearest(weight, 4) - weight).abs().pow(2.4).sum(dim=1)
    assert bool((searched <= plain * (1 + 1e-6)).all()) and bool((searched < plain).any())
    exact = torch.randint(-7, 8, (8, 32), generator=torch.Generator().manual_seed(1)).float()
    exact[:, 0] = 7
    assert torch.equal(nearest(0.5 * exact, 4), 0.5 * exact)


def test_soft_rounding_starts_at_the_weight_and_hardens_to_codes() -> None:
    weight = drawn(8, 32)
    rounding = SoftRounding(weight, 8)
    inside = (weight / rounding.scale).abs() <= 127
    torch.testing.assert_close(rounding.soft()[inside].detach(), weight[inside], rtol=0, atol=1e-4)
    codes = rounding.hard() / rounding.scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert float(rounding.penalty(2.0)) > 0
    rounding.variable = torch.where(drawn(8, 32, seed=3) > 0, 10.0, -10.0)
    assert float(rounding.penalty(2.0)) == 0.0 and torch.equal(rounding.soft(), rounding.hard())


def test_flips_lower_the_error_of_a_layer_and_say_how_far() -> None:
    weight, x = drawn(24, 64), drawn(6, 64, seed=1)
    rounding = SoftRounding(weight, 4)
    before = x @ (rounding.hard() - weight).T
    left = rounding.descend(x, before)
    after = x @ (rounding.hard() - weight).T
    assert left == pytest.approx(float(after.square().sum()), rel=1e-2, abs=1e-4)
    assert float(after.square().sum()) < 0.05 * float(before.square().sum())
    assert float((rounding.hard() / rounding.scale).abs().max()) <= 7 + 1e-4


def test_errors_and_confusion_of_features() -> None:
    exact = [{0: drawn(2, 8, seed=t)} for t in range(4)]
    same = feature_error(exact, exact)
    assert (same.mean, same.largest, same.confused) == (0.0, 0.0, 0.0)
    shifted = feature_error(exact, [*exact[1:], exact[0]])
    assert shifted.confused == 1.0
    scaled = feature_error(exact, [{0: 1.1 * values[0]} for values in exact])
    assert scaled.mean == pytest.approx(0.1, rel=1e-4) and scaled.confused == 0.0


# -- on pipelines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dit", pytest.param("flux", marks=pytest.mark.slow)])
def test_the_reconstructed_block_is_nearer_than_round_to_nearest(family: str) -> None:
    case = matrix.Case(family, TIB(bits=4, features="tiar", iterations=40))
    pipe = case.make()
    expected = case.call(pipe)
    result = case.call(case.wrap(pipe))
    errors = told(pipe)["errors"]
    assert errors["tiar"]["mean"] < 0.6 * errors["nearest"]["mean"] and errors["tiar"]["confused"] == 0
    assert not torch.equal(result, expected) and torch.equal(case.call(pipe), result)
    assert told(pipe)["features"]["cache"] == 0 and told(pipe)["features"]["tiar"] > 0
    assert torch.equal(case.call(diffaccel.remove(pipe)), expected)


def test_each_feature_takes_the_nearer_form() -> None:
    case = matrix.Case("wan", TIB(bits=4, iterations=5))
    pipe = case.wrap(case.make())
    case.call(pipe)
    maker = pipe.transformer._diffaccel_temporal.owner.maker
    cache, tiar = (maker.errors[name].by_feature for name in ("cache", "tiar"))
    assert told(pipe)["features"] == {
        "cache": sum(cache[n] < tiar[n] for n in cache), "tiar": sum(cache[n] >= tiar[n] for n in cache)
    }  # fmt: skip


@pytest.mark.parametrize("features", ["cache", "nearest"])
def test_the_forms_to_compare_with(features: str) -> None:
    case = matrix.Case("sd", TIB(bits=8, features=features))
    pipe = case.make()
    expected = case.call(pipe)
    result = case.call(case.wrap(pipe))
    assert not torch.equal(result, expected)
    torch.testing.assert_close(result, expected, rtol=0.1, atol=0.1)
    assert set(told(pipe)["errors"]) == {"cache", "nearest"}


def test_the_published_form_and_bad_options() -> None:
    assert TIB.paper() == TIB(bits=4, act_bits=8, iterations=20000)
    for options, part in (({"bits": 3}, "bits"), ({"bits": 4, "rank": 2}, "rank"), ({"iterations": 0}, "iterations")):
        with pytest.raises(DiffAccelError, match=part):
            TIB(**options)


@pytest.mark.slow
def test_emoji_flux_at_four_bits() -> None:
    pipe = diffaccel.load("emoji-flux")
    diffaccel.accelerate(pipe, TIB(bits=4, features="tiar", iterations=4))
    pipe.set_progress_bar_config(disable=True)
    pipe("red apple, fluent 3d", height=64, width=64, num_inference_steps=8, output_type="latent")
    errors = told(pipe)["errors"]
    assert errors["tiar"]["mean"] < errors["nearest"]["mean"] and errors["tiar"]["confused"] <= 0.01


# -- nothing is stale --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_changed_weights_are_calibrated_again(change: str) -> None:
    case = matrix.Case("flux", TIB(bits=4, features="nearest"))
    pipe, fresh = case.wrap(case.make()), case.make()
    case.call(pipe, steps=1)
    for one in (pipe, fresh):
        network = one.transformer
        if change == "dtype":
            one.to(torch.bfloat16)
        else:
            network.load_state_dict({name: value.flip(0) for name, value in network.state_dict().items()})
    assert torch.equal(case.call(pipe, steps=1), case.call(case.wrap(fresh), steps=1))


def test_copies_and_pickles_have_the_features_of_their_own_weights() -> None:
    case = matrix.Case("flux", TIB(bits=4, features="nearest"))
    pipe = case.wrap(case.make())
    expected = case.call(pipe, steps=1)
    for other in (copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(case.call(other, steps=1), expected)
