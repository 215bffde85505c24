"""The stage engine on data whose flow is known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_bed import Bed, stage, target, wan_levels

from diffaccel.flow import LINEAR, VE_PATH
from diffaccel.modules.dct import dct_matrix
from diffaccel.samplers.bottleneck import stages as rules
from diffaccel.samplers.bottleneck.detail import detail_gain
from diffaccel.samplers.bottleneck.engine import Handover, sigmas_of, staged
from diffaccel.samplers.bottleneck.levels import shifted
from diffaccel.samplers.bottleneck.lift import lift, lift_weights
from diffaccel.samplers.bottleneck.resizing import crop_spectrum, expand_spectrum, interpolate, time_at_scale
from diffaccel.samplers.euler import euler
from diffaccel.session import Eval, Pred, Stages, Step

SIZE = (128, 128)


def test_one_stage_is_euler_to_the_bit() -> None:
    levels = wan_levels(12)
    plain, in_stages = Bed(*SIZE, levels), Bed(*SIZE, levels)
    expected = plain.drive(euler(plain))
    got = in_stages.drive(staged(in_stages, rules.whole(target(*SIZE, levels)), Handover("noise")))
    assert torch.equal(got, expected) and in_stages.calls == plain.calls


def test_two_stages_of_one_size_are_one_run() -> None:
    """A spectrum of the same size is the state itself."""
    levels = wan_levels(12)
    parts = [stage(SIZE, levels[:6]), stage(SIZE, levels[5:])]
    plain, bed = Bed(*SIZE, levels), Bed(*SIZE, levels)
    torch.testing.assert_close(bed.drive(staged(bed, parts, Handover("spectrum"))), plain.drive(euler(plain)))


@pytest.mark.parametrize("kind", ["spectrum", "noise", "lift"])
def test_a_constant_picture_is_returned(kind: str) -> None:
    """Of a point mass every schedule returns the point, where each size can show it."""
    levels = wan_levels(10)
    bed = Bed(*SIZE, levels, power=0.0, mean=0.7)
    parts = rules.switched(target(*SIZE, levels), (0.5, 1.0), (0.6,))
    if kind == "spectrum":
        parts = rules.spectral(target(*SIZE, levels), (0.5, 1.0), (3.0, 1.4), 0.05)
    out = bed.drive(staged(bed, parts, Handover(kind, "bilinear", (0.4, 0.5, 1.0))))
    torch.testing.assert_close(out, torch.full_like(out, 0.7), rtol=0, atol=1e-6)
    assert [at.height for at, _ in bed.parts] == [64, 128]
    assert bed.steps == 10 and sum(size == (8, 8) for size in bed.calls) == len(bed.parts[0][1]) - 1


def test_a_transition_leaves_noise_of_its_level_that_is_white_and_fresh() -> None:
    bed = Bed(256, 256, wan_levels(4), rows=64)
    x0 = torch.randn(64, 1, 16, 16, dtype=torch.float64)
    parts = [stage((128, 128), [1.0, 0.5]), stage((256, 256), [0.6, 0.0])]
    sampling = staged(bed, parts, Handover("noise", "bilinear"))
    sampling.send(None)
    event = sampling.send(None)
    first_noise = event.x
    event = sampling.send(Pred(LINEAR, event.x, event.sigma, event.x - x0))
    event = sampling.send(event.x)
    state, sigma = event.x, float(event.sigma)
    clean = interpolate(first_noise + (0.5 - 1.0) * (first_noise - x0) - 0.5 * (first_noise - x0), (32, 32), "bilinear")
    noise = (state - (1 - sigma) * clean) / sigma
    assert sigma == pytest.approx(0.6)
    assert float(noise.mean()) == pytest.approx(0, abs=4 / noise.numel() ** 0.5)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    spectrum = (dct_matrix(32) @ noise @ dct_matrix(32).T) ** 2
    bands = spectrum.mean((0, 1)).reshape(8, 4, 8, 4).mean((1, 3))
    assert float((bands - 1).abs().max()) < 0.25  # 1,024 coefficients a band
    small = interpolate(noise, (16, 16), "area").flatten()
    assert abs(float(torch.corrcoef(torch.stack([small, first_noise.flatten()]))[0, 1])) < 3 / small.numel() ** 0.5


def test_an_expanded_spectrum_keeps_signal_and_noise_on_the_path() -> None:
    """``x = (1 - t) m + t z`` at t = .6, twice as large: mean ``.25 m``, deviation .75, and still white."""
    generator = torch.Generator().manual_seed(0)
    x = 0.4 * 1.0 + 0.6 * torch.randn(400, 1, 16, 16, generator=generator, dtype=torch.float64)
    noise = torch.randn(400, 1, 32, 32, generator=generator, dtype=torch.float64)
    larger, t = expand_spectrum(x, 0.6, noise)
    assert t == pytest.approx(0.75) == time_at_scale(0.6, 2.0)
    assert float(larger.mean()) == pytest.approx(0.25, abs=4 * 0.75 / larger.numel() ** 0.5)
    assert float((larger - larger.mean()).std()) == pytest.approx(0.75, abs=5e-3)
    spectrum = ((dct_matrix(32) @ (larger - 0.25) @ dct_matrix(32).T) ** 2).mean((0, 1))
    assert float((spectrum.reshape(4, 8, 4, 8).mean((1, 3)) / 0.75**2 - 1).abs().max()) < 0.05
    same, t = expand_spectrum(x, 0.6, x)
    assert same is x and t == 0.6


def test_shared_noise_is_the_whole_spectrum_of_one_draw() -> None:
    """A crop of white noise is white, and a crop that is expanded with the same noise at t = 1 is that noise again."""
    noise = torch.randn(200, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low = crop_spectrum(noise, (8, 8))
    spectrum = ((dct_matrix(8) @ low @ dct_matrix(8).T) ** 2).mean((0, 1))
    assert float((spectrum.reshape(2, 4, 2, 4).mean((1, 3)) - 1).abs().max()) < 0.1
    whole, t = expand_spectrum(low, 1.0, noise)
    assert t == 1.0
    torch.testing.assert_close(whole, noise)
    assert crop_spectrum(noise, (16, 16)) is noise


def test_stages_with_shared_noise_follow_the_plain_call() -> None:
    """Frequencies of a Gaussian go their own ways: what the low stage cannot hold stays as the plain call has it."""
    levels, power = wan_levels(200), torch.full((16, 16), 0.02, dtype=torch.float64)
    power[:8, :8] = 1.0
    plain, bed = Bed(*SIZE, levels, power=power), Bed(*SIZE, levels, power=power)
    expected = plain.drive(euler(plain))
    parts = rules.spectral(target(*SIZE, levels), (0.5, 1.0), (3.0, 1.4), 0.01)
    shared = bed.drive(staged(bed, parts, Handover("spectrum", shares_noise=True)))
    other = Bed(*SIZE, levels, power=power)
    fresh = other.drive(staged(other, parts, Handover("spectrum")))
    assert float((shared - expected).std()) < 0.15 * float((fresh - expected).std())


@pytest.mark.parametrize("kind", ["spectrum", "noise"])
def test_shared_noise_has_unit_variance_where_levels_begin_below_pure_noise(kind: Any) -> None:
    """A flow pipeline begins at its noise as it was drawn, whatever the first of custom ``sigmas`` is."""
    bed = Bed(*SIZE, torch.tensor([0.7, 0.5, 0.2, 0.0], dtype=torch.float64))
    parts = rules.switched(target(*SIZE, bed.sigmas), (0.5, 1.0), (0.5,))
    if kind == "spectrum":
        parts = rules.expanded(target(*SIZE, bed.sigmas), (0.5, 1.0), (0, 2, 3))
    sampling, states = staged(bed, parts, Handover(kind, shares_noise=True)), []
    event = next(sampling)
    while isinstance(event, Stages | Eval | Step):
        if isinstance(event, Eval):
            states.append(event)
        reply = Pred(LINEAR, event.x, event.sigma, event.x / event.sigma) if isinstance(event, Eval) else None
        event = next_event(sampling, event.x if isinstance(event, Step) else reply)
    entered = next(state for state in states if state.x.shape[-1] == 16)
    # the network takes all for noise, so that beyond the small grid the state is the level's share of the draw
    high = (dct_matrix(16) @ entered.x @ dct_matrix(16).T)[..., 8:, 8:]
    drawn = (dct_matrix(16) @ bed.x @ dct_matrix(16).T)[..., 8:, 8:]
    torch.testing.assert_close(high, entered.sigma * drawn)


def next_event(sampling: Any, reply: Any) -> Any:
    try:
        return sampling.send(reply)
    except StopIteration:
        return None


def test_two_expansions_are_one() -> None:
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    middle, t = expand_spectrum(x, 0.5, torch.zeros(2, 1, 16, 16, dtype=torch.float64))
    twice, t = expand_spectrum(middle, t, torch.zeros(2, 1, 32, 32, dtype=torch.float64))
    once, whole = expand_spectrum(x, 0.5, torch.zeros(2, 1, 32, 32, dtype=torch.float64))
    torch.testing.assert_close(twice, once)
    assert t == pytest.approx(whole)


@pytest.mark.parametrize("start", [0.4, 0.6, 0.8])
def test_detail_of_the_last_stage(start: float) -> None:
    """The amplitude of bands that the low stage cannot hold is ``detail_gain`` to 1 %."""
    power, last = torch.full((32, 32), 0.3, dtype=torch.float64), shifted(start, 0.0, 8, 9.0)
    power[:16, :16] = 0.0  # nothing lies in the low frequencies, so that the low stage ends at a constant
    bed = Bed(256, 256, wan_levels(8), power=power, rows=256)
    parts = [stage((128, 128), shifted(1.0, 0.0, 8, 6.0)), stage((256, 256), last)]
    out = bed.drive(staged(bed, parts, Handover("noise")))
    spectrum = dct_matrix(32) @ out @ dct_matrix(32).T
    gain = float((spectrum[..., power > 0] ** 2).mean().sqrt()) / 0.3**0.5
    assert gain == pytest.approx(detail_gain(last.tolist(), 0.3), rel=0.01)


def test_noise_of_later_stages_does_not_depend_on_the_steps_of_earlier_ones() -> None:
    states = []
    for steps in (3, 7):
        bed = Bed(*SIZE, wan_levels(8), power=0.0, mean=0.3)
        parts = [stage((64, 64), shifted(1.0, 0.0, steps, 3.0)), stage(SIZE, [0.6, 0.0])]
        sampling = staged(bed, parts, Handover("noise"))
        reply, seen = None, []
        while len(seen) <= steps:
            event = sampling.send(reply)
            if hasattr(event, "at"):
                seen.append(event.x)
                reply = Pred(LINEAR, event.x, event.sigma, bed.velocity(event.x, float(event.sigma)))
            else:
                reply = getattr(event, "x", None)
        states.append(seen[-1])
    torch.testing.assert_close(states[0], states[1])


def test_levels_on_a_path_with_exploding_variance() -> None:
    ve = torch.tensor([14.6, 5.0, 1.0, 0.2, 0.0])
    bed = Bed(*SIZE, ve, path=VE_PATH)
    own = rules.whole(target(*SIZE, LINEAR.at(VE_PATH.rho(ve.double()))))[0]
    assert torch.equal(sigmas_of(bed, own), ve)
    other = stage(SIZE, [0.8, 0.5, 0.0])
    assert sigmas_of(bed, other).tolist() == pytest.approx([4.0, 1.0, 0.0])


# -- lifting -----------------------------------------------------------------------------------------------------------


def test_a_lift_takes_pixels_where_they_differ_most() -> None:
    z, p = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    p[0, :, 1, 2], p[0, :, 0, 0], p[1, :, 3, 3] = 2.0, 1.0, 5.0
    weights = lift_weights(z, p, 2 / 16, 0.5, 1.0)
    assert weights[0, 0, 1, 2] == pytest.approx(1) and weights[0, 0, 0, 0] == 0.5  # of each row by itself
    assert weights[1, 0, 3, 3] == pytest.approx(1)
    assert torch.equal(lift(z, p, 0.0, 0.5, 1.0), z)
    torch.testing.assert_close(lift(z, p, 1.0, 1.0, 1.0), p)
    assert torch.isfinite(lift(z, z + 1, 0.4, 0.5, 1.0)).all()  # a constant risk


def test_interpolation() -> None:
    constant = torch.full((2, 3, 8, 8), 0.3, dtype=torch.float64)
    for mode in ("bilinear", "bicubic", "nearest", "area"):
        for size in ((4, 4), (16, 16), (12, 12)):
            torch.testing.assert_close(interpolate(constant, size, mode), torch.full((2, 3, *size), 0.3).double())
    video = torch.randn(2, 3, 5, 8, 8)
    for frame in range(5):
        torch.testing.assert_close(
            interpolate(video, (4, 4), "bilinear")[:, :, frame], interpolate(video[:, :, frame], (4, 4), "bilinear")
        )
    assert interpolate(video, (8, 8), "bilinear") is video
