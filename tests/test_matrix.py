"""The cells of the contract matrix that need no GPU."""

from __future__ import annotations

import itertools
from typing import Any

import matrix
import pytest


def cell(method: str, contract: str, family: str) -> Any:
    slow = contract == "compiled" and family != "flux"
    return pytest.param(method, contract, family, id=f"{method}-{contract}-{family}", marks=[pytest.mark.slow] * slow)


CELLS = [cell(*names) for names in itertools.product(matrix.METHODS, matrix.CONTRACTS, matrix.FAMILIES)]


@pytest.mark.parametrize(("method", "contract", "family"), CELLS)
def test_contract(method: str, contract: str, family: str) -> None:
    try:
        matrix.CONTRACTS[contract](matrix.Case(family, matrix.METHODS[method]))
    except matrix.NotHere as reason:
        pytest.skip(str(reason))
