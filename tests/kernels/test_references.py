"""The formulas of the GPU operations against float64 and closed forms, and the operations as torch sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffaccel.kernels.fp8_linear import fp8_linear
from diffaccel.kernels.int4_weight import dequantize_int4, expand_int4, pack_int4
from diffaccel.kernels.int8_conv import int8_conv2d
from diffaccel.kernels.int8_linear import LARGEST_K, int8_linear, int_matmul
from diffaccel.kernels.quantize_pictures import quantize_pictures
from diffaccel.kernels.quantize_rows import quantize_rows
from diffaccel.kernels.weight_linear import weight_linear

BAD = (float("nan"), float("inf"), -float("inf"))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def ones(n: int) -> torch.Tensor:
    return torch.ones(n, 1)


def test_rounding_ties_go_to_the_even_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    q, scale = quantize_rows(x, "int8")
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2]] and float(scale) == 1.0


@pytest.mark.parametrize("kind", ("int8", "fp8"))
def test_rows_of_zeros_and_rows_that_are_no_numbers(kind: Any) -> None:
    x = draw(6, 40)
    x[1] = 0
    for row, bad in zip((2, 3, 4), BAD, strict=True):
        x[row, 7] = bad
    q, scale = quantize_rows(x, kind)
    assert not q[1].float().any() and float(scale[1]) < 1e-13
    assert scale[2:5].isnan().all() and scale[[0, 1, 5]].isfinite().all()
    w, w_scale = quantize_rows(draw(8, 40, seed=1), kind)
    product = int8_linear if kind == "int8" else fp8_linear
    y = product(q, scale, w, w_scale, torch.full((8,), 2.0), torch.float32)
    assert y[2:5].isnan().all() and y[[0, 5]].isfinite().all() and (y[1] == 2).all()


@pytest.mark.parametrize("kind", ("int8", "fp8"))
def test_rows_alone_permuted_and_scaled(kind: Any) -> None:
    x = draw(9, 64)
    q, scale = quantize_rows(x, kind)
    order = torch.randperm(9)
    assert torch.equal(quantize_rows(x[order], kind)[0].float(), q[order].float())
    assert torch.equal(quantize_rows(x[3:4], kind)[0].float(), q[3:4].float())
    larger, larger_scale = quantize_rows(x * 16, kind)
    assert torch.equal(larger.float(), q.float()) and torch.equal(larger_scale, scale * 16)


def test_integer_sums_are_exact_up_to_the_limit() -> None:
    a = torch.full((1, 131072), 127, dtype=torch.int8)
    assert int(int_matmul(a, a)) == 127**2 * 131072 and int(int_matmul(a, -a)) == -(127**2) * 131072
    y = int8_linear(a[:, :15360], ones(1), -a[:, :15360], ones(1), None, torch.float64)
    assert float(y) == -247_741_440
    too_long = torch.zeros(1, LARGEST_K + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="exact up to"):
        int8_linear(too_long, ones(1), too_long, ones(1))


@pytest.mark.parametrize("shape", ((5, 9, 2100), (48, 33, 1024), (0, 5, 16), (3, 2, 1)))
def test_integer_sums_are_those_of_the_library_also_under_autocast(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    draws = torch.Generator().manual_seed(0)
    a, w = (torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=draws) for rows in (m, n))
    expected = torch._int_mm(a, w.t())
    assert torch.equal(int_matmul(a, w), expected) and int_matmul(a, w).dtype == torch.int32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(int_matmul(a, w), expected)
    least = torch.full((2, k), -128, dtype=torch.int8)
    assert torch.equal(int_matmul(least, least), torch.full((2, 2), k * 2**14, dtype=torch.int32))


@pytest.mark.parametrize("shape", ((33, 50, 112), (1, 7, 3), (0, 5, 16)))
def test_int8_products_against_float64(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, w, bias = codes(m, k), codes(n, k, seed=1), draw(n)
    a_scale, w_scale = draw(m, 1).abs() + 0.1, draw(n, 1, seed=2).abs() + 0.1
    exact = (a.double() * a_scale.double()) @ (w.double() * w_scale.double()).t() + bias.double()
    y = int8_linear(a, a_scale, w, w_scale, bias, torch.float32)
    torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-4)
    assert y.shape == (m, n)


def test_ones_and_unit_rows() -> None:
    one = torch.ones(4, 96, dtype=torch.int8)
    y = int8_linear(one, 2 * ones(4), one, 3 * ones(4), torch.full((4,), 5.0), torch.float32)
    assert (y == 96 * 6 + 5).all()
    w = codes(5, 8)
    picked = int8_linear(torch.eye(8, dtype=torch.int8), ones(8), w, ones(5), None, torch.float32)
    assert torch.equal(picked, w.t().float())


def test_gaussian_products_have_the_error_of_their_codes() -> None:
    """Errors of 0.84 % in both operands give about 1.2 % in the product."""
    x, w = draw(256, 3072), draw(128, 3072, seed=1)
    y = int8_linear(*quantize_rows(x, "int8"), *quantize_rows(w, "int8"), None, torch.float32)
    exact = x @ w.t()
    assert float((y - exact).norm() / exact.norm()) == pytest.approx(0.012, abs=0.0015)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), ((3, (1, 1), (1, 1)), (3, (2, 2), (1, 1)), (5, (2, 1), (0, 2)), (1, (1, 1), (0, 0)))
)
@pytest.mark.parametrize("last", (True, False))
def test_convolutions_against_whole_numbers(size: int, stride: Any, padding: Any, last: bool) -> None:
    """Sums below 2^24 are exact in the library's float convolution too, at borders as inside."""
    x, w, bias = codes(2, 16, 9, 8), codes(7, 16, size, size, seed=1), draw(7).round()
    x_scale, w_scale = torch.tensor([[0.5], [4.0]]), 2.0 ** torch.arange(-3, 4.0)[:, None]
    sums = torch.nn.functional.conv2d(x.double(), w.double(), None, stride, padding)
    exact = sums * (x_scale * w_scale.t())[:, :, None, None].double() + bias.double()[:, None, None]
    y = int8_conv2d(x, x_scale, w, w_scale, bias, stride, padding, torch.float64, last)
    assert torch.equal(y.float(), exact.float()) and y.shape == exact.shape
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    alone = int8_conv2d(x[1:], x_scale[1:], w, w_scale, bias, stride, padding, torch.float64, last)
    assert torch.equal(alone[0], y[1])
    assert int8_conv2d(x[:0], x_scale[:0], w, w_scale, bias, stride, padding).shape == (0, *y.shape[1:])


def test_a_window_of_one_pixel_is_a_product_and_the_centre_alone_too() -> None:
    x, w = codes(2, 32, 5, 6), codes(9, 32, 1, 1, seed=1)
    x_scale, w_scale, bias = draw(2, 1).abs(), draw(9, 1, seed=2).abs(), draw(9, seed=3)
    y = int8_conv2d(x, x_scale, w, w_scale, bias, dtype=torch.float32)
    rows = x.permute(0, 2, 3, 1).reshape(60, 32)
    product = int8_linear(rows, x_scale.repeat_interleave(30, dim=0), w.flatten(1), w_scale, bias, torch.float32)
    assert torch.equal(y.permute(0, 2, 3, 1).reshape(60, 9), product)
    wide = torch.zeros(9, 32, 3, 3, dtype=torch.int8)
    wide[:, :, 1:2, 1:2] = w
    assert torch.equal(int8_conv2d(x, x_scale, wide, w_scale, bias, padding=(1, 1), dtype=torch.float32), y)


def test_pictures_are_rows_with_channels_last() -> None:
    x = draw(4, 5, 3, 4)
    x[1], x[2, 4, 2, 3], x[3, 0, 0, 0] = 0, float("nan"), float("inf")
    q, scale = quantize_pictures(x)
    rows, row_scale = quantize_rows(x.flatten(1), "int8")
    assert torch.equal(q.flatten(1), rows) and torch.equal(scale.nan_to_num(-1), row_scale.nan_to_num(-1))
    assert q.is_contiguous(memory_format=torch.channels_last) and scale[2:].isnan().all() and not q[1:].any()
    y = int8_conv2d(q, scale, codes(3, 5, 3, 3), ones(3), torch.full((3,), 2.0), padding=(1, 1))
    assert y[2:].isnan().all() and y[0].isfinite().all() and (y[1] == 2).all()


def test_weights_alone_keep_the_activations() -> None:
    x, w = draw(3, 64), codes(10, 64)
    scale, bias = draw(10, 1).abs(), draw(10, seed=3)
    torch.testing.assert_close(weight_linear(x, w, scale, bias), x @ (w * scale).t() + bias)
    packed, groups = pack_int4(w.clamp(-7, 7)), draw(10, 4, seed=4).abs()
    dense = dequantize_int4(packed, groups, torch.float32)
    torch.testing.assert_close(weight_linear(x, packed, groups), x @ dense.t())


def test_operations_pass_the_checks_of_torch() -> None:
    a, w, scale = codes(5, 32), codes(7, 32, seed=1), draw(7, 1).abs()
    checks = {
        torch.ops.diffaccel.quantize_rows: (draw(5, 32), "int8"),
        torch.ops.diffaccel.int8_linear: (a, draw(5, 1).abs(), w, scale, draw(7), torch.float32),
        torch.ops.diffaccel.quantize_pictures: (draw(2, 5, 3, 4),),
        torch.ops.diffaccel.int8_conv2d: (
            codes(2, 16, 4, 5),
            draw(2, 1).abs(),
            codes(7, 16, 3, 3),
            scale,
            draw(7),
            [1, 2],
            [1, 0],
            torch.float32,
            True,
        ),
        torch.ops.diffaccel.weight_gemv: (draw(5, 32), w, scale, draw(7)),
        torch.ops.diffaccel.dequantize_int8: (w, scale, torch.bfloat16),
        torch.ops.diffaccel.expand_int4: (pack_int4(w), torch.ones(7, 2, dtype=torch.uint8)),
        torch.ops.diffaccel.dequantize_int4: (pack_int4(w), draw(7, 2).abs(), torch.bfloat16),
    }
    for operation, arguments in checks.items():
        torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


def test_operations_count_their_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        int8_linear(codes(5, 32), ones(5), codes(7, 32), ones(7))
    assert counter.get_total_flops() == 2 * 5 * 32 * 7
    with FlopCounterMode(display=False) as counter:
        pictures, window = codes(2, 16, 4, 5), codes(7, 16, 3, 3)
        torch.ops.diffaccel.int8_conv2d(pictures, ones(2), window, ones(7), None, [1, 1], [1, 1], torch.float32, True)
    assert counter.get_total_flops() == 2 * (2 * 4 * 5) * (9 * 16) * 7


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (lambda: quantize_rows(draw(2, 3, 4), "int8"), "needs a matrix"),
        (lambda: quantize_rows(draw(2, 3), "int4"), "must be 'int8' or 'fp8'"),
        (lambda: quantize_rows(codes(2, 3), "int8"), "needs floating"),
        (lambda: quantize_rows(draw(2, 3), "int8", "fast"), "mode is 'fast'"),
        (lambda: quantize_rows(draw(2, 3), "int8", "fused"), "cannot run fused on cpu"),
        (lambda: int8_linear(codes(2, 3), ones(2), codes(4, 5), ones(4)), r"must be \(M, K\) and \(N, K\)"),
        (lambda: int8_linear(codes(2, 3), ones(3), codes(4, 3), ones(4)), r"scales must be \(2, 1\)"),
        (lambda: int8_linear(draw(2, 3), ones(2), codes(4, 3), ones(4)), "codes must be torch.int8"),
        (lambda: int8_linear(codes(2, 3), ones(2).double(), codes(4, 3), ones(4)), "scales must be float32"),
        (lambda: int8_linear(codes(2, 3), ones(2), codes(4, 3), ones(4), draw(3)), r"bias must be \(4,\)"),
        (lambda: fp8_linear(*[codes(2, 3).to(torch.float8_e4m3fn), ones(2)] * 2, mode="fused"), "multiples of 16"),
        (lambda: quantize_pictures(draw(2, 3)), r"pictures \(B, C, H, W\); got the shape \(2, 3\)"),
        (lambda: quantize_pictures(codes(1, 2, 3, 4)), "needs floating"),
        (lambda: int8_conv2d(codes(1, 2, 4, 4), ones(1), codes(3, 4, 3, 3), ones(3)), r"\(CO, CI, R, S\); got"),
        (lambda: int8_conv2d(codes(1, 2, 4, 4), ones(2), codes(3, 2, 3, 3), ones(3)), r"scales must be \(1, 1\)"),
        (lambda: int8_conv2d(codes(1, 2, 2, 2), ones(1), codes(3, 2, 3, 3), ones(3)), "does not fit into pictures"),
        (lambda: int8_conv2d(draw(1, 2, 4, 4), ones(1), codes(3, 2, 3, 3), ones(3)), "codes must be torch.int8"),
        (lambda: int8_conv2d(codes(1, 2, 4, 4), ones(1), codes(3, 2, 3, 3), ones(3), draw(2)), r"bias must be \(3,\)"),
        (lambda: int8_conv2d(codes(1, 16, 4, 4), ones(1), codes(3, 16, 3, 3), ones(3), mode="fused"), "cannot run"),
        (lambda: int8_conv2d(*[codes(1, LARGEST_K + 1, 1, 1), ones(1)] * 2), "exact up"),
        (lambda: weight_linear(draw(2, 3), codes(4, 5), ones(4)), r"must be \(M, 5\)"),
        (lambda: expand_int4(pack_int4(codes(2, 6)), torch.ones(2, 2, dtype=torch.uint8)), "do not divide"),
    ),
)  # fmt: skip
def test_errors_say_what_is_wrong(call: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        call()
