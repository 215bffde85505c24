"""Layers of mixed precision: codes, calibrated activations, split ranges, and the first text row, by closed forms."""

from __future__ import annotations

import copy
import logging
import pickle
import threading

import pytest
import torch
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant.mixed.activations import grid_of, static_levels, token_rows
from diffaccel.quant.mixed.conv import MixedConv2d
from diffaccel.quant.mixed.first_row import RowKinds, RowMemo
from diffaccel.quant.mixed.form import InputRange, MixedFormat, read_format
from diffaccel.quant.mixed.linear import MixedLinear
from diffaccel.quant.mixed.weights import expanded, largest_code, pack, quantize_mixed, unpack_int2

BITS = (2, 4, 8)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(k: int = 32, n: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias)


def relative(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float((y.double() - exact.double()).norm() / exact.double().norm())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", (32, 30, 33))
def test_packing_is_exact(bits: int, columns: int) -> None:
    n = largest_code(bits)
    codes = torch.randint(-n, n + 1, (5, columns), generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    if bits < 8:
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and packed.shape[1] == -(-columns * bits // 8)
        ones = torch.ones((5, 1), dtype=torch.uint8)
        assert torch.equal(expanded(packed, ones, bits, columns), codes)
    if bits == 2:
        assert torch.equal(unpack_int2(pack(codes, 2))[:, :columns], codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("clip", ("none", "mse"))
def test_weights_on_the_grid_are_exact_and_zero_rows_stay(bits: int, clip: str) -> None:
    n = largest_code(bits)
    codes = torch.randint(-n, n + 1, (6, 32), generator=torch.Generator().manual_seed(1)).float()
    codes[:, 0], codes[3] = n, 0
    weight = codes * torch.tensor([0.5, 1.0, 2.0, 1.0, 0.25, 4.0]).unsqueeze(1)
    plain = nn.Linear(32, 6, bias=False)
    plain.weight.data = weight
    layer = MixedLinear.of(plain, MixedFormat(weight_bits=bits, activation_bits=16), clip=clip)
    assert torch.equal(layer.dequantize(), weight)


def test_ternary_error_of_normal_rows() -> None:
    """By the largest magnitude 2 bits lose most of the row (0.77 of its variance); the least error is far lower."""
    weight = draw(64, 4096)
    errors = {}
    for clip in ("none", "mse"):
        tensors = quantize_mixed(weight, MixedFormat(weight_bits=2), clip)
        codes = expanded(tensors["weight"], tensors["weight_multiplier"], 2, 4096)
        errors[clip] = float((codes * tensors["weight_scale"] - weight).square().mean())
    assert 0.6 < errors["none"] < 0.95 and errors["mse"] < 0.25  # 0.19 is the optimum of a ternary grid


@pytest.mark.parametrize("bits", (2, 4))
def test_groups_are_exact_int8_codes_and_lower_the_error(bits: int) -> None:
    plain = linear(128, 16)
    plain.weight.data[:, :32] *= 20
    whole = MixedLinear.of(plain, MixedFormat(weight_bits=bits, activation_bits=16))
    groups = MixedLinear.of(plain, MixedFormat(weight_bits=bits, activation_bits=16, group=32))
    assert groups.int8_matrix().dtype == torch.int8 and int(groups.int8_matrix().abs().max()) <= 127
    assert relative(groups.dequantize(), plain.weight) < relative(whole.dequantize(), plain.weight)


def test_a_weight_without_numbers_is_refused() -> None:
    plain = linear()
    plain.weight.data[0, 0] = float("inf")
    with pytest.raises(DiffAccelError, match="infinities"):
        MixedLinear.of(plain, MixedFormat())


# -- activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", (4, 8))
def test_calibrated_values_on_the_grid_are_exact(bits: int) -> None:
    scale, zero = grid_of((-1.0,), (2.0,), bits)
    levels = torch.arange(2**bits) - zero
    x = levels * scale
    assert torch.equal(static_levels(x, scale, zero, bits), levels.float())
    assert torch.equal(static_levels(x.new_tensor([1e9, -1e9]), scale, zero, bits), levels[[-1, 0]].float())


def test_constant_and_empty_ranges() -> None:
    scale, zero = grid_of((3.0,), (3.0,), 8)  # from zero, which the range always holds
    assert int(zero) == 0 and float(scale) == pytest.approx(3 / 255)
    x = torch.full((4,), 3.0)
    torch.testing.assert_close(static_levels(x, scale, zero, 8) * scale, x)
    scale, zero = grid_of((0.0,), (0.0,), 8)
    assert torch.equal(static_levels(torch.zeros(3), scale, zero, 8) * scale, torch.zeros(3)) and float(scale) > 0


@pytest.mark.parametrize("bits", (4, 8))
def test_tokens_keep_their_scale(bits: int) -> None:
    x = draw(5, 16)
    codes, scale = token_rows(x, bits)
    more, larger = token_rows(8 * x, bits)
    assert torch.equal(codes, more)
    torch.testing.assert_close(larger, 8 * scale)
    assert int(codes.abs().max()) == 2 ** (bits - 1) - 1


RANGE = InputRange((-4.0,), (4.0,))
FORMS = [
    MixedFormat(weight_bits=w, activation_bits=a, scale=scale)
    for w in (4, 8) for a, scale in ((8, "token"), (8, "tensor"), (4, "tensor"), (16, "token"))
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_products_are_those_of_the_rounded_operands(form: MixedFormat) -> None:
    plain, x = linear(), draw(2, 7, 32)
    layer = MixedLinear.of(plain, form, RANGE)
    rows = x.reshape(-1, 32)
    if form.activation_bits == 16:
        rounded = rows
    elif form.is_static:
        rounded = static_levels(rows, layer.input_scale, layer.input_zero, form.activation_bits) * layer.input_scale
    else:
        codes, scale = token_rows(rows, form.activation_bits)
        rounded = codes * scale
    exact = rounded.double() @ layer.dequantize().double().t() + plain.bias.double()
    torch.testing.assert_close(layer(x).reshape(-1, 24).double(), exact, rtol=1e-4, atol=1e-5)
    assert layer(x[:0]).shape == (0, 7, 24)
    if form.activation_bits == 8:  # exact sums
        assert torch.equal(torch.cat([layer(part) for part in x.split(1)]), layer(x))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_no_number_stays_none(form: MixedFormat) -> None:
    layer, x = MixedLinear.of(linear(), form, RANGE), draw(3, 32)
    x[1, 5] = float("nan")
    y = layer(x)
    assert bool(y[1].isnan().all()) and bool(torch.isfinite(y[[0, 2]]).all())


@pytest.mark.parametrize("form", [*FORMS, MixedFormat(weight_bits=2, activation_bits=8)], ids=str)
def test_casts_copies_pickles_and_names(form: MixedFormat) -> None:
    layer, x = MixedLinear.of(linear(), form, RANGE), draw(3, 32)
    assert read_format(str(form)) == form
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
    empty = MixedLinear.empty(linear(), form, torch.float32)
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
    }
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), y)
    before = {k: v.clone() for k, v in layer.state_dict().items() if k != "bias"}
    half = layer.to(torch.bfloat16)
    assert all(torch.equal(half.state_dict()[k], v) for k, v in before.items())
    assert half(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", ("token", "tensor"))
@pytest.mark.parametrize("split", (0, 3))
def test_convolutions(bits: int, scale: str, split: int) -> None:
    torch.manual_seed(0)
    plain, x = nn.Conv2d(8, 6, 3, padding=1, stride=2), draw(2, 8, 9, 9)
    known = InputRange((-4.0,) * (1 + (split > 0)), (4.0,) * (1 + (split > 0)))
    form = MixedFormat(weight_bits=bits, activation_bits=8, scale=scale, split=split)
    layer = MixedConv2d.of(plain, form, known)
    assert layer(x).shape == plain(x).shape
    assert relative(layer(x), layer.plain()(x)) < 0.03
    assert relative(layer(x), plain(x)) < {2: 0.9, 4: 0.2, 8: 0.03}[bits]


def test_split_ranges_keep_the_small_part() -> None:
    """A skip connection that is far larger than what it is joined to takes all levels of one shared range."""
    torch.manual_seed(0)
    plain, x = nn.Conv2d(8, 6, 1), draw(1, 8, 8, 8)
    x[:, 4:] *= 1000
    plain.weight.data[:, 4:] /= 1000
    one = InputRange((float(x.min()),), (float(x.max()),))
    parts = [x[:, :4], x[:, 4:]]
    two = InputRange(tuple(float(p.min()) for p in parts), tuple(float(p.max()) for p in parts))
    shared = MixedConv2d.of(plain, MixedFormat(scale="tensor"), one)
    split = MixedConv2d.of(plain, MixedFormat(scale="tensor", split=4), two)
    assert relative(split(x), plain(x)) < 0.03 < 0.3 < relative(shared(x), plain(x))


def test_what_is_missing_is_said() -> None:
    with pytest.raises(DiffAccelError, match="needs 1 calibrated ranges"):
        MixedLinear.of(linear(), MixedFormat(scale="tensor"))
    with pytest.raises(DiffAccelError, match="constant first row"):
        MixedLinear.of(linear(), MixedFormat(first_row=True), RANGE)
    for text in ("mixed", "mixed:w3a8", "mixed:w4a8:tensor:what"):
        with pytest.raises(DiffAccelError, match="no format"):
            read_format(text)


# -- the first text row -----------------------------------------------------------------------------------------------

ROW = draw(32, seed=9) * 1e3
TEXT = InputRange((-4.0,), (4.0,), ROW)
STATIC = MixedFormat(scale="tensor", first_row=True)


def states(*kinds: str) -> torch.Tensor:
    """Text states of 6 tokens; of each batch row, what its first token is."""
    h = draw(len(kinds), 6, 32, seed=3)
    for i, kind in enumerate(kinds):
        h[i, 0] = {"bos": ROW, "zero": torch.zeros(32), "other": 700 * draw(32, seed=4)}[kind]
        if kind == "zero":
            h[i] = 0
    return h


@pytest.mark.parametrize("bias", (True, False))
def test_each_row_of_a_mixed_batch_matches_its_own_reference(bias: bool) -> None:
    plain, h = linear(bias=bias), states("bos", "zero", "other", "bos")
    layer = MixedLinear.of(plain, STATIC, TEXT)
    y, exact = layer(h), plain(h)
    torch.testing.assert_close(y[[0, 3], 0], exact[[0, 3], 0], rtol=1e-5, atol=1e-3)  # stored, in float64
    assert torch.equal(y[1], (plain.bias if bias else torch.zeros(24)).expand(6, 24))
    assert relative(y[2, 0], exact[2, 0]) < 0.02  # by its own scale
    assert relative(y[:, 1:], exact[:, 1:]) < 0.02


def test_one_scale_for_all_tokens_loses_them() -> None:
    """Without the first row the error of the others is that of a batch that has none; with it, 30 times as large."""
    plain, h = linear(bias=False), states("bos", "bos")
    aware = MixedLinear.of(plain, STATIC, TEXT)
    alone = MixedLinear.of(plain, MixedFormat(scale="tensor"), RANGE)
    whole = MixedLinear.of(plain, MixedFormat(scale="tensor"), InputRange((float(h.min()),), (float(h.max()),)))
    exact = plain(h)
    assert torch.equal(aware(h)[:, 1:], alone(h[:, 1:]))
    assert relative(whole(h)[:, 1:], exact[:, 1:]) > 30 * relative(aware(h)[:, 1:], exact[:, 1:])


def test_long_prompts_repeat_the_row() -> None:
    plain = linear()
    h = torch.cat([states("bos"), states("bos")], dim=1)
    y = MixedLinear.of(plain, STATIC, TEXT)(h)
    torch.testing.assert_close(y[:, [0, 6]], plain(h)[:, [0, 6]], rtol=1e-5, atol=1e-3)


def test_another_row_is_told_of_once(caplog) -> None:
    layer = MixedLinear.of(linear(), STATIC, TEXT)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            layer(states("other"))
            layer(states("bos"))
    assert [r for r in caplog.records if "first text token" in r.message] == caplog.records[:1] != []


def test_states_changed_in_place_are_looked_at_again() -> None:
    plain, h = linear(), states("bos", "bos")
    layer = MixedLinear.of(plain, STATIC, TEXT)
    layer(h)
    h[1].zero_()
    assert torch.equal(layer(h)[1], plain.bias.expand(6, 24))
    with torch.inference_mode():
        g = states("zero", "bos")
        assert torch.equal(layer(g)[0], plain.bias.expand(6, 24))


def test_threads_that_call_one_layer_have_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, mine, others = MixedLinear.of(linear(), STATIC, TEXT), states("bos", "zero"), states("zero", "bos")
    expected, tell = layer(mine), RowMemo._tell

    def interrupted(memo: RowMemo, kinds: RowKinds) -> None:  # another thread's call, in the midst of this one
        monkeypatch.setattr(RowMemo, "_tell", tell)
        thread = threading.Thread(target=layer, args=(others,))
        thread.start()
        thread.join()

    layer(others)
    monkeypatch.setattr(RowMemo, "_tell", interrupted)
    assert torch.equal(layer(mine), expected)


def test_the_first_row_compiles_and_trains() -> None:
    torch.compiler.reset()
    layer, h = MixedLinear.of(linear(), STATIC, TEXT), states("bos", "zero", "other")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(h), layer(h))
    h.requires_grad_()
    layer(h)[:, 1:].sum().backward()
    torch.testing.assert_close(h.grad[0, 1], layer.dequantize().sum(0))
