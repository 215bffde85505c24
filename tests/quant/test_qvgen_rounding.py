"""Rounding with gradients, its start, and the layer that is trained: against the definition and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.quant.low_bit.form import LowBit
from diffaccel.quant.low_bit.start import best_of_rank, codes_of, search_scales
from diffaccel.quant.qvgen.decay import cut, refactored
from diffaccel.quant.qvgen.layer import FakeQLinear
from diffaccel.quant.qvgen.rounding import round_tokens, round_weight


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def passed_through(x: Tensor) -> Tensor:
    return x.round().detach() + (x - x.detach())  # a whole number to the bit


def clipped(codes: Tensor, largest: int) -> Tensor:
    """Clip with the gradient 1 at both ends, which ``torch.clamp`` has in some versions only."""
    low = torch.where(codes < 0, torch.zeros_like(codes), codes)
    return torch.where(low > largest, torch.full_like(low, largest), low)


@pytest.mark.parametrize("bits", (3, 4))
def test_gradients_of_weights_are_those_of_the_definition_and_of_the_formulas(bits: int) -> None:
    largest, upstream = 2**bits - 1, draw(6, 40, seed=1)
    w, s, z = draw(6, 40).requires_grad_(), (draw(6, 1).abs() / 8 + 0.05).requires_grad_(), draw(6, 1, seed=2)
    z = (z + largest / 2).requires_grad_()
    y = round_weight(w, s, z, bits)
    found = torch.autograd.grad((y * upstream).sum(), (w, s, z))
    defined = s * (clipped(passed_through(w / s + z), largest) - z)
    torch.testing.assert_close(y, defined, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((defined * upstream).sum(), (w, s, z))
    factor = 1 / (40 * largest) ** 0.5
    for one, other, scaled in zip(found, expected, (1, factor, factor), strict=True):
        torch.testing.assert_close(one, other * scaled, rtol=1e-11, atol=1e-12)
    v = (w / s + z).detach()
    below, above = v.round() < 0, v.round() > largest
    assert below.any() and above.any()
    inside = torch.where(below | above, 0.0, v.round() - v)
    to_scale = inside + torch.where(below, -z, 0.0) + torch.where(above, largest - z, 0.0)
    torch.testing.assert_close(found[1], (to_scale * upstream).sum(1, keepdim=True).detach() * factor)
    assert torch.equal(found[0], torch.where(below | above, 0.0, upstream))


@pytest.mark.parametrize("range_gradients", (False, True))
def test_gradients_of_tokens_are_those_of_the_definition(range_gradients: bool) -> None:
    upstream = draw(6, 40, seed=1)
    x, clip = draw(6, 40).requires_grad_(), torch.tensor([[0.6, 0.7], [0.9, 0.5]], dtype=torch.float64)
    clip.requires_grad_()
    y = round_tokens(x, clip, 4, range_gradients=range_gradients)
    found = torch.autograd.grad((y * upstream).sum(), (x, clip))
    ends = x if range_gradients else x.detach()
    rows = clip.repeat_interleave(3, dim=0)
    lo, hi = ends.amin(1, keepdim=True) * rows[:, :1], ends.amax(1, keepdim=True) * rows[:, 1:]
    s = (hi - lo) / 15
    z = (-(lo / s).round()).clamp(0, 15).detach()
    defined = s * (clipped(passed_through(x / s) + z, 15) - z)
    torch.testing.assert_close(y, defined, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad((defined * upstream).sum(), (x, clip)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_constant_and_positive_tokens_keep_their_values() -> None:
    x = torch.tensor([[0.0] * 4, [5.0] * 4, [2.0, 3.0, 4.0, 5.0], [-5.0] * 4])
    y = round_tokens(x, torch.ones(1, 2), 4)
    torch.testing.assert_close(y[[0, 1, 3]], x[[0, 1, 3]])
    assert float((y[2] - x[2]).abs().max()) <= 5 / 30 + 1e-6  # half a step of 0..5


def test_codes_are_computed_in_fp32_for_bf16_numbers() -> None:
    x = draw(8, 64, dtype=torch.float32).to(torch.bfloat16)
    one, other = round_tokens(x, torch.ones(1, 2), 4), round_tokens(x.float(), torch.ones(1, 2), 4)
    assert torch.equal(one, other.to(torch.bfloat16))


def test_many_bits_leave_the_layer_as_it_is() -> None:
    x, w = draw(5, 64, dtype=torch.float32), draw(8, 64, seed=1, dtype=torch.float32)
    scale, zero = search_scales(w, 16)
    y = round_tokens(x, torch.ones(1, 2), 16) @ round_weight(w, scale, zero, 16).t()
    assert float((y - x @ w.t()).norm() / (x @ w.t()).norm()) < 1e-3


def test_errors_of_gaussian_rows() -> None:
    w = draw(32, 4096, dtype=torch.float32)
    for bits, expected in ((4, 0.110), (3, 0.202)):
        scale, zero = search_scales(w, bits)
        error = (codes_of(w, scale, zero, bits) - zero) * scale - w
        assert float(error.norm() / w.norm()) == pytest.approx(expected, abs=0.006)


def layer(rank: int, n: int = 24, k: int = 32, **options: Any) -> tuple[nn.Linear, FakeQLinear]:
    torch.manual_seed(0)
    linear = nn.Linear(k, n)
    return linear, FakeQLinear(linear, LowBit(**{"act_groups": 4, **options}), rank)


def test_the_start_is_the_weight_at_full_rank_and_the_best_of_its_rank_below() -> None:
    linear, full = layer(24)
    torch.testing.assert_close(full.effective_weight(), linear.weight, rtol=1e-5, atol=1e-6)
    _, some = layer(5)
    error = linear.weight - round_weight(linear.weight, some.weight_scale, some.weight_zero, 4)
    rest = torch.linalg.svdvals(error.detach().double())[5:].square().sum()
    left = (linear.weight - some.effective_weight()).detach().double().square().sum()
    assert float(left) == pytest.approx(float(rest), rel=1e-5)


def test_without_rounding_it_is_the_plain_layer_to_the_bit() -> None:
    linear, fake = layer(0)
    fake.quantizes_weight = fake.quantizes_input = False
    x = draw(3, 7, 32, dtype=torch.float32)
    assert torch.equal(fake(x), linear(x))


def test_gates_of_one_and_zero() -> None:
    _, fake = layer(8)
    x = draw(5, 32, dtype=torch.float32)
    plain = fake(x)
    fake.keep, fake.gate = 4, 1.0
    assert torch.equal(fake(x), plain)
    fake.gate = 0.0
    faded = fake(x)
    fake.set_side(fake.side_left[:, :4], fake.side_right[:4])  # type: ignore[index]
    assert torch.equal(fake(x), faded) and not torch.equal(faded, plain)
    before = fake.side_left @ fake.side_right  # type: ignore[operator]
    cut([fake], 4)
    after = fake.side_left @ fake.side_right  # type: ignore[operator]
    assert float((after - before).norm() / before.norm()) < 1e-6


def test_new_bases_are_ordered_by_singular_values() -> None:
    left, right = draw(2, 20, 6, dtype=torch.float32), draw(2, 6, 30, seed=1, dtype=torch.float32)
    new_left, new_right = refactored(left, right)
    torch.testing.assert_close(new_left @ new_right, left @ right, rtol=1e-4, atol=1e-4)
    values = torch.linalg.svdvals(left @ right)[:, :6]
    torch.testing.assert_close(new_left.square().sum(1), values, rtol=1e-4, atol=1e-4)
    expected = best_of_rank(left[0] @ right[0], 6)
    torch.testing.assert_close(new_left[0] @ new_right[0], expected[0] @ expected[1], rtol=1e-4, atol=1e-4)


def test_clipping_learns_in_the_groups_that_were_visited_alone() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 32))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out

    from diffaccel.quant import QVGen, prepare_qat

    net = prepare_qat(Net(), QVGen(rank=4, steps=8, groups=10))
    net(draw(6, 32, dtype=torch.float32), torch.tensor([0.0, 999.0, 310.0] * 2)).square().mean().backward()
    for fake in (net.body[0], net.body[2]):
        visited = fake.act_logit.grad.abs().sum(1) > 0
        assert visited.nonzero().flatten().tolist() == [0, 3, 9]


def test_autocast_multiplies_in_its_dtype_and_rounds_in_fp32() -> None:
    _, fake = layer(4)
    x = draw(5, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fake(x)
    assert y.dtype == torch.bfloat16
    seen = round_tokens(x, torch.sigmoid(fake.act_logit).mean(0, keepdim=True), 4).bfloat16()
    torch.testing.assert_close(y, F.linear(seen, fake.effective_weight().bfloat16(), fake.bias.bfloat16()))
