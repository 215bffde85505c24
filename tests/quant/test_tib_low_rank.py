"""Low-rank modulation: the bound holds for any timestep, full rank is exact, and refusals name the exact mode."""

from __future__ import annotations

from typing import Any

import matrix
import pytest
import torch
from torch import nn

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.quant import TIB
from diffaccel.quant.tib.low_rank import LowRankLinear


def told(pipe: Any) -> dict[str, Any]:
    return diffaccel.summary(pipe).reports["tib"]["low_rank"][0]


@pytest.mark.parametrize("family", ["wan", pytest.param("sd", marks=pytest.mark.slow), "cogvideox", "pixart"])
def test_full_rank_is_exact_up_to_rounding_and_removal_to_the_bit(family: str) -> None:
    case = matrix.Case(family, TIB(rank=4096))
    pipe = case.make()
    expected = case.call(pipe)
    result = case.call(case.wrap(pipe))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    assert told(pipe)["linears"] > 0 and told(pipe)["relative"] < 1e-5 and told(pipe)["ulps"] < 1
    assert torch.equal(case.call(diffaccel.remove(pipe)), expected)


@pytest.mark.slow
def test_the_error_falls_with_the_rank_and_stays_below_its_bound() -> None:
    errors = []
    for rank in (2, 12):
        case = matrix.Case("wan", TIB(rank=rank))
        pipe = case.make()
        network = case.network(pipe)
        linear, silu = network.condition_embedder.time_proj, nn.SiLU()
        case.call(case.wrap(pipe))
        low = network.condition_embedder.time_proj
        assert isinstance(low, LowRankLinear) and low.folded.shape == (linear.out_features, rank)
        times = 1000 * torch.rand(500, generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            embedder = network.condition_embedder
            u = silu(embedder.time_embedder(embedder.timesteps_proj(times)))
            exact, approximate = linear(u), low(u)
        measured = float(((exact - approximate).norm(dim=1) / exact.norm(dim=1)).max())
        assert measured <= 1.05 * told(pipe)["relative"]
        errors.append(measured)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 2


@pytest.mark.slow
def test_another_schedule_needs_nothing() -> None:
    case = matrix.Case("wan", TIB(rank=4096))
    plain, pipe = case.make(), case.wrap(case.make())
    for steps in (4, 3, 7):
        torch.testing.assert_close(case.call(pipe, steps=steps), case.call(plain, steps=steps), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["flux", "sd3", "dit", "hunyuan"])
def test_networks_whose_modulation_depends_on_more_are_refused_at_once(family: str) -> None:
    with pytest.raises(DiffAccelError, match=r"TIB\(\) without a rank"):
        diffaccel.accelerate(matrix.Case(family, None).make(), TIB(rank=16))


@pytest.mark.parametrize("family", ["sdxl", "pixart_alpha", "wan5b"])
def test_others_are_refused_at_the_first_call(family: str) -> None:
    case = matrix.Case(family, TIB(rank=16))
    with pytest.raises(DiffAccelError, match=r"TIB\(\) without a rank") as refusal:
        case.call(case.wrap(case.make()))
    assert ("added_cond_kwargs" in str(refusal.value)) == (family != "wan5b")


def test_bad_rank() -> None:
    with pytest.raises(DiffAccelError, match="rank"):
        TIB(rank=-1)
