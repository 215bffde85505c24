"""The cells of the contract matrix that need no GPU."""

from __future__ import annotations

import matrix
import pytest


@pytest.mark.parametrize("family", matrix.FAMILIES)
@pytest.mark.parametrize("contract", matrix.CONTRACTS)
@pytest.mark.parametrize("method", matrix.METHODS)
def test_contract(method: str, contract: str, family: str) -> None:
    try:
        matrix.CONTRACTS[contract](matrix.Case(family, matrix.METHODS[method]))
    except matrix.NotHere as reason:
        pytest.skip(str(reason))
