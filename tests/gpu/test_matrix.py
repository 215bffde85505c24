"""The contract matrix on a CUDA device, with the cells that only exist there: offloading."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matrix
import pytest
import self_contracts
import torch
from matrix import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """Compute convolutions in whole float32, so that a row alone and in a batch differ by rounding only."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def check(contract: Any, case: Case) -> None:
    try:
        contract(case)
    except matrix.NotHere as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("family", matrix.FAMILIES)
@pytest.mark.parametrize("contract", matrix.GPU_CONTRACTS)
@pytest.mark.parametrize("method", matrix.GPU_METHODS)
def test_contract(method: str, contract: str, family: str) -> None:
    if family in matrix.REFUSES.get(method, {}):
        pytest.skip(matrix.REFUSES[method][family])
    case = Case(family, matrix.GPU_METHODS[method], "cuda", matrix.REFERENCES.get(method))
    check(matrix.GPU_CONTRACTS[contract], case)


@pytest.mark.parametrize("family", ["flux", "sd", "wan"])
@pytest.mark.parametrize("contract", self_contracts.GPU_SELF_CONTRACTS)
@pytest.mark.parametrize("method", self_contracts.CHANGING)
def test_contract_of_a_method_that_changes_the_result(method: str, contract: str, family: str) -> None:
    if family in self_contracts.REFUSES.get(method, {}):
        pytest.skip(self_contracts.REFUSES[method][family])
    check(self_contracts.GPU_SELF_CONTRACTS[contract], Case(family, self_contracts.CHANGING[method], "cuda"))
