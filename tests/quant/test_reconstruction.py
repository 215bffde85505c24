"""Learned rounding of whole blocks: the best codes by brute force, what is kept, and errors beside round-to-nearest."""

from __future__ import annotations

import itertools

import matrix
import pytest
import torch
from torch import nn

from diffaccel.errors import DiffAccelError
from diffaccel.quant import W4A8, W4A16, W8A8, QLinear
from diffaccel.quant.formats import LayerFormat
from diffaccel.quant.learned_rounding import SoftRounding
from diffaccel.quant.reconstruction.blocks import block_names, learn_rounding, reconstruct
from diffaccel.quant.reconstruction.calls import recording
from diffaccel.quant.reconstruction.layer import LEARNED, LearnedLinear, grid_of


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_best_rounding_of_a_tiny_layer_is_found() -> None:
    """Of all 2^8 ways to round a row up or down, that of the least error of the outputs, with correlated inputs."""
    for seed, rounds_best_at_once in ((3, False), (5, True)):
        linear = nn.Linear(8, 1, bias=False)
        linear.weight.data = drawn(1, 8, seed=seed)
        x = drawn(64, 8, seed=200 + seed) @ drawn(8, 8, seed=100 + seed)
        layer = LearnedLinear(QLinear.of(linear, LayerFormat("w4a16", 8)), linear.weight)
        rounding, target = layer.rounding, linear(x).detach()
        errors = []
        for shares in itertools.product((0.0, 1.0), repeat=8):
            codes = (rounding.floor + torch.tensor([shares])).clamp(-7, 7)
            errors.append(float((x @ (codes * rounding.scale).T - target).square().sum()))
        at_start = float((x @ rounding.hard().T - target).square().sum())
        assert (at_start <= min(errors) * 1.001) == rounds_best_at_once
        learn_rounding(layer, [layer], [((x,), {})], [[target]], 100)
        learned = float((x @ rounding.hard().T - target).square().sum())
        assert learned == pytest.approx(min(errors), rel=1e-3)
        torch.testing.assert_close(layer.finished().dequantize(), rounding.hard(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", LEARNED)
def test_a_layer_begins_at_its_weight_and_ends_as_the_codes_that_it_stores(name: str) -> None:
    linear = nn.Linear(32, 6)
    linear.weight.data = drawn(6, 32)
    quantized = QLinear.of(linear, LayerFormat(name, 16 if name.startswith("w4") else 0))
    nearest = quantized.dequantize().clone()
    layer = LearnedLinear(quantized, linear.weight)
    inside = (linear.weight / grid_of(quantized)).abs() <= layer.rounding.n
    torch.testing.assert_close(layer.rounding.soft()[inside], linear.weight[inside], rtol=0, atol=1e-3)
    x = drawn(5, 32, seed=1)
    assert torch.equal(layer.finished().dequantize(), nearest)  # nothing learned: rounded to the nearest
    layer.rounding.variable = torch.where(drawn(6, 32, seed=2) > 0, 10.0, -10.0)
    layer.is_hard = True
    torch.testing.assert_close(layer.finished()(x), layer(x), rtol=1e-5, atol=1e-5)
    assert not torch.equal(quantized.dequantize(), nearest)


def test_soft_rounding_takes_a_scale_for_each_group() -> None:
    weight, scale = drawn(4, 8), torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) + 0.2
    codes = SoftRounding(weight, 4, scale).codes()
    assert codes.dtype == torch.int8 and torch.equal(codes.float(), (weight / scale).round().clamp(-7, 7))


@pytest.mark.slow
def test_blocks_of_a_pipeline_come_nearer_and_removal_is_exact() -> None:
    case = matrix.Case("flux", W4A8())
    pipe = case.make()
    expected = case.call(pipe)
    with recording(pipe.transformer, every=3) as calls:
        case.call(pipe)
    before = {name: p.clone() for name, p in pipe.transformer.state_dict().items()}
    handle, reports = reconstruct(pipe.transformer, W4A8(modulation="keep"), calls[:2], iterations=12)
    assert [report.name for report in reports] == block_names(pipe.transformer)
    assert all(report.learned < report.nearest for report in reports) and sum(r.layers for r in reports) > 4
    assert not torch.equal(case.call(pipe), expected)
    handle.remove()
    assert torch.equal(case.call(pipe), expected)
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.state_dict().items())


def test_what_cannot_be_learned_is_said_and_undone() -> None:
    case = matrix.Case("flux", W8A8())
    pipe = case.make()
    with pytest.raises(DiffAccelError, match="No call"):
        reconstruct(pipe.transformer, W8A8(), [])
    with recording(pipe.transformer, every=2) as calls:
        case.call(pipe)
    with pytest.raises(DiffAccelError, match="iterations is 0"):
        reconstruct(pipe.transformer, W8A8(), calls, iterations=0)
    with pytest.raises(DiffAccelError, match="to whole codes"):
        reconstruct(pipe.transformer, W8A8(dtype="fp8", modulation="keep"), calls)
    assert not any(isinstance(m, QLinear) for m in pipe.transformer.modules())


def test_a_reconstructed_network_is_saved_and_loaded(tmp_path) -> None:
    case = matrix.Case("dit", W4A16())
    pipe = case.make()
    with recording(pipe.transformer, every=3) as calls:
        case.call(pipe)
    _, reports = reconstruct(pipe.transformer, W4A16(modulation="keep"), calls[:1], iterations=2)
    assert sum(report.learned for report in reports) < sum(report.nearest for report in reports)
    expected = case.call(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = type(pipe.transformer).from_pretrained(tmp_path)
    assert torch.equal(case.call(pipe), expected)
