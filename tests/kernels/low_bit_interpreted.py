"""Run as a script with TRITON_INTERPRET=1: the kernels of few bits against their formulas; prints one JSON line."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from diffaccel.kernels.codes import DTYPES
from diffaccel.kernels.low_bit_linear import low_bit_linear_reference
from diffaccel.kernels.packed_codes import expand_codes_reference, pack_codes
from diffaccel.kernels.quantize_tokens import quantize_tokens_reference
from diffaccel.kernels.triton_int8 import Tile
from diffaccel.kernels.triton_low_bit import launch_expand_codes, launch_low_bit_linear, launch_quantize_tokens

DRAWS = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=DRAWS)


def expansions() -> bool:
    results = []
    for bits in range(2, 9):
        packed = pack_codes(torch.randint(0, 2**bits, (5, 264), generator=DRAWS, dtype=torch.uint8), bits)
        for codes in ("int8", "fp8")[: 2 if bits <= 5 else 1]:
            found = launch_expand_codes(packed, bits, 2 ** (bits - 1), 264, codes)
            exact = expand_codes_reference(packed, bits, 2 ** (bits - 1), 264, codes)
            results.append(torch.equal(found.float(), exact.float()))
    return all(results)


def tokens(symmetric: bool) -> bool:
    results = []
    for bits in (3, 4):
        x = normal(6, 300)
        x[1], x[2, 3], x[3, 299], x[4] = 0, float("nan"), float("inf"), x[4].abs() + 1
        clip = torch.rand(3, 2, generator=DRAWS) / 2 + 0.5
        long = [(normal(1, 20000), clip[:1])] if bits == 4 else []
        for block, factors in ((x, clip), (x[:, ::2], clip), (x[:0], clip[:1]), *long):
            found = launch_quantize_tokens(block, factors, bits, symmetric, "int8")
            exact = quantize_tokens_reference(block, factors, bits, symmetric, "int8")
            results += [
                torch.equal(f.float().nan_to_num(-7), e.float().nan_to_num(-7))
                for f, e in zip(found, exact, strict=True)
            ]
    return all(results)


def products(codes: str, descriptors: bool) -> bool:
    results, tile = [], Tile(16, 32, 128 if codes == "fp8" else 32, 4, 2)
    for m, n, k in ((33, 50, 144), (1, 7, 16), (0, 5, 16)):
        for bias in (None, normal(n))[: 2 if m == 1 else 1]:
            a = torch.randint(-8, 8, (m, k), generator=DRAWS).float().to(DTYPES[codes])
            w = torch.randint(-8, 8, (n, k), generator=DRAWS).float().to(DTYPES[codes])
            stats, rows = normal(m, 3), normal(n, 3).split(1, dim=1)
            found = launch_low_bit_linear(a, stats, w, rows, bias, torch.float32, tile, descriptors)
            exact = low_bit_linear_reference(a, stats, w, *rows, bias, torch.float32)
            results.append(torch.allclose(found, exact, rtol=1e-6, atol=1e-3))
    return all(results)


CHECKS: dict[str, Callable[[], bool]] = {
    "expansions": expansions,
    "tokens with zeros": lambda: tokens(False),
    "symmetric tokens": lambda: tokens(True),
    "int8 by descriptors": lambda: products("int8", True),
    "int8 by pointers": lambda: products("int8", False),
    "float8 by descriptors": lambda: products("fp8", True),
    "float8 by pointers": lambda: products("fp8", False),
}

if __name__ == "__main__":
    print(json.dumps({name: check() for name, check in CHECKS.items()}))
