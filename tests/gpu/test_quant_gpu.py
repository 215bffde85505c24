"""Kernels of quantized layers on a GPU: fresh random inputs at each run against float64, and layers in real use."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import tiny_more
import torch
from torch import nn

import diffaccel
from diffaccel.errors import DiffAccelError
from diffaccel.kernels.dispatch import capability
from diffaccel.kernels.fp8_linear import fp8_linear, fp8_linear_reference
from diffaccel.kernels.int4_weight import (
    dequantize_int4,
    dequantize_int4_reference,
    expand_int4,
    expand_int4_reference,
    pack_int4,
)
from diffaccel.kernels.int8_conv import int8_conv2d
from diffaccel.kernels.int8_linear import int8_linear, int8_linear_reference
from diffaccel.kernels.quantize_pictures import quantize_pictures, quantize_pictures_reference
from diffaccel.kernels.quantize_rows import quantize_rows, quantize_rows_reference
from diffaccel.kernels.weight_linear import weight_linear, weight_linear_reference
from diffaccel.quant import W4A8, W4A16, W8A8, QConv2d, QLinear
from diffaccel.quant.formats import LayerFormat

pytestmark = pytest.mark.gpu
FORMS = [LayerFormat(n) for n in ("w8a8", "w8a8_fp8", "w8a16")] + [LayerFormat(n, 64) for n in ("w4a16", "w4a8")]
METHODS = {"w8a8": W8A8(), "w8a8-fp8": W8A8(dtype="fp8"), "w4a16": W4A16(), "w4a8": W4A8()}
METHODS["w8a8-convs"] = W8A8(convs="int8")


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed by the system: new numbers at every run; a failure shows the seed."""
    value = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(value)
    print(f"seed {value}")
    yield value


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)


def scales(n: int) -> torch.Tensor:
    return torch.rand(n, 1, device="cuda", dtype=torch.float32) * 0.01 + 1e-4


def has(least: tuple[int, int]) -> bool:
    return torch.cuda.is_available() and capability(torch.device("cuda")) >= least


def poison(megabytes: int = 64) -> None:
    """Leave not-a-numbers in the memory that the next outputs get."""
    torch.full((megabytes * 2**18,), float("nan"), device="cuda", dtype=torch.float32)


@pytest.mark.parametrize("kind", ("int8", "fp8"))
@pytest.mark.parametrize("shape", ((1, 1), (7, 300), (513, 3072), (33, 15360), (3, 20000), (2, 131072), (0, 64)))
def test_rows_against_the_formula(kind: Any, shape: tuple[int, int]) -> None:
    if kind == "fp8" and not has((8, 9)):
        pytest.skip("float8 needs capability 8.9")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = normal(*shape, dtype=dtype)
        if shape[0] > 6 and shape[1] > 2:
            x[1], x[2, 1], x[3, -1], x[4, 0] = 0, float("nan"), float("inf"), -float("inf")
        poison()
        (q, scale), (q_exact, scale_exact) = quantize_rows(x, kind, "fused"), quantize_rows_reference(x, kind)
        assert torch.equal(scale.nan_to_num(-1), scale_exact.nan_to_num(-1))
        assert torch.equal(q.view(torch.uint8), q_exact.view(torch.uint8))
        assert torch.equal(quantize_rows(x, kind, "fused")[0].view(torch.uint8), q.view(torch.uint8))


SHAPES = (
    (4608, 3072, 3072), (4608, 3072, 12288), (512, 12288, 3072), (154, 2048, 1280), (1, 3072, 3072), (33, 112, 50),
    (17, 33, 7), (300, 48, 1000), (2048, 640, 640), (5, 131072, 16), (0, 64, 64),
)  # fmt: skip


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_int8_products_are_exact(m: int, k: int, n: int) -> None:
    a, w, a_scale, w_scale = codes(m, k), codes(n, k), scales(m), scales(n)
    if m > 2:
        a_scale[1] = float("nan")
    for bias in (None, normal(n)):
        poison()
        y = int8_linear(a, a_scale, w, w_scale, bias, torch.float32, "fused")
        exact = (a.double() @ w.double().t()) * a_scale.double() * w_scale.double().t()
        exact = exact if bias is None else exact + bias.double()
        torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-4, equal_nan=True)
        half = int8_linear(a, a_scale, w, w_scale, bias, torch.bfloat16, "fused")
        torch.testing.assert_close(half, y.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
        again = int8_linear(a, a_scale, w, w_scale, bias, torch.bfloat16, "fused")
        assert torch.equal(again.nan_to_num(7), half.nan_to_num(7))


def test_every_tile_of_the_int8_kernel() -> None:
    from diffaccel.kernels.triton_int8 import TILES, launch_int8_linear

    if not has((9, 0)):
        pytest.skip("descriptors need capability 9.0")
    for m, k, n in ((300, 320, 200), (64, 1024, 512)):
        a, w, a_scale, w_scale, bias = codes(m, k), codes(n, k), scales(m), scales(n), normal(n)
        exact = int8_linear_reference(a, a_scale, w, w_scale, bias, torch.float32)
        for tile, _ in TILES:
            poison()
            y = launch_int8_linear(a, a_scale, w, w_scale, bias, torch.bfloat16, tile, True)
            torch.testing.assert_close(y.float(), exact, rtol=4e-3, atol=1e-4)


def test_the_largest_sums() -> None:
    one = torch.ones(1, 1, device="cuda")
    a = torch.full((1, 131072), 127, device="cuda", dtype=torch.int8)
    assert float(int8_linear(a, one, a, one, None, torch.float32, "fused")) == float(127**2 * 131072)


@pytest.mark.parametrize("shape", ((2, 320, 128, 128), (3, 70, 9, 3), (2, 16, 1, 1), (7, 3, 5, 40), (0, 16, 4, 4)))
def test_pictures_against_the_formula(shape: tuple[int, ...]) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = normal(*shape, dtype=dtype)
        if shape[0] > 6:
            x[1], x[2, 1, 1, 1], x[3, 2, 4, 39], x[4, 0, 0, 0] = 0, float("nan"), float("inf"), -float("inf")
        for block in (x, x.contiguous(memory_format=torch.channels_last), x[:, :, :, ::2]):
            poison()
            (q, scale), (q_exact, scale_exact) = quantize_pictures(block, "fused"), quantize_pictures_reference(block)
            assert torch.equal(scale.nan_to_num(-1), scale_exact.nan_to_num(-1))
            assert torch.equal(q, q_exact) and q.is_contiguous(memory_format=torch.channels_last)


# pictures, window, stride, padding: SDXL's, odd sizes, every kind of box, few and many channels
CONVOLUTIONS = (
    ((2, 320, 128, 128), (320, 3, 3), (1, 1), (1, 1)), ((2, 640, 64, 64), (640, 3, 3), (1, 1), (1, 1)),
    ((2, 1280, 32, 32), (1280, 3, 3), (1, 1), (1, 1)), ((1, 960, 24, 40), (320, 3, 3), (1, 1), (1, 1)),
    ((2, 320, 64, 64), (320, 3, 3), (2, 2), (1, 1)), ((3, 48, 17, 19), (50, 3, 3), (1, 1), (1, 1)),
    ((3, 48, 17, 19), (50, 3, 3), (2, 1), (0, 2)), ((5, 16, 2, 3), (7, 3, 3), (1, 1), (1, 1)),
    ((2, 64, 9, 9), (33, 1, 1), (1, 1), (0, 0)), ((2, 64, 9, 9), (33, 5, 2), (1, 1), (2, 1)),
    ((1, 20, 9, 9), (8, 3, 3), (1, 1), (1, 1)), ((0, 64, 8, 8), (16, 3, 3), (1, 1), (1, 1)),
    ((1, 14560, 3, 3), (16, 3, 3), (1, 1), (1, 1)),
)  # fmt: skip


def picture_codes(*shape: int) -> torch.Tensor:
    return codes(*shape).contiguous(memory_format=torch.channels_last)


def exact_convolution(x: torch.Tensor, w: torch.Tensor, stride: Any, padding: Any) -> torch.Tensor:
    """The sums of products in float64, on the device, by taps; no library's convolution."""
    rows, columns = w.shape[2:]
    x = nn.functional.pad(x.double(), (padding[1], padding[1], padding[0], padding[0]))
    height, width = (x.shape[2] - rows) // stride[0] + 1, (x.shape[3] - columns) // stride[1] + 1
    total = x.new_zeros(x.shape[0], w.shape[0], height, width)
    for r in range(rows):
        for s in range(columns):
            part = x[:, :, r :: stride[0], s :: stride[1]][:, :, :height, :width]
            total += torch.einsum("bihw,oi->bohw", part, w[:, :, r, s].double())
    return total


@pytest.mark.parametrize(("pictures", "window", "stride", "padding"), CONVOLUTIONS, ids=str)
def test_int8_convolutions_are_exact(pictures: Any, window: Any, stride: Any, padding: Any) -> None:
    x, w = picture_codes(*pictures), picture_codes(window[0], pictures[1], *window[1:])
    x_scale, w_scale = scales(len(x)), scales(len(w))
    sums = exact_convolution(x, w, stride, padding)
    if len(x) > 2:
        x_scale[1] = float("nan")
    exact = sums * (x_scale.double() * w_scale.double().t())[:, :, None, None]
    for bias in (None, normal(len(w))):
        expected = exact if bias is None else exact + bias.double()[:, None, None]
        for last in (True, False):
            poison()
            y = int8_conv2d(x, x_scale, w, w_scale, bias, stride, padding, torch.float32, last)
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-4, equal_nan=True)
            half = int8_conv2d(x, x_scale, w, w_scale, bias, stride, padding, torch.bfloat16, last)
            torch.testing.assert_close(half, y.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
        for i in range(len(x)):
            alone = int8_conv2d(x[i : i + 1], x_scale[i : i + 1], w, w_scale, bias, stride, padding)
            assert torch.equal(alone[0].nan_to_num(7), half[i].nan_to_num(7))


def test_every_tile_of_the_convolution() -> None:
    from diffaccel.kernels.triton_conv import POINTER_TILE, SMALL_POINTER_TILE, TILES, ConvSizes, launch_int8_conv

    tiles = [POINTER_TILE, SMALL_POINTER_TILE]
    if has((9, 0)):
        tiles += [replace(tile, k=k, programs=p) for tile, _ in TILES for k in (64, 128) for p in (1, 2)]
    for shape, out_channels in (((3, 80, 20, 24), 200), ((2, 128, 7, 9), 144)):
        x, w, bias = picture_codes(*shape), picture_codes(out_channels, shape[1], 3, 3), normal(out_channels)
        x_scale, w_scale = scales(len(x)), scales(out_channels)
        exact = exact_convolution(x, w, (1, 1), (1, 1)) * (x_scale.double() * w_scale.double().t())[:, :, None, None]
        exact = (exact + bias.double()[:, None, None]).float()
        sizes = ConvSizes(*shape[:1], *shape[2:], *shape[2:], shape[1], out_channels, 3, 3, (1, 1), (1, 1))
        for tile in tiles:
            for last in (True, False):
                y = torch.full_like(exact, float("nan"), dtype=torch.bfloat16)
                y = y.contiguous(memory_format=torch.channels_last) if last else y.contiguous()
                launch_int8_conv(x, x_scale, w, (w_scale, bias), y, sizes, last, tile)
                torch.testing.assert_close(y.float(), exact, rtol=4e-3, atol=1e-4, msg=lambda m, t=tile: f"{t}: {m}")


def test_the_largest_sums_of_a_convolution() -> None:
    x = torch.full((1, 14560, 3, 3), 127, device="cuda", dtype=torch.int8).contiguous(memory_format=torch.channels_last)
    w, one = x.expand(16, -1, -1, -1).contiguous(memory_format=torch.channels_last), torch.ones(16, 1, device="cuda")
    y = int8_conv2d(x, one[:1], w, one, None, dtype=torch.float32)
    assert y.shape == (1, 16, 1, 1) and bool((y == float(127**2 * 131040)).all())


@pytest.mark.parametrize("fast", (True, False))
def test_fp8_products(fast: bool) -> None:
    if not has((8, 9)):
        pytest.skip("float8 needs capability 8.9")
    for m, k, n in ((4608, 3072, 3072), (33, 48, 64), (1, 3072, 3072), (0, 64, 64)):
        a, w = quantize_rows(normal(m, k), "fp8"), quantize_rows(normal(n, k), "fp8")
        for bias in (None, normal(n), normal(n, dtype=torch.float32)):
            y = fp8_linear(*a, *w, bias, torch.bfloat16, "fused" if m else "auto", fast)
            exact = fp8_linear_reference(*a, *w, bias, torch.float32)
            assert y.shape == exact.shape
            if m:
                assert float((y.float() - exact).norm() / exact.norm()) < 5e-3
    y = fp8_linear(*quantize_rows(normal(5, 33), "fp8"), *quantize_rows(normal(7, 33), "fp8"))
    assert y.shape == (5, 7)  # not aligned: the formula


@pytest.mark.parametrize(("n", "k", "groups"), ((5, 64, 1), (33, 256, 8), (3072, 3072, 24), (70, 600, 6)))
def test_four_bits_expand_exactly(n: int, k: int, groups: int) -> None:
    packed = pack_int4(torch.randint(-7, 8, (n, k), device="cuda", dtype=torch.int8))
    multipliers = torch.randint(1, 19, (n, groups), device="cuda", dtype=torch.uint8)
    poison()
    assert torch.equal(expand_int4(packed, multipliers, "fused"), expand_int4_reference(packed, multipliers))
    floats = torch.rand(n, groups, device="cuda") + 0.1
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        poison()
        assert torch.equal(
            dequantize_int4(packed, floats, dtype, "fused"), dequantize_int4_reference(packed, floats, dtype)
        )


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("m", (1, 2, 16, 17, 200))
def test_weights_alone(m: int, dtype: torch.dtype) -> None:
    for n, k in ((18432, 3072), (33, 128), (70, 320)):
        x, w, bias = normal(m, k, dtype=dtype), codes(n, k), normal(n, dtype=dtype)
        packed, groups = pack_int4(w.clamp(-7, 7)), torch.rand(n, k // 32, device="cuda") + 0.01
        for codes_, scale in ((w, scales(n)), (packed, groups)):
            poison()
            y = weight_linear(x, codes_, scale, bias, "fused")
            exact = weight_linear_reference(x.double(), codes_, scale, bias)
            assert float((y.double() - exact).norm() / exact.norm()) < 1e-2


# -- layers -----------------------------------------------------------------------------------------------------------


def layer(form: LayerFormat, k: int = 256, n: int = 192) -> tuple[QLinear, nn.Linear]:
    plain = nn.Linear(k, n, device="cuda", dtype=torch.bfloat16)
    return QLinear.of(plain, form), plain


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_is_its_reference(form: LayerFormat) -> None:
    quantized, _ = layer(form)
    for rows in (1, 5, 300):
        x = normal(2, rows, 256)
        y = quantized(x)
        quantized.mode = "reference"
        exact = quantized(x)
        quantized.mode = "auto"
        assert float((y.float() - exact.float()).norm() / exact.float().norm()) < 6e-3


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_waits_for_nothing_and_can_be_captured(form: LayerFormat) -> None:
    quantized, _ = layer(form)
    x = normal(64, 256)
    with torch.no_grad():
        expected = quantized(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            quantized(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = quantized(x)
        for _ in range(2):
            x.copy_(other := normal(64, 256))
            graph.replay()
            assert torch.equal(y, quantized(other)) and not torch.equal(y, expected)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_compiles_into_one_graph(form: LayerFormat) -> None:
    torch.compiler.reset()
    quantized, _ = layer(form)
    block = nn.Sequential(nn.LayerNorm(256, device="cuda", dtype=torch.bfloat16), quantized, nn.GELU())
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 130, 300):
            x = normal(rows, 256)
            y, exact = compiled(x).float(), block(x).float()
            assert float((y - exact).norm() / exact.norm()) < 2e-2


@pytest.mark.parametrize("form", FORMS[:1] + FORMS[2:3], ids=str)
def test_a_convolution_is_its_reference(form: LayerFormat) -> None:
    plain = nn.Conv2d(64, 48, 3, padding=1, stride=2, device="cuda", dtype=torch.bfloat16)
    x = normal(2, 64, 17, 19)
    y, exact = QConv2d.of(plain, form)(x).float(), plain(x).float()
    assert y.shape == exact.shape and float((y - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize("last", (True, False))
def test_a_convolution_waits_for_nothing_and_can_be_captured(last: bool) -> None:
    plain = nn.Conv2d(64, 48, 3, padding=1, device="cuda", dtype=torch.bfloat16)
    quantized, place = QConv2d.of(plain, FORMS[0]), torch.channels_last if last else torch.contiguous_format
    x = normal(2, 64, 16, 24).contiguous(memory_format=place)
    with torch.no_grad():
        expected = quantized(x)
        assert expected.is_contiguous(memory_format=place)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            quantized(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = quantized(x)
        for _ in range(2):
            x.copy_(other := normal(2, 64, 16, 24))
            graph.replay()
            exact = quantized(other.contiguous(memory_format=place))
            assert torch.equal(y, exact) and not torch.equal(y, expected)


def test_convolutions_compile_into_one_graph() -> None:
    """Compiled norms round once, eager ones at every step, so that codes differ: each is as far from exact numbers."""
    torch.compiler.reset()
    first, second = (nn.Conv2d(64, 64, 3, padding=1, stride=s, device="cuda", dtype=torch.bfloat16) for s in (1, 2))
    norm = nn.GroupNorm(8, 64, device="cuda", dtype=torch.bfloat16)
    block = nn.Sequential(norm, nn.SiLU(), QConv2d.of(first, FORMS[0]), nn.SiLU(), QConv2d.of(second, FORMS[0]))
    exact = nn.Sequential(*(copy.deepcopy(layer).double() for layer in (norm, nn.SiLU(), first, nn.SiLU(), second)))
    compiled = torch.compile(block, fullgraph=True)
    with torch.no_grad():
        for side in (16, 20, 24):
            for place in (torch.contiguous_format, torch.channels_last):
                x = normal(2, 64, side, 16).contiguous(memory_format=place)
                y = exact(x.double())
                off, eager = (float((way(x).double() - y).norm() / y.norm()) for way in (compiled, block))
                assert off < 1.2 * eager < 5e-2


# -- pipelines --------------------------------------------------------------------------------------------------------


def draw(pipe: Any, family: str) -> torch.Tensor:
    kwargs = (tiny if family in tiny.FAMILIES else tiny_more).call_kwargs(family)
    return tiny_more.result(pipe(**kwargs)).clone()


def make(family: str) -> Any:
    return (tiny if family in tiny.FAMILIES else tiny_more).make(family)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ("flux", "sd", "wan"))
def test_a_pipeline_and_its_removal(family: str, name: str) -> None:
    pipe = make(family).to("cuda")
    stock = draw(pipe, family)
    diffaccel.accelerate(pipe, METHODS[name])
    close = draw(pipe, family)
    assert not torch.equal(close, stock) and float((close - stock).norm() / stock.norm()) < 0.3
    assert torch.equal(draw(pipe, family), close)
    diffaccel.remove(pipe)
    assert all(p.is_cuda for p in getattr(pipe, "transformer", None or pipe.components.get("unet")).parameters())
    assert torch.equal(draw(pipe, family), stock)


@pytest.mark.parametrize("name", METHODS)
def test_offloading_after_quantizing(name: str) -> None:
    expected = draw(diffaccel.accelerate(make("flux").to("cuda"), METHODS[name]), "flux")
    devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
    for enable in (
        lambda pipe: pipe.enable_model_cpu_offload(),
        lambda pipe: pipe.enable_group_offload(**devices, offload_type="leaf_level"),
        lambda pipe: pipe.enable_group_offload(**devices, offload_type="leaf_level", use_stream=True),
        lambda pipe: pipe.enable_sequential_cpu_offload(),
    ):
        pipe = diffaccel.accelerate(make("flux"), METHODS[name])
        enable(pipe)
        torch.testing.assert_close(draw(pipe, "flux"), expected, rtol=2e-2, atol=2e-2)


def test_model_offloading_before_quantizing_and_layers_after() -> None:
    pipe = make("flux")
    pipe.enable_model_cpu_offload()
    stock = draw(pipe, "flux")
    diffaccel.accelerate(pipe, W8A8())
    assert float((draw(pipe, "flux") - stock).norm() / stock.norm()) < 0.3
    assert torch.equal(draw(diffaccel.remove(pipe), "flux"), stock)
    pipe = make("flux")
    pipe.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with pytest.raises(DiffAccelError, match="Quantize first"):
        diffaccel.accelerate(pipe, W8A8())


def test_memory_of_the_weights() -> None:
    network = make("flux").transformer
    wide = type(network).from_config({**network.config, "num_attention_heads": 16, "attention_head_dim": 64,
                                      "axes_dims_rope": (16, 24, 24)})  # fmt: skip
    wide.to("cuda", torch.bfloat16)
    pipe = make("flux").to("cuda", torch.bfloat16)
    pipe.transformer = wide
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    plain = sum(p.numel() * p.element_size() for p in wide.parameters())
    diffaccel.accelerate(pipe, W8A8())
    saved = before - torch.cuda.memory_allocated()
    assert saved > 0.4 * plain
