"""Quantized layers alone: shapes, casts, copies, gradients, compilation, and their way back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant import QConv2d, QLinear
from diffaccel.quant.formats import LayerFormat

W8, FP8, W8A16 = LayerFormat("w8a8"), LayerFormat("w8a8_fp8"), LayerFormat("w8a16")
W4A16, W4A8 = LayerFormat("w4a16", 32), LayerFormat("w4a8", 32)
FORMATS = (W8, FP8, W8A16, W4A16, W4A8)
BOUNDS = {"w8a8": 0.02, "w8a8_fp8": 0.05, "w8a16": 0.01, "w4a16": 0.12, "w4a8": 0.13}


def linear(k: int = 64, n: int = 48, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_close_to_the_layer_that_it_stands_for(form: LayerFormat, dtype: torch.dtype) -> None:
    plain = linear(256, 96, dtype=dtype)
    layer, x = QLinear.of(plain, form), draw(2, 5, 256, dtype=dtype)
    y, exact = layer(x), plain.double()(x.double())
    assert y.dtype == dtype and y.shape == (2, 5, 96)
    assert float((y.double() - exact).norm() / exact.norm()) < BOUNDS[form.name]
    assert isinstance(layer, nn.Linear) and layer.in_features == 256 and layer.out_features == 96
    assert layer(x[0, 0]).shape == (96,) and layer(x[:0]).shape == (0, 5, 96)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_batch_is_its_rows(form: LayerFormat) -> None:
    layer, x = QLinear.of(linear(), form), draw(4, 3, 64)
    y = layer(x)
    if form.activations == "int8":  # exact sums
        assert all(torch.equal(layer(x[i : i + 1]), y[i : i + 1]) for i in range(4))
    torch.testing.assert_close(torch.cat([layer(row) for row in x.split(1)]), y)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_not_a_number_stays_one(form: LayerFormat) -> None:
    layer, x = QLinear.of(linear(), form), draw(3, 64)
    x[1, 5] = float("nan")
    y = layer(x)
    assert y[1].isnan().all()
    torch.testing.assert_close(y[[0, 2]], layer(x[[0, 2]]))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_casts_leave_codes_and_scales(form: LayerFormat) -> None:
    layer = QLinear.of(linear(), form)
    codes, scale, parameter = layer.weight.clone(), layer.weight_scale.clone(), layer.weight
    for cast in (layer.to(torch.bfloat16), layer.half(), layer.double(), nn.Sequential(layer).to(torch.float16)[0]):
        assert torch.equal(cast.weight.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(cast.weight_scale, scale) and cast.weight is parameter
    assert layer.bias.dtype == layer.compute_dtype == layer.dequantize().dtype == torch.float16


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_copies_pickles_and_states(form: LayerFormat) -> None:
    layer, x = QLinear.of(linear(), form), draw(3, 64)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y) and other.weight.data_ptr() != layer.weight.data_ptr()
    empty = QLinear.empty(linear(), form, torch.float32)
    assert {k: (v.shape, v.dtype) for k, v in empty.state_dict().items()} == {
        k: (v.shape, v.dtype) for k, v in layer.state_dict().items()
    }
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), y)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gradients_are_those_of_the_dequantized_weight(form: LayerFormat) -> None:
    layer, x = QLinear.of(linear(), form), draw(3, 64).requires_grad_()
    y = layer(x)
    assert torch.equal(y, layer(x.detach()))
    y.backward(upstream := draw(3, 48, seed=4))
    torch.testing.assert_close(x.grad, upstream @ layer.dequantize())
    assert all(not p.requires_grad for p in (layer.weight, layer.weight_scale))


@pytest.mark.parametrize(
    "form", (W8, W4A8, *(pytest.param(form, marks=pytest.mark.slow) for form in (FP8, W8A16, W4A16))), ids=str
)
def test_compiles_into_one_graph(form: LayerFormat) -> None:
    torch.compiler.reset()
    block = nn.Sequential(QLinear.of(linear(), form), nn.GELU(), QLinear.of(linear(48, 64), LayerFormat("w8a16")))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = draw(2, rows, 64)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_off_the_meta_device(form: LayerFormat) -> None:
    layer = QLinear.of(linear(), form)
    empty = QLinear.empty(linear().to("meta"), form, torch.float32).to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x := draw(3, 64)), layer(x)) and empty.weight_scale.dtype == torch.float32


def test_autocast_gives_its_dtype() -> None:
    for form in FORMATS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = (layer := QLinear.of(linear(), form))(draw(3, 64))
        assert y.dtype == torch.bfloat16 and torch.equal(y, layer(draw(3, 64).bfloat16()))


def test_odd_shapes() -> None:
    for n, k in ((7, 33), (1, 1), (50, 112)):
        plain, x = linear(k, n), draw(5, k)
        for form in (W8, FP8, W8A16):
            y, exact = QLinear.of(plain, form)(x), plain(x)
            assert float((y - exact).norm() / exact.norm()) < 0.06


def test_a_wrong_width_is_named() -> None:
    with pytest.raises(DiffAccelError, match=r"64 features got \(3, 32\)"):
        QLinear.of(linear(), W8)(draw(3, 32))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_back_to_a_plain_layer(form: LayerFormat) -> None:
    layer = QLinear.of(linear(), form)
    plain, x = layer.plain(), draw(3, 64)
    assert type(plain) is nn.Linear and torch.equal(plain.weight, layer.dequantize()) and plain.bias is layer.bias
    if form.activations is None:
        torch.testing.assert_close(plain(x), layer(x))


def test_bytes_of_a_weight() -> None:
    plain = linear(3072, 1024, bias=False, dtype=torch.bfloat16)
    sizes = {form: QLinear.of(plain, form).weight_bytes() / (2 * 3072 * 1024) for form in (W8, FP8, W8A16)}
    assert all(size < 0.502 for size in sizes.values())
    assert QLinear.of(plain, LayerFormat("w4a16", 128)).weight_bytes() / (2 * 3072 * 1024) < 0.267
    assert QLinear.of(plain, LayerFormat("w4a8", 128)).weight_bytes() / (2 * 3072 * 1024) < 0.256


# -- convolutions -----------------------------------------------------------------------------------------------------


def conv(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(options.pop("channels", 12), 8, options.pop("size", 3), **options)


@pytest.mark.parametrize("form", (W8, W8A16), ids=str)
@pytest.mark.parametrize("options", ({}, {"padding": 1}, {"stride": 2, "padding": 1}, {"size": 1}, {"padding": (0, 2)}))
def test_convolutions(form: LayerFormat, options: dict[str, Any]) -> None:
    plain, x = conv(**options), draw(2, 12, 9, 11)
    layer = QConv2d.of(plain, form)
    y, exact = layer(x), plain(x)
    assert y.shape == exact.shape and isinstance(layer, nn.Conv2d)
    assert float((y - exact).norm() / exact.norm()) < 0.025
    assert layer(x[:0]).shape == plain(x[:0]).shape


@pytest.mark.slow
@pytest.mark.parametrize("form", (W8, W8A16), ids=str)
def test_convolutions_compile_into_one_graph(form: LayerFormat) -> None:
    torch.compiler.reset()
    block = nn.Sequential(QConv2d.of(conv(padding=1), form), nn.SiLU(), QConv2d.of(conv(channels=8, stride=2), form))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for rows in (9, 12):
        x = draw(2, 12, rows, 11)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


def test_convolutions_of_codes_are_exact() -> None:
    """With codes as pictures and unit scales, an integer convolution; zeros around are exact."""
    draws = torch.Generator().manual_seed(3)
    plain = conv(padding=1, bias=False)
    plain.weight.data = torch.randint(-127, 128, plain.weight.shape, generator=draws).float()
    plain.weight.data.flatten(1)[:, 0] = 127
    x = torch.randint(-127, 128, (2, 12, 6, 6), generator=draws).float()
    x[:, 0, 0, 0] = 127
    assert torch.equal(QConv2d.of(plain, W8)(x), plain.double()(x.double()).float())


def test_one_pixel_is_a_linear_layer_and_the_centre_alone_too() -> None:
    plain, x = conv(size=1, bias=False), draw(1, 12, 4, 4)
    wide = conv(padding=1, bias=False)
    wide.weight.data.zero_()
    wide.weight.data[:, :, 1:2, 1:2] = plain.weight.data
    assert torch.equal(QConv2d.of(wide, W8)(x), QConv2d.of(plain, W8)(x))


def test_pictures_have_scales_of_their_own() -> None:
    layer, x = QConv2d.of(conv(), W8), draw(2, 12, 8, 8)
    x[1] *= 1000
    y = layer(x)
    assert torch.equal(layer(x[:1]), y[:1])
    x[1, 0, 0, 0] = float("nan")
    assert torch.equal(layer(x)[:1], y[:1]) and layer(x)[1].isnan().all()


def test_forms_of_convolutions_that_codes_cannot_multiply() -> None:
    for options in ({"groups": 4}, {"dilation": 2}, {"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}):
        plain, x = conv(**options), draw(1, 12, 9, 9)
        assert not QConv2d.multiplies_codes(plain)
        y = QConv2d.of(plain, W8A16)(x)
        assert y.shape == plain(x).shape and float((y - plain(x)).norm() / plain(x).norm()) < 0.02
