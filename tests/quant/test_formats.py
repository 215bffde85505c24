"""Closed forms of the formats: grids come back exactly, zeros stay zeros, errors are those of the rounding."""

from __future__ import annotations

import math

import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.kernels.int4_weight import dequantize_int4_reference, expand_int4_reference, pack_int4, unpack_int4
from diffaccel.kernels.weight_linear import dequantize
from diffaccel.quant.formats import LayerFormat, fitting, quantize_weight

W8, FP8, W8A16 = LayerFormat("w8a8"), LayerFormat("w8a8_fp8"), LayerFormat("w8a16")
W4A16, W4A8 = LayerFormat("w4a16", 32), LayerFormat("w4a8", 32)
FORMATS = (W8, FP8, W8A16, W4A16, W4A8)


def restored(weight: torch.Tensor, form: LayerFormat, clip: str = "mse") -> torch.Tensor:
    tensors = quantize_weight(weight, form, clip)
    codes = tensors["weight"]
    if "weight_multiplier" in tensors:
        codes = expand_int4_reference(codes, tensors["weight_multiplier"])
    return dequantize(codes, tensors["weight_scale"], torch.float32, "reference")


def draw(n: int = 24, k: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def test_all_nibbles_in_both_places() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)
    pairs = torch.cartesian_prod(codes, codes)  # (256, 2): every byte
    packed = pack_int4(pairs)
    assert packed.unique().numel() == 256 and torch.equal(unpack_int4(packed), pairs)
    assert int(pack_int4(torch.tensor([[3, -1]], dtype=torch.int8))) == 0xF3  # the even index in the low nibble


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_weight_on_the_grid_comes_back_exactly(form: LayerFormat) -> None:
    draws = torch.Generator().manual_seed(1)
    largest = {4: 7, 8: 127}[form.bits]
    codes = torch.randint(-largest, largest + 1, (16, 128), generator=draws).float()
    if form == FP8:
        codes = torch.randn(16, 128, generator=draws).to(torch.float8_e4m3fn).float()
        largest = 448
    codes.unflatten(1, (-1, 32))[:, :, 0] = largest
    weight = codes * 2.0 ** torch.arange(-8, 8).unsqueeze(1)  # powers of two: the scales are exact
    torch.testing.assert_close(restored(weight, form), weight, rtol=3e-7, atol=0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zero_rows_and_zero_groups(form: LayerFormat) -> None:
    weight = draw()
    weight[3] = 0
    weight[5, :32] = 0
    result = restored(weight, form)
    assert not result[3].any() and not result[5, :32].any() and torch.isfinite(result).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_scaling_by_a_power_of_two_scales_the_result(form: LayerFormat) -> None:
    weight = draw()
    assert torch.equal(restored(weight * 8, form), restored(weight, form) * 8)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_permuted_rows_give_permuted_results(form: LayerFormat) -> None:
    weight, order = draw(), torch.randperm(24, generator=torch.Generator().manual_seed(2))
    assert torch.equal(restored(weight[order], form), restored(weight, form)[order])


def relative(weight: torch.Tensor, form: LayerFormat, clip: str = "mse") -> float:
    return float((restored(weight, form, clip) - weight).norm() / weight.norm())


def test_errors_on_gaussian_rows() -> None:
    """The uniform error of a step d is d / sqrt(12); a row of 3072 normal numbers reaches about 3.6 sigma."""
    weight = draw(64, 3072)
    step = float(weight.abs().amax(1).mean()) / 127
    assert relative(weight, W8) == pytest.approx(step / math.sqrt(12), rel=0.02)
    assert 0.02 < relative(weight, FP8) < 0.03  # 3 bits of mantissa
    step = float(weight.unflatten(1, (-1, 32)).abs().amax(2).mean()) / 7
    assert relative(weight, W4A16, "none") == pytest.approx(step / math.sqrt(12), rel=0.1)


@pytest.mark.parametrize("form", (W4A16, W4A8), ids=str)
def test_the_search_for_a_scale_never_makes_the_error_larger(form: LayerFormat) -> None:
    heavy = draw(32, 512) ** 3
    assert relative(heavy, form, "mse") < 0.99 * relative(heavy, form, "none")
    groups = [((restored(heavy, form, clip) - heavy) ** 2).unflatten(1, (-1, 32)).sum(2) for clip in ("mse", "none")]
    assert (groups[0] <= groups[1] * (1 + 1e-6)).all()


def test_two_level_codes_are_int8_and_close_to_free_scales() -> None:
    weight = draw(32, 512)
    tensors = quantize_weight(weight, W4A8)
    codes = expand_int4_reference(tensors["weight"], tensors["weight_multiplier"])
    assert codes.dtype == torch.int8 and int(codes.abs().max()) <= 126
    assert 1 <= int(tensors["weight_multiplier"].min()) and int(tensors["weight_multiplier"].max()) <= 18
    assert relative(weight, W4A8) < 1.15 * relative(weight, W4A16)


def test_packed_groups_expand_by_their_own_scale() -> None:
    codes = torch.ones(2, 64, dtype=torch.int8)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = dequantize_int4_reference(pack_int4(codes), scales, torch.float32)
    assert torch.equal(weight, scales.repeat_interleave(32, dim=1))


def test_formats_as_text_and_groups_that_fit() -> None:
    for form in FORMATS:
        assert LayerFormat.read(str(form)) == form
    for text in ("w8a8:32", "w4a16", "w4a8:x", "w2a2", ""):
        with pytest.raises(DiffAccelError, match="is no format"):
            LayerFormat.read(text)
    wide = LayerFormat("w4a16", 128)
    assert fitting(wide, 3072) == wide and fitting(wide, 96) == LayerFormat("w4a16", 32)
    assert fitting(wide, 24) == W8A16 and fitting(LayerFormat("w4a8", 128), 33) == W8 and fitting(W8, 33) == W8


def test_weights_that_are_no_numbers_are_refused() -> None:
    for bad in (float("nan"), float("inf")):
        for form in FORMATS:
            weight = draw()
            weight[2, 7] = bad
            with pytest.raises(DiffAccelError, match="infinities or not-a-numbers"):
                quantize_weight(weight, form)
