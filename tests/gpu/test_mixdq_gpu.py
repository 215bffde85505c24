"""Mixed precision on a GPU: products against float64, graphs with a stored first row, and a plan made there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import mixdq_bed as bed
import pytest
import torch
from torch import nn

import diffaccel
from diffaccel.modules import Capture
from diffaccel.quant import MixDQ
from diffaccel.quant.mixed.conv import MixedConv2d
from diffaccel.quant.mixed.form import InputRange, MixedFormat
from diffaccel.quant.mixed.linear import MixedLinear

pytestmark = pytest.mark.gpu
FORMS = [
    MixedFormat(weight_bits=w, activation_bits=a, scale=scale, group=group)
    for w in (2, 4, 8) for a, scale in ((8, "token"), (8, "tensor"), (4, "tensor"), (16, "token"))
    for group in ((0,) if w == 8 else (0, 64))
]  # fmt: skip


def seed() -> int:
    return int(torch.randint(2**31, ()))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", ((4, 77, 640, 1280), (1, 1024, 320, 320), (3, 5, 96, 50)))
def test_linears_equal_the_cpu_within_rounding(form: MixedFormat, shape: tuple[int, ...]) -> None:
    batch, tokens, k, n = shape
    torch.manual_seed(seed())
    plain = nn.Linear(k, n)
    x = torch.randn(batch, tokens, k)
    form = replace(form, group=math.gcd(form.group, k) if form.group and math.gcd(form.group, k) >= 16 else 0)
    layer = MixedLinear.of(plain, form, InputRange((-5.0,), (5.0,)))
    exact = layer.double()(x.double()) if form.activation_bits == 16 else layer(x)
    layer = layer.float().cuda()
    torch.testing.assert_close(layer(x.cuda()).cpu().double(), exact.double(), rtol=2e-3, atol=2e-3)
    half = layer.to(torch.bfloat16)(x.cuda().bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half.float().cpu() - exact.float()).norm() / exact.float().norm()) < 0.05


@pytest.mark.parametrize("scale", ("token", "tensor"))
@pytest.mark.parametrize("split", (0, 64))
def test_convolutions_equal_the_cpu(scale: str, split: int) -> None:
    torch.manual_seed(seed())
    plain, x = nn.Conv2d(128, 64, 3, padding=1), torch.randn(2, 128, 32, 32)
    ends = (5.0,) * (1 + (split > 0))
    form = MixedFormat(weight_bits=8, activation_bits=8, scale=scale, split=split)
    layer = MixedConv2d.of(plain, form, InputRange(tuple(-end for end in ends), ends))
    expected = layer(x)
    on_gpu = layer.cuda()(x.cuda()).cpu()
    assert float((on_gpu - expected).norm() / expected.norm()) < 1e-3
    half = layer.to(torch.bfloat16)(x.cuda().bfloat16()).float().cpu()
    assert float((half - expected).norm() / expected.norm()) < 0.02


def test_graphs_look_at_the_rows_of_every_call(tmp_path: Path) -> None:
    """A captured network compares the first rows anew in each replay: other prompts, and empty ones."""
    config = replace(bed.uniform("sd", activation_scale="tensor"))
    eager = diffaccel.accelerate(bed.pipeline("sd").to("cuda"), config)
    captured = diffaccel.accelerate(bed.pipeline("sd").to("cuda"), config, Capture())
    for changes in ({}, {"guided": False}, {}):
        assert torch.equal(bed.draw(captured, "sd", **changes), bed.draw(eager, "sd", **changes))


def test_a_plan_made_on_the_gpu(tmp_path: Path) -> None:
    from diffaccel.quant.mixdq.work import make

    pipe = bed.pipeline("sd").to("cuda", torch.bfloat16)
    config = MixDQ(**bed.FAST, weight_bits=5.0, activation_scale="tensor")
    plan = make(pipe, config, tmp_path, bed.PROMPTS, bed.arguments("sd"))
    assert plan.weight_average <= 5 and plan.first_row is not None
    stock = bed.draw(pipe, "sd")
    diffaccel.accelerate(pipe, replace(config, plan=str(tmp_path / "plan.json")))
    assert bool(torch.isfinite(bed.draw(pipe, "sd")).all())
    pipe.enable_model_cpu_offload()
    assert bool(torch.isfinite(bed.draw(pipe, "sd")).all())
    del stock
