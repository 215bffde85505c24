"""The contract matrix on a CUDA device, with the cells that only exist there: offloading."""

from __future__ import annotations

import matrix
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("family", matrix.FAMILIES)
@pytest.mark.parametrize("contract", matrix.GPU_CONTRACTS)
@pytest.mark.parametrize("method", matrix.GPU_METHODS)
def test_contract(method: str, contract: str, family: str) -> None:
    try:
        matrix.GPU_CONTRACTS[contract](matrix.Case(family, matrix.GPU_METHODS[method], "cuda"))
    except matrix.NotHere as reason:
        pytest.skip(str(reason))
