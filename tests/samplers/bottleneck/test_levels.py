"""Noise levels of stages, against the lists and counts that the papers' numbers imply."""

from __future__ import annotations

import itertools
import math
import re
from itertools import pairwise

import pytest
import torch
from stage_bed import flux_levels, target, wan_levels

from diffaccel.errors import DiffAccelError
from diffaccel.families.spectra import SPECTRA
from diffaccel.samplers.bottleneck import stages as rules
from diffaccel.samplers.bottleneck.detail import band_power, detail_gain, leaving_level
from diffaccel.samplers.bottleneck.levels import fitted_shift, resampled, shift, shifted, truncated, unshift
from diffaccel.samplers.bottleneck.presets import shares
from diffaccel.samplers.bottleneck.resizing import time_at_scale

FLUX, WAN = SPECTRA[0.3611, 16], SPECTRA[None, 16]


def test_a_shift_is_inverted_keeps_its_ends_and_composes() -> None:
    u = torch.linspace(0, 1, 11, dtype=torch.float64)
    for h in (0.5, 1.0, 3.158, 9.0):
        torch.testing.assert_close(unshift(shift(u, h), h), u)
        torch.testing.assert_close(shift(shift(u, h), 2.0), shift(u, 2 * h))
        assert shift(u, h)[[0, -1]].tolist() == [0.0, 1.0]
    assert torch.equal(shift(u, 1.0), u)


def test_the_papers_lists_of_levels() -> None:
    """N = 6, 20, 8 from 1, .8, .6 at the shifts 9, 6, 9 (arXiv 2503.18940), to three digits."""
    first = [1, 0.978, 0.947, 0.9, 0.818, 0.643, 0]
    last = [0.6, 0.562, 0.519, 0.469, 0.409, 0.338, 0.25, 0.141, 0]
    low = [
        0.8, 0.786, 0.771, 0.756, 0.738, 0.72, 0.7, 0.678, 0.655, 0.629, 0.6, 0.568, 0.533, 0.494, 0.45, 0.4, 0.343,
        0.277, 0.2, 0.109, 0,
    ]  # fmt: skip
    for levels, (start, steps, h) in ((first, (1.0, 6, 9.0)), (low, (0.8, 20, 6.0)), (last, (0.6, 8, 9.0))):
        made = shifted(start, 0.0, steps, h)
        assert made.tolist() == pytest.approx(levels, abs=6e-4)
        assert (made[0], made[-1]) == (start, 0) and bool((made.diff() < 0).all())


def test_truncation_counts_as_image_to_image_does() -> None:
    low, last = truncated(0.8, 20, 6.0), truncated(0.6, 8, 9.0)
    assert (len(low) - 1, len(last) - 1) == (16, 5)  # 20 (1 - .8) is 3.99... in floats
    assert last.tolist() == pytest.approx([0.938, 0.9, 0.844, 0.75, 0.562, 0], abs=6e-4)
    assert low[0] == pytest.approx(0.96) and float(low[-2]) == pytest.approx(0.24)


def test_a_curve_is_followed_between_its_levels() -> None:
    own = wan_levels(40)
    assert resampled(own, 1.0, 0.0, 40).tolist() == pytest.approx(own.tolist(), abs=1e-12)
    part = resampled(own, 0.8, 0.1, 7)
    assert (float(part[0]), float(part[-1])) == (0.8, 0.1) and bool((part.diff() < 0).all())
    assert part.tolist() == pytest.approx(shifted(0.8, 0.1, 7, 5.0).tolist(), abs=2e-3)
    assert fitted_shift(own) == pytest.approx(5.0)
    assert fitted_shift(flux_levels(50)) == pytest.approx(3.158, abs=1e-3)


def test_equal_noise_on_grids_of_other_size() -> None:
    assert time_at_scale(0.8, 0.5) == pytest.approx(2 / 3)
    assert time_at_scale(0.6, 2.0) == pytest.approx(0.75)
    assert time_at_scale(time_at_scale(0.37, 0.5), 2.0) == pytest.approx(0.37)
    assert time_at_scale(time_at_scale(0.37, 1.5), 4 / 3) == pytest.approx(time_at_scale(0.37, 2.0))


@pytest.mark.parametrize(
    ("levels", "size", "spectrum", "tolerance", "leaves"),
    [
        (flux_levels(50), (1024, 1024), FLUX, 0.05, (28, 34)),
        (flux_levels(50), (1024, 1024), FLUX, 0.01, (18,)),
        (wan_levels(50), (720, 1280), WAN, 0.01, (30,)),
        (wan_levels(50), (720, 1280), WAN, 0.05, (39,)),
        (wan_levels(50), (480, 832), WAN, 0.05, (33,)),
    ],
)
def test_hand_over_steps(levels, size, spectrum, tolerance: float, leaves: tuple[int, ...]) -> None:
    """SPEED's steps (arXiv 2605.18736) for the models that its authors and SGLang measured."""
    scales = (0.5, 1.0) if len(leaves) == 1 else (0.5, 0.75, 1.0)
    stages = rules.spectral(target(*size, levels), scales, spectrum, tolerance)
    ends = torch.tensor([stage.steps for stage in stages]).cumsum(0).tolist()
    assert tuple(ends[:-1]) == leaves and ends[-1] == 50
    for before, after in pairwise(stages):  # only the first level of a grid is not the call's own
        t = float(before.levels[-1])
        ratio = ((after.size[0] * after.size[1]) / (before.size[0] * before.size[1])) ** 0.5
        assert float(after.levels[0]) == pytest.approx(ratio * t / (1 + (ratio - 1) * t))
        assert torch.equal(after.levels[1:], levels.double()[after.own])


def test_stages_that_end_where_they_are_told_are_those_of_the_tolerance() -> None:
    call = target(1024, 1024, flux_levels(50))
    by_spectrum = rules.spectral(call, (0.5, 0.75, 1.0), FLUX, 0.05)
    told = rules.expanded(call, (0.5, 0.75, 1.0), rules.bounds(50, (0.56, 0.68)))
    for one, other in zip(by_spectrum, told, strict=True):
        assert (one.size, one.own) == (other.size, other.own) and torch.equal(one.levels, other.levels)


def test_power_at_the_nyquist_frequencies() -> None:
    assert [band_power(FLUX, w) for w in (32, 64)] == pytest.approx([0.267, 0.071], abs=1e-3)
    assert [band_power(WAN, w) for w in (22.5, 15)] == pytest.approx([0.116, 0.311], abs=1e-3)
    assert leaving_level(FLUX, 32, 0.05) == pytest.approx(0.718, abs=1e-3)


@pytest.mark.parametrize(
    ("power", "gains"),
    [
        (1.0, (0.54, 0.78, 0.83, 0.77, 0.73)),
        (0.3, (0.73, 0.83, 0.75, 0.63, 0.56)),
        (0.1, (0.82, 0.79, 0.62, 0.45, 0.39)),
    ],
)
def test_detail_gain(power: float, gains: tuple[float, ...]) -> None:
    for start, gain in zip((0.4, 0.6, 0.8, 0.9, 0.931), gains, strict=True):
        assert detail_gain(shifted(start, 0.0, 8, 9.0).tolist(), power) == pytest.approx(gain, abs=6e-3)
    whole = [detail_gain(shifted(1.0, 0.0, n, 3.0).tolist(), 1.0) for n in (50, 28, 10)]
    assert whole == pytest.approx([0.96, 0.94, 0.83], abs=6e-3)


def test_a_fine_flow_keeps_the_ratio_with_which_it_begins() -> None:
    for start, power in ((0.6, 1.0), (0.8, 1.0), (0.6, 0.1)):
        rho = start / ((1 - start) ** 2 * power + start**2) ** 0.5
        assert detail_gain(shifted(start, 0.0, 4000, 3.0).tolist(), power) == pytest.approx(rho, abs=2e-3)


def test_steps_are_divided_in_a_ratio() -> None:
    assert shares(34, (6, 20, 8)) == (6, 20, 8)
    for total in range(3, 60):
        parts = shares(total, (6, 20, 8))
        assert sum(parts) == total and min(parts) >= 1
    with pytest.raises(DiffAccelError, match="num_inference_steps=3"):
        shares(2, (6, 20, 8))


def test_stages_with_levels_of_their_own() -> None:
    call = target(1024, 1024, flux_levels(34))
    options = {"hands_off": False, "before_shift": False, "is_truncated": False}
    three = ((1.0, 0.5, 1.0), (6, 20, 8), (1.0, 0.8, 0.6), (9.0, 6.0, 9.0))
    clean = rules.renoised(call, *three, **options)
    assert [stage.size[0] for stage in clean] == [1024, 512, 1024] and [stage.steps for stage in clean] == [6, 20, 8]
    linear = rules.renoised(call, *three, **{**options, "before_shift": True})
    assert [float(stage.levels[0]) for stage in linear] == pytest.approx([1.0, 0.96, 0.931], abs=5e-4)
    cut = rules.renoised(call, *three, **{**options, "is_truncated": True})
    assert [stage.steps for stage in cut] == [6, 16, 5]
    passed = rules.renoised(call, *three, **{**options, "hands_off": True})
    ends = [float(stage.levels[-1]) for stage in passed]
    assert ends == pytest.approx([time_at_scale(0.8, 2.0), time_at_scale(0.6, 0.5), 0.0])
    own = rules.renoised(call, (1.0,), (34,), (1.0,), None, **options)
    assert own[0].enters_own and torch.equal(own[0].levels, call.levels)
    with pytest.raises(DiffAccelError, match=r"begin at noise level 0\.600 and end at 0\.667"):
        rules.renoised(call, (1.0, 0.5, 1.0), (6, 20, 8), (1.0, 0.6, 0.8), None, **{**options, "hands_off": True})


def test_no_stage_begins_above_the_call() -> None:
    """An image-to-image call begins at its strength, a table of noise levels at its own end."""
    call = target(1024, 1024, flux_levels(34)[10:])
    three = ((1.0, 0.5, 1.0), (6, 12, 6), (1.0, 0.9, 0.6), (9.0, 6.0, 9.0))
    top = float(call.levels[0])
    for is_truncated in (False, True):
        options = {"hands_off": False, "before_shift": False, "is_truncated": is_truncated}
        for stage in rules.renoised(call, *three, **options):
            assert float(stage.levels[0]) <= top and bool((stage.levels.diff() < 0).all())


def test_sizes_are_rounded_to_what_the_model_draws() -> None:
    call = target(720, 1280, wan_levels(50))
    assert call.scaled(0.5) == (352, 640) and call.scaled(0.75) == (544, 960)
    with pytest.raises(DiffAccelError, match="aspect ratio differs"):
        target(48, 112, wan_levels(4)).scaled(0.5)


@pytest.mark.parametrize("scale", [0.5, 0.537, 0.123456, 1 / 3])
def test_the_size_that_an_error_names_is_valid_and_no_other_is_nearer(scale: float) -> None:
    call = target(80, 112, wan_levels(4))
    with pytest.raises(DiffAccelError, match="The nearest size that keeps it at that scale is") as error:
        call.scaled(scale)
    width, height = map(int, re.findall(r"is (\d+)x(\d+)\.$", str(error.value))[0])
    target(height, width, wan_levels(4)).scaled(scale)
    for other in itertools.product(range(16, 160, 16), repeat=2):
        if math.dist(other, (80, 112)) < math.dist((height, width), (80, 112)):
            with pytest.raises(DiffAccelError, match="aspect ratio"):
                target(*other, wan_levels(4)).scaled(scale)


def test_levels_that_do_not_end_at_zero_have_a_full_size_step_too() -> None:
    """As DDIM's with set_alpha_to_one=False; a spectrum that no grid is too coarse for."""
    levels = torch.linspace(1.0, 0.04, 9, dtype=torch.float64)
    stages = rules.spectral(target(64, 64, levels), (0.5, 1.0), (1e-9, 1.4), 0.01)
    assert [(stage.size, stage.steps) for stage in stages] == [((32, 32), 7), ((64, 64), 1)]


def test_a_schedule_shifted_by_one_more_at_each_switch() -> None:
    levels = wan_levels(50)
    low, high = rules.reshifted(target(480, 832, levels), (0.75, 1.0), (0.5,))
    assert (low.steps, high.steps) == (25, 25)
    u = torch.linspace(1, 0, 51, dtype=torch.float64)
    assert high.levels.tolist() == pytest.approx(shift(u, 6.0)[25:].tolist())
    assert high.noised_to == float(levels[24])  # of the step just made, not the level that it led to


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("scales", [(0.5, 1.0), (0.5, 0.75, 1.0)])
def test_the_last_step_has_the_full_size_however_few_steps_are_made(steps: int, scales: tuple[float, ...]) -> None:
    """A grid that could hold the state to the end would hand the decoder a small one."""
    stages = rules.spectral(target(1024, 1024, flux_levels(steps)), scales, FLUX, 0.9)
    assert stages[-1].size == (1024, 1024) and sum(stage.steps for stage in stages) == steps
    assert float(stages[-1].levels[-1]) == 0
