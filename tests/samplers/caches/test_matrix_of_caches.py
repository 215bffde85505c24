"""What users do besides calling a pipeline, under a cache with real steps only: the result is the stock call's."""

from __future__ import annotations

import matrix
import pytest

from diffaccel.samplers import TaylorSeer

FAMILIES = ("flux", "sd", pytest.param("wan", marks=pytest.mark.slow))
CONTRACTS = [name for name in matrix.CONTRACTS if name not in ("stock", "generators", "negative", "bfloat16")]


@pytest.mark.parametrize("contract", [pytest.param(c, marks=[pytest.mark.slow] * (c == "compiled")) for c in CONTRACTS])
@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family: str, contract: str) -> None:
    try:
        matrix.CONTRACTS[contract](matrix.Case(family, TaylorSeer(interval=1)))
    except matrix.NotHere as reason:
        pytest.skip(str(reason))
