"""What users do besides calling a pipeline, with its networks captured: the result is the stock call's."""

from __future__ import annotations

import matrix
import pytest

from diffaccel.modules import Capture
from tests.support.replayed_calls import ReplayedCalls, replayed_calls

__all__ = ["replayed_calls"]  # a fixture
FAST = ("flux",)
OTHERS = ("sd", "sdxl", "wan", "ddpm")  # scripts/contract_matrix.py runs all, on a GPU
FAMILIES = [*FAST, *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)]
CONTRACTS = [pytest.param(c, marks=[pytest.mark.slow] * (c == "compiled")) for c in matrix.CONTRACTS]


@pytest.mark.parametrize("contract", CONTRACTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family: str, contract: str, replayed_calls: type[ReplayedCalls]) -> None:
    try:
        matrix.CONTRACTS[contract](matrix.Case(family, Capture()))
    except matrix.NotHere as reason:
        pytest.skip(str(reason))
