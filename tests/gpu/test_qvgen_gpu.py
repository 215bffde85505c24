"""QVGen on a GPU: kernels on random inputs against whole numbers, layers by codes, training, offloading, graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import qvgen_bed
import tiny
import torch
from torch import nn

import diffaccel
from diffaccel.kernels.codes import DTYPES
from diffaccel.kernels.dispatch import capability
from diffaccel.kernels.low_bit_linear import low_bit_linear, low_bit_linear_reference
from diffaccel.kernels.packed_codes import expand_codes, expand_codes_reference, pack_codes
from diffaccel.kernels.quantize_tokens import quantize_tokens, quantize_tokens_reference, token_scales
from diffaccel.quant import QVGen, convert, prepare_qat
from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.linear import LowBitLinear
from diffaccel.quant.qvgen import rounding
from diffaccel.quant.qvgen.run import QATRun

pytestmark = pytest.mark.gpu
SMALL = QVGen(rank=4, steps=6, batch=2, groups=5, lr=1e-3, layers="all", save_seconds=1e9)


@pytest.fixture(autouse=True)
def seed() -> Iterator[int]:
    """Seed by the system: new numbers at every run; a failure shows the seed."""
    value = int.from_bytes(os.urandom(4), "little")
    torch.manual_seed(value)
    print(f"seed {value}")
    yield value


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def kinds() -> tuple[str, ...]:
    has_float8 = torch.cuda.is_available() and capability(torch.device("cuda")) >= (8, 9)
    return ("int8", "fp8") if has_float8 else ("int8",)


@pytest.mark.parametrize("symmetric", (False, True))
@pytest.mark.parametrize("shape", ((1, 16), (6, 300), (513, 3072), (33, 15360), (3, 20000), (0, 64)))
def test_tokens_against_the_formula(shape: tuple[int, int], symmetric: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = normal(*shape, dtype=dtype)
        if shape[0] > 5:
            x[1], x[2, 1], x[3, -1], x[4] = 0, float("nan"), float("inf"), x[4].abs() + 1
        clip = torch.rand(3 if shape[0] % 3 == 0 else 1, 2, device="cuda") / 2 + 0.5
        for codes in kinds():
            found = quantize_tokens(x, clip, 4, symmetric, codes, "fused")
            exact = quantize_tokens_reference(x, clip, 4, symmetric, codes)
            assert torch.equal(found[0].view(torch.uint8), exact[0].view(torch.uint8))
            torch.testing.assert_close(found[1], exact[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", range(2, 9))
def test_expansion_against_the_formula(bits: int) -> None:
    packed = pack_codes(torch.randint(0, 2**bits, (333, 2048), device="cuda", dtype=torch.uint8), bits)
    for codes in kinds()[: 2 if bits <= 5 else 1]:
        found = expand_codes(packed, bits, 2 ** (bits - 1), 2048, codes, "fused")
        exact = expand_codes_reference(packed, bits, 2 ** (bits - 1), 2048, codes)
        assert torch.equal(found.view(torch.uint8), exact.view(torch.uint8))


@pytest.mark.parametrize("k", (128, 1536, 3072, 12288, 15360))
@pytest.mark.parametrize("data", ("random", "low", "high", "positive"))
def test_sums_are_whole_numbers_in_every_kernel(k: int, data: str) -> None:
    draw = {
        "random": lambda *s: torch.randint(-8, 8, s, device="cuda"), "low": lambda *s: torch.full(s, -8, device="cuda"),
        "high": lambda *s: torch.full(s, 7, device="cuda"),
        "positive": lambda *s: 2 * torch.randint(0, 4, s, device="cuda") + 1,
    }[data]  # fmt: skip
    for m, n in ((512, 256), (300, 400), (17, 48)):
        a, w = draw(m, k), draw(n, k)
        stats = torch.tensor([[1.0, 0.0, 0.0]], device="cuda").expand(m, 3).contiguous()
        one, zero = torch.ones(n, 1, device="cuda"), torch.zeros(n, 1, device="cuda")
        exact = a.double() @ w.double().t()
        for codes in kinds():
            y = low_bit_linear(a.float().to(DTYPES[codes]), stats, w.float().to(DTYPES[codes]), one, zero, zero, None,
                               torch.float32, "fused")  # fmt: skip
            assert torch.equal(y.double(), exact), codes


@pytest.mark.parametrize("shape", ((300, 200, 112), (1, 64, 128), (513, 256, 3072), (7, 33, 50)))
def test_products_against_the_formula(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    for codes in kinds():
        a = torch.randint(-8, 8, (m, k), device="cuda").float().to(DTYPES[codes])
        w = torch.randint(-8, 8, (n, k), device="cuda").float().to(DTYPES[codes])
        stats, rows = normal(m, 3, dtype=torch.float32), normal(n, 3, dtype=torch.float32).split(1, dim=1)
        bias = normal(n)
        exact = low_bit_linear_reference(a, stats, w, *rows, bias, torch.float32)
        found = low_bit_linear(a, stats, w, *rows, bias, torch.float32, "fused")
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-3 * float(exact.abs().max()) / 100 + 1e-4)


@pytest.mark.parametrize("form", (LowBit(), LowBit(weight_bits=3, act_bits=3, dense=True), LowBit(rank=8),
                                  LowBit(weight_bits=8, act_bits=8), LowBit(symmetric=True)), ids=str)  # fmt: skip
def test_layers_by_kernels_are_those_of_the_reference(form: LowBit) -> None:
    layer = LowBitLinear.of(nn.Linear(512, 384).cuda().bfloat16(), form)
    x = normal(2, 77, 512)
    with torch.no_grad():
        fused = layer(x).float()
        layer.mode = "reference"
        exact = layer(x).float()
    unit = torch.finfo(torch.bfloat16).eps * exact.abs().clamp_min(exact.abs().mean() / 64)
    assert ((fused - exact).abs() <= (4 if form.rank else 1) * unit).all()


def test_trained_layers_by_codes(tmp_path: Path) -> None:
    net = prepare_qat(qvgen_bed.network().cuda(), replace(SMALL, rank=0))
    x = torch.randn(2, *qvgen_bed.SHAPE, device="cuda")
    sigma = torch.tensor([0.2, 0.9], device="cuda")
    with torch.no_grad():
        trained = qvgen_bed.call(net, x, sigma, None)
        found = qvgen_bed.call(convert(net), x, sigma, None)
    assert float((found - trained).norm() / trained.norm()) < 1e-3


def away_from_ties(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return numbers of which each that ``v`` of would round either way is 0."""
    return torch.where((v - v.floor() - 0.5).abs() < 1e-3, 0.0, x)


def test_fused_gradients_are_those_of_the_formulas(monkeypatch: Any) -> None:
    """Equal to the bit but for sums, on numbers away from ties.

    A compiler's division is off by units in the last place, so that a number at a tie may have another code, and one at
    the end of the range no gradient. Clipped ends are codes away from the range: it does not matter how they round.
    """
    x, w = normal(2048, 256), normal(256, 256, dtype=torch.float32)
    scale, zero = w.abs().amax(1, keepdim=True) / 8, torch.full((256, 1), 7.3, device="cuda")
    w = away_from_ties(w, w.double() / scale + zero)
    clip = torch.tensor([[0.6, 0.7], [0.5, 0.7]], device="cuda")
    low, high = (end(dim=1, keepdim=True).float() for end in (x.amin, x.amax))
    rows = clip.repeat_interleave(1024, dim=0)
    steps, _ = token_scales(low * rows[:, :1], high * rows[:, 1:], 4, False)
    x = torch.where((x == low) | (x == high), x, away_from_ties(x, x.double() / steps))
    results = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(rounding, "LEAST_FUSED", least)
        leaves = [t.clone().requires_grad_() for t in (x, w, scale, zero, clip)]
        y = rounding.round_tokens(leaves[0], leaves[4], 4).float() @ rounding.round_weight(*leaves[1:4], 4).t()
        results.append((y.detach(), *torch.autograd.grad(y.square().mean(), leaves)))
    for number, (fused, plain) in enumerate(zip(*results, strict=True)):
        if number < 3:  # y, and the gradients of x and w
            assert torch.equal(fused, plain)
        else:  # 256 terms, each off by 2e-6 of its factor at most, are 5e-4 of those that add up like random ones
            assert float((fused - plain).norm() / plain.norm()) < 1e-3


def test_a_run_on_the_gpu_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def make(folder: Path) -> QATRun:
        torch.manual_seed(0)
        net = qvgen_bed.network(0).cuda()

        def call(network: Any, x: Any, sigma: Any, _: Any) -> Any:
            return qvgen_bed.call(network, x, sigma.to(x.device), None).float()

        model = replace(qvgen_bed.teacher(net), call=call)
        return QATRun(model, qvgen_bed.samples(8), SMALL, folder, dtype=torch.bfloat16)

    whole = make(tmp_path / "whole")
    whole.run()
    broken = make(tmp_path / "broken")
    for _ in range(3):
        broken.turn()
    broken.save()
    resumed = make(tmp_path / "broken")
    resumed.run()
    for one, other in zip(whole.student.parameters(), resumed.student.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("offload", ("model", "group"))
def test_offloading_and_graphs(offload: str) -> None:
    pipe = tiny.make("flux").to("cuda")
    diffaccel.accelerate(pipe, QVGen())
    expected = pipe(**tiny.call_kwargs("flux")).images.clone()
    other = tiny.make("flux").to("cuda")  # quantized where the first one is: devices add in another order
    diffaccel.accelerate(other, QVGen())
    other.to("cpu")
    if offload == "model":
        other.enable_model_cpu_offload()
    else:
        devices = {"onload_device": torch.device("cuda"), "offload_device": torch.device("cpu")}
        other.enable_group_offload(**devices, offload_type="leaf_level")
    assert torch.equal(other(**tiny.call_kwargs("flux")).images, expected)
    from diffaccel.modules import Capture

    diffaccel.remove(pipe)
    diffaccel.accelerate(pipe, QVGen(), Capture())
    assert torch.equal(pipe(**tiny.call_kwargs("flux")).images, expected)
