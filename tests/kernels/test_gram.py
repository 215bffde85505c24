"""Gram matrices: against double precision, the Triton kernel in its interpreter, the operation as torch sees it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffaccel.kernels.gram import MAX_VECTORS, gram, gram_reference

INTERPRETED = """
import torch
from diffaccel.kernels.gram import gram_reference, gram_triton
draw = torch.Generator().manual_seed(0)
for count, rows, size, differences in ((3, 2, 5, 0), (4, 1, 257, 1), (6, 2, 2100, 3), (9, 1, 300, 5)):
    vectors = torch.randn(count, rows, size, generator=draw) + 10
    for weights in (None, torch.rand(2, size, generator=draw)):
        expected = gram_reference(vectors.double(), differences, None if weights is None else weights.double())
        got = gram_triton(vectors, differences, weights)
        assert got.shape == expected.shape and got.dtype == torch.float32
        assert ((got - expected).abs() <= 2e-6 * expected.diagonal(dim1=-2, dim2=-1).amax()).all(), (count, size)
half = torch.randn(4, 2, 300, generator=draw).half()
torch.testing.assert_close(gram_triton(half, 2, None), gram_reference(half, 2, None), rtol=1e-5, atol=1e-3)
print("equal")
"""


def made(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(5, 3, 40, generator=draw).to(dtype), torch.rand(2, 40, generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_sums_written_out(dtype: torch.dtype) -> None:
    vectors, weights = made(dtype)
    u = vectors.double().clone()
    u[:2] -= u[-1].clone()
    expected = torch.einsum("rp,ibp,jbp->rbij", weights.double(), u, u)
    found = gram(vectors, 2, weights)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        gram(vectors, 2).double(), torch.einsum("ibp,jbp->bij", u, u)[None], rtol=1e-5, atol=1e-5
    )


def test_a_difference_survives_a_large_common_part() -> None:
    """Two vectors that agree in all but the last digits: their difference is formed before it is multiplied."""
    base = torch.full((1, 4096), 100.0)
    near = base + torch.linspace(-1e-3, 1e-3, 4096)
    exact = (near.double() - base.double()).square().sum()
    assert float(gram(torch.stack([near, base]), 1)[0, 0, 0, 0] / exact) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton on this platform")
def test_the_triton_kernel_in_its_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], capture_output=True, text=True, env=environment,
        timeout=300, cwd=Path(__file__).resolve().parents[2], check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "equal", done.stderr[-2000:]


def test_the_operation_is_one_that_torch_can_trace() -> None:
    vectors, weights = made()
    torch.library.opcheck(torch.ops.diffaccel.gram.default, (vectors, 2, weights), test_utils="test_schema")
    torch.library.opcheck(torch.ops.diffaccel.gram.default, (vectors, 2, None), test_utils="test_faketensor")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "size"), [(4, 16384), (6, 65536 + 3), (MAX_VECTORS, 4096)])
def test_on_a_gpu(dtype: torch.dtype, count: int, size: int) -> None:
    draw = torch.Generator("cuda").manual_seed(0)
    vectors = torch.randn(count, 3, size, generator=draw, device="cuda", dtype=torch.float32).to(dtype) + 3
    weights = torch.rand(2, size, generator=draw, device="cuda", dtype=torch.float32)
    for given in (None, weights):
        expected = gram_reference(vectors.double(), 2, None if given is None else given.double())
        found = gram(vectors, 2, given)
        assert ((found - expected).abs() <= 1e-5 * expected.diagonal(dim1=-2, dim2=-1).amax()).all()
        assert torch.equal(found, gram(vectors, 2, given))
