"""What users do besides calling a pipeline, with its networks captured: the result is the stock call's."""

from __future__ import annotations

import matrix
import pytest

from diffaccel.modules import Capture
from tests.support.replayed_calls import ReplayedCalls, replayed_calls

__all__ = ["replayed_calls"]  # a fixture
FAST = ("flux",)
OTHERS = ("sd", "sdxl", "wan", "ddpm")  # scripts/contract_matrix.py runs all, on a GPU
COMPILED = ("flux", "sd", "wan")  # the networks of the others are compiled in the script
CELLS = [
    pytest.param(family, contract, marks=[pytest.mark.slow] * (family not in FAST or contract == "compiled"))
    for family in (*FAST, *OTHERS)
    for contract in matrix.CONTRACTS
    if contract != "compiled" or family in COMPILED
]


@pytest.mark.parametrize(("family", "contract"), CELLS)
def test_contract(family: str, contract: str, replayed_calls: type[ReplayedCalls]) -> None:
    try:
        matrix.CONTRACTS[contract](matrix.Case(family, Capture()))
    except matrix.NotHere as reason:
        pytest.skip(str(reason))
