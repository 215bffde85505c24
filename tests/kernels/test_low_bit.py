"""Codes of 2 to 8 bits: packing, tokens with zeros and the exact product against closed forms, and the kernels."""

from __future__ import annotations

import json
import sys
from functools import cache
from typing import Any

import pytest
import torch

from diffaccel.kernels.low_bit_linear import best_codes, low_bit_linear
from diffaccel.kernels.packed_codes import expand_codes, pack_codes, packed_width, unpack_codes
from diffaccel.kernels.quantize_tokens import quantize_tokens
from tests.layout import tree


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(low: int, high: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_from_their_bytes(bits: int) -> None:
    codes = whole(0, 2**bits, 5, 64).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, 8 * bits) and packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, 64), codes)
    centred = expand_codes(packed, bits, 2 ** (bits - 1), 64, "int8")
    assert torch.equal(centred.int() + 2 ** (bits - 1), codes.int())
    if bits <= 5:
        assert torch.equal(expand_codes(packed, bits, 2 ** (bits - 1), 64, "fp8").float(), centred.float())


def test_the_layout_of_the_bits() -> None:
    assert pack_codes(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x0F]]
    three = pack_codes(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]], dtype=torch.uint8), 3)
    assert sum(byte << (8 * i) for i, byte in enumerate(three[0].tolist())) == sum(
        code << (3 * i) for i, code in enumerate((1, 2, 3, 4, 5, 6, 7, 0))
    )


def test_tokens_by_hand() -> None:
    """lo = -1, hi = 2: s = 3 / 15, z = 5; a constant row and a row of zeros keep their values."""
    x = torch.tensor([[-1.0, 2.0, 0.05, 0.31], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    a, stats = quantize_tokens(x, torch.ones(1, 2), 4, False, "int8")
    assert a.tolist()[0] == [-8, 7, -3, -1] and stats[0].tolist() == pytest.approx([0.2, -3.0, -5.0])
    back = (a.float() - stats[:, 1:2]) * stats[:, :1]
    torch.testing.assert_close(back[1:], x[1:])
    assert torch.equal(stats[:, 2], a.float().sum(1))


def test_samples_have_their_own_clipping() -> None:
    x, clip = draw(6, 32), torch.tensor([[1.0, 1.0], [0.5, 0.25], [0.7, 0.9]])
    both = quantize_tokens(x, clip, 4, False, "int8")
    for sample in range(3):
        rows = slice(2 * sample, 2 * sample + 2)
        alone = quantize_tokens(x[rows], clip[sample : sample + 1], 4, False, "int8")
        assert torch.equal(both[0][rows], alone[0]) and torch.equal(both[1][rows], alone[1])


def test_rows_that_are_no_numbers_stay_so() -> None:
    x = draw(4, 32)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    a, stats = quantize_tokens(x, torch.ones(1, 2), 4, False, "int8")
    rows = draw(5, 1).abs(), draw(5, 1, seed=1), draw(5, 1, seed=2)
    y = low_bit_linear(a, stats, whole(-8, 8, 5, 32).to(torch.int8), *rows, None, torch.float32)
    assert y[1:3].isnan().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("bits", (2, 4, 8))
def test_the_product_is_that_of_the_numbers_behind_the_codes(bits: int, symmetric: bool) -> None:
    x, bias, half = draw(7, 96) + 0.5, draw(5), 2 ** (bits - 1)
    a, stats = quantize_tokens(x, torch.full((1, 2), 0.9), bits, symmetric, "int8")
    w = whole(-half, half, 5, 96, seed=1).to(torch.int8)
    scale, zero, total = draw(5, 1).abs(), draw(5, 1, seed=3), w.float().sum(1, keepdim=True)
    seen = (a.double() - stats[:, 1:2].double()) * stats[:, :1].double()
    exact = seen @ ((w.double() - zero.double()) * scale.double()).t() + bias.double()
    y = low_bit_linear(a, stats, w, scale, zero, total, bias, torch.float32)
    assert float((y.double() - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("k", (1536, 12288))
def test_sums_of_adversarial_codes_are_exact_in_float8_formulas(k: int) -> None:
    for value in (-8, 7):
        a = torch.full((1, k), float(value)).to(torch.float8_e4m3fn)
        stats, one, none = torch.tensor([[1.0, 0.0, 0.0]]), torch.ones(1, 1), torch.zeros(1, 1)
        y = low_bit_linear(a, stats, a, one, none, none, None, torch.float32)
        assert float(y) == value * value * k


def test_the_dtype_of_the_products() -> None:
    assert best_codes(torch.device("cpu"), 4, 4) == "int8"


def test_operations_pass_the_checks_of_torch() -> None:
    w = whole(-8, 8, 5, 32).to(torch.int8)
    rows = draw(5, 1).abs(), draw(5, 1), draw(5, 1)
    checks: dict[Any, tuple[Any, ...]] = {
        torch.ops.diffaccel.quantize_tokens: (draw(6, 32), torch.ones(2, 2), 4, False, "int8"),
        torch.ops.diffaccel.expand_codes: (pack_codes(whole(0, 8, 5, 32).to(torch.uint8), 3), 3, 4, 32, "int8"),
        torch.ops.diffaccel.low_bit_linear: (w[:3], draw(3, 3), w, *rows, draw(5), torch.float32),
    }
    for operation, arguments in checks.items():
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: packed_width(5, 4), "multiple of 2"),
        (lambda: packed_width(12, 3), "multiple of 8"),
        (lambda: expand_codes(torch.zeros(2, 3, dtype=torch.uint8), 4, 8, 8, "int8"), r"uint8 \(N, 4\)"),
        (lambda: quantize_tokens(draw(4, 8), torch.ones(3, 2), 4, False, "int8"), "multiple of B"),
        (lambda: quantize_tokens(draw(4, 8), torch.ones(1, 2), 9, False, "int8"), "of 9 bits"),
        (lambda: quantize_tokens(draw(4, 8), torch.ones(1, 2), 6, False, "fp8"), "of 6 bits"),
        (lambda: low_bit_linear(draw(2, 8), *[draw(2, 3)] * 5), "codes must be"),
    ),
)
def test_errors_say_what_is_wrong(call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()


# -- kernels ----------------------------------------------------------------------------------------------------------

CHECKS = (
    "expansions", "tokens with zeros", "symmetric tokens", "int8 by descriptors", "int8 by pointers",
    "float8 by descriptors", "float8 by pointers",
)  # fmt: skip


@cache
def interpreted() -> dict[str, bool]:
    done = tree.python("-m", "tests.kernels.low_bit_interpreted", cwd=tree.ROOT, TRITON_INTERPRET="1")
    found: dict[str, bool] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_kernel_under_the_interpreter(name: str) -> None:
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8):
        pytest.skip("older interpreters cannot loop to a runtime bound with this numpy")
    assert interpreted()[name] and set(interpreted()) == set(CHECKS)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_compiled_for_hopper() -> None:
    """Products use the tensor cores, float8 sums leave them every 128, quantization fuses no multiply and add."""
    pytest.importorskip("triton")
    done = tree.python("-W", "ignore", "-m", "tests.kernels.compiled_low_bit", cwd=tree.ROOT)
    rows = {row.pop("name"): row for row in map(json.loads, done.stdout.splitlines())}
    assert len(rows) == 14
    for name, row in rows.items():
        assert row["local"] == 0 and row["stack"] == 0, f"{name} spills registers"
        assert row["shared"] <= 232_448, name
        assert (row["int8 tensor cores"] > 0) == name.startswith("int8"), name
        assert (row["float8 tensor cores"] > 0) == name.startswith("fp8"), name
    for name, row in rows.items():
        if name.startswith("fp8") and "warps" in name:
            (m, n), warps = map(int, name.split()[1].split("x")), int(name.split()[2])
            assert row["additions"] >= m * n // (32 * warps), "sums stay in the tensor cores"
        if name.startswith("tokens"):
            assert row["fused multiplies"] == 0
