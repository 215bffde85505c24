"""Run as a script with TRITON_INTERPRET=1: every kernel on the CPU against its formula; prints one JSON line.

The interpreter truncates where a GPU rounds to bf16 and differs in float8, so that kernels write fp32 here, and float8
is compared by the share of equal codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from diffaccel.kernels.int4_weight import dequantize_int4_reference, expand_int4_reference, pack_int4
from diffaccel.kernels.int8_linear import int8_linear_reference
from diffaccel.kernels.quantize_rows import quantize_rows_reference
from diffaccel.kernels.triton_int8 import Tile, launch_int8_linear
from diffaccel.kernels.triton_rows import launch_quantize_rows
from diffaccel.kernels.triton_weights import launch_gemv, launch_int4, launch_int8
from diffaccel.kernels.weight_linear import weight_linear_reference

DRAWS = torch.Generator().manual_seed(0)
TILE = Tile(16, 32, 32, 4, 2)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAWS)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=DRAWS, dtype=torch.int8)


def same(x: torch.Tensor, y: torch.Tensor, tolerance: float = 0.0) -> bool:
    if tolerance == 0:
        return torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0))
    return bool(torch.allclose(x.float(), y.float(), rtol=tolerance, atol=tolerance, equal_nan=True))


def rows_of_integers() -> bool:
    x = normal(7, 300)
    x[1], x[2, 5], x[3, 299], x[4, 0] = 0, float("nan"), float("inf"), -float("inf")
    x[5, :7] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]) * 0.25
    results = []
    for block in (x, x[:, ::2], x.half(), x[:1], x[:0]):
        (q, scale), (q_exact, scale_exact) = launch_quantize_rows(block, "int8"), quantize_rows_reference(block, "int8")
        results.append(same(q, q_exact) and same(scale, scale_exact))
    return all(results)


def rows_longer_than_a_block() -> bool:
    x = normal(2, 20000)
    x[1, 19999] = float("nan")
    (q, scale), (q_exact, scale_exact) = launch_quantize_rows(x, "int8"), quantize_rows_reference(x, "int8")
    return same(q, q_exact) and same(scale, scale_exact)


def rows_of_floats() -> bool:
    x = normal(5, 64)
    x[1], x[2, 5] = 0, float("nan")
    (q, scale), (q_exact, scale_exact) = launch_quantize_rows(x, "fp8"), quantize_rows_reference(x, "fp8")
    equal = (q.float() == q_exact.float()).float().mean()  # the interpreter misses the carry into the next power of two
    return float(equal) > 0.9 and same(scale, scale_exact) and not q[1:3].float().any()


def products(descriptors: bool) -> bool:
    results = []
    for m, n, k in ((33, 50, 112), (1, 7, 16), (64, 96, 160), (0, 5, 16), (17, 33, 48)):
        for bias in (None, normal(n)):
            a, w = codes(m, k), codes(n, k)
            scales = normal(m, 1).abs(), normal(n, 1).abs()
            y = launch_int8_linear(a, scales[0], w, scales[1], bias, torch.float32, TILE, descriptors)
            exact = int8_linear_reference(a, scales[0], w, scales[1], bias, torch.float32)
            results.append(same(y, exact, 1e-6 if bias is not None else 0.0) or same(y, exact, 2e-7))
    return all(results)


def products_of_any_depth() -> bool:
    a, w, one = codes(3, 33), codes(5, 33), torch.ones(5, 1)
    y = launch_int8_linear(a, one[:3], w, one, None, torch.float32, TILE, False)
    extreme = torch.full((1, 15360), 127, dtype=torch.int8)
    large = launch_int8_linear(extreme, one[:1], -extreme, one[:1], None, torch.float32, TILE, True)
    return same(y, int8_linear_reference(a, one[:3], w, one, None, torch.float32)) and float(large) == -247_741_440.0


def a_row_that_is_no_number() -> bool:
    a, w, scale = codes(4, 32), codes(6, 32), torch.ones(4, 1)
    scale[2] = float("nan")
    y = launch_int8_linear(a, scale, w, torch.ones(6, 1), None, torch.float32, TILE, True)
    return bool(y[2].isnan().all()) and bool(y[[0, 1, 3]].isfinite().all())


def expansions() -> bool:
    results = []
    for n, k, groups in ((5, 64, 1), (33, 256, 8), (70, 600, 6)):
        packed = pack_int4(torch.randint(-7, 8, (n, k), generator=DRAWS, dtype=torch.int8))
        multipliers = torch.randint(1, 19, (n, groups), generator=DRAWS, dtype=torch.uint8)
        expanded = launch_int4(packed, multipliers, torch.int8)
        results.append(same(expanded, expand_int4_reference(packed, multipliers)))
        scales = normal(n, groups).abs()
        dense = launch_int4(packed, scales, torch.float32)
        results.append(same(dense, dequantize_int4_reference(packed, scales, torch.float32)))
        rows = normal(n, 1).abs()
        results.append(same(launch_int8(w := codes(n, k), rows, torch.float32), w.float() * rows))
    return all(results)


def few_rows() -> bool:
    results = []
    for m, n, k in ((1, 70, 256), (2, 64, 320), (16, 33, 128)):
        x = normal(m, k).half()
        for bias in (None, normal(n)):
            w, scale = codes(n, k), normal(n, 1).abs() * 0.01
            exact = weight_linear_reference(x.double(), w, scale, bias)
            results.append(same(launch_gemv(x, w, scale, bias), exact, 1e-2))
            packed, scales = pack_int4(w.clamp(-7, 7)), normal(n, k // 64).abs() * 0.1
            exact = weight_linear_reference(x.double(), packed, scales, bias)
            results.append(same(launch_gemv(x, packed, scales, bias), exact, 1e-2))
    return all(results)


CHECKS: dict[str, Callable[[], bool]] = {
    "rows of integers": rows_of_integers,
    "rows longer than a block": rows_longer_than_a_block,
    "rows of floats": rows_of_floats,
    "products by descriptors": lambda: products(True),
    "products by pointers": lambda: products(False),
    "products of any depth": products_of_any_depth,
    "a row that is no number": a_row_that_is_no_number,
    "expansions": expansions,
    "few rows": few_rows,
}

if __name__ == "__main__":
    print(json.dumps({name: check() for name, check in CHECKS.items()}))
