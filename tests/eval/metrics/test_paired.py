"""PSNR, SSIM and latent error against closed forms and torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.paired import latent_error, psnr, ssim, summarise


def images(count: int = 3, height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 8, width // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth * 255).clamp(0, 255).round().to(torch.uint8)


def noisy(x: Tensor, scale: float, seed: int = 1) -> Tensor:
    noise = scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
    return (x + noise).clamp(0, 255).round().to(torch.uint8)


@pytest.mark.parametrize("offset", [1, 3, 20, 255])
def test_psnr_of_a_constant_offset(offset: int) -> None:
    a = torch.zeros(2, 3, 9, 7, dtype=torch.uint8)
    got = psnr(a, a + offset)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([20 * math.log10(255 / offset)] * 2, abs=1e-12)
    assert torch.equal(psnr(a + offset, a), got)  # unsigned differences must not wrap


def test_identical_images() -> None:
    a = images()
    assert psnr(a, a).tolist() == [math.inf] * 3
    flat = torch.full((1, 3, 16, 16), 201, dtype=torch.uint8)
    assert ssim(a, a).tolist() == [1.0] * 3 and ssim(flat, flat).item() == 1.0
    changed = a.clone()
    changed[1, 0, 3, 4] ^= 1
    assert psnr(a, changed).isinf().tolist() == [True, False, True]
    assert (ssim(a, changed) == 1).tolist() == [True, False, True]


def test_psnr_does_not_overflow_at_any_size() -> None:
    a = torch.zeros(1, 3, 1, 12_000, dtype=torch.uint8).expand(1, 3, 300, 12_000)  # 255^2 * 3 * 3.6e6 > 2^31
    assert psnr(a, torch.full_like(a, 255)).item() == pytest.approx(0, abs=1e-12)


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b = (torch.full((1, 3, 20, 20), v, dtype=torch.uint8) for v in (100, 140))
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b).item() == pytest.approx((2 * 100 * 140 + c1) / (100**2 + 140**2 + c1), rel=1e-12)


def test_ssim_of_a_negative_of_zero_mean_structure() -> None:
    checks = ((torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2 - 1).expand(1, 3, 32, 32)
    a, b = (128 + 50 * checks).to(torch.uint8), (128 - 50 * checks).to(torch.uint8)
    # equal means, covariance -variance of 2500: only the window's own mean of +-1, some 1e-4, keeps this from exact
    c2 = (0.03 * 255) ** 2
    assert ssim(a, b).item() == pytest.approx((-2 * 2500 + c2) / (2 * 2500 + c2), abs=1e-4)


@pytest.mark.parametrize("size", [(11, 11), (40, 56), (64, 33)])
@pytest.mark.parametrize("scale", [2.0, 25.0])
def test_parity_with_torchmetrics(size: tuple[int, int], scale: float) -> None:
    functional = pytest.importorskip("torchmetrics.functional.image")
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(0, 256, (3, 3, *size), generator=generator, dtype=torch.uint8)
    b = noisy(a, scale)
    x, y = a.double() / 255, b.double() / 255
    theirs = functional.structural_similarity_index_measure(y, x, data_range=1.0, reduction="none")
    assert ssim(a, b).tolist() == pytest.approx(theirs.tolist(), abs=1e-5)
    theirs = functional.peak_signal_noise_ratio(y, x, data_range=1.0, reduction="none", dim=(1, 2, 3))
    assert psnr(a, b).tolist() == pytest.approx(theirs.tolist(), abs=1e-5)


def test_a_pair_does_not_depend_on_its_batch() -> None:
    a = images(5)
    b = noisy(a, 8)
    order = torch.tensor([3, 0, 4, 1, 2])
    for metric in (psnr, ssim):
        whole = metric(a, b)
        alone = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(whole, alone, rtol=1e-12, atol=0)
        torch.testing.assert_close(metric(a[order], b[order]), whole[order], rtol=1e-12, atol=0)


def test_both_fall_as_noise_grows() -> None:
    a = images(1, 64, 64)
    for metric in (psnr, ssim):
        values = [metric(a, noisy(a, scale)).item() for scale in (1, 3, 9, 27)]
        assert values == sorted(values, reverse=True)


def test_latent_error_of_a_scaled_and_of_a_shifted_latent() -> None:
    a = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    assert latent_error(a, 1.25 * a).tolist() == pytest.approx([0.25] * 4, rel=1e-6)
    assert latent_error(a, a).tolist() == [0.0] * 4
    assert latent_error(a, -a).tolist() == pytest.approx([2.0] * 4, rel=1e-12)
    shift = torch.zeros_like(a)
    shift[:, 0, 0, 0] = 3
    expected = (3 / a.double().flatten(1).norm(dim=1)).tolist()
    assert latent_error(a.double(), (a + shift).double()).tolist() == pytest.approx(expected, rel=1e-6)
    half = a.to(torch.bfloat16)
    assert latent_error(half * 1e30, half * 2e30).tolist() == pytest.approx(
        [1.0] * 4, rel=0.01
    )  # squares overflow float32


def test_summary_looks_in_the_bad_direction() -> None:
    x = torch.arange(101, dtype=torch.float64)
    low = summarise(x, better="lower")
    assert low == {"mean": 50.0, "median": 50.0, "p95": 95.0, "worst": [100, 99, 98, 97, 96, 95, 94, 93]}
    high = summarise(x, better="higher")
    assert high["p95"] == 5.0 and high["worst"] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert summarise([2.0])["worst"] == [0]
    assert summarise([1.0, 2.0, 4.0, 9.0])["median"] == 3.0


def test_summary_with_identical_pairs() -> None:
    got = summarise([math.inf, 30.0, math.inf, 40.0], better="higher")
    assert got["mean"] == 35.0 and got["median"] == math.inf and got["worst"] == [1, 3, 0, 2]
    assert got["p95"] == pytest.approx(31.5)
    same = summarise([math.inf] * 3, better="higher")
    assert same["mean"] == same["median"] == same["p95"] == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psnr(images().float(), images()), "first images must be uint8, not torch.float32.*to_uint8"),
        (lambda: ssim(images()[0], images()[0]), r"shape \(B, 3, H, W\); got \(3, 40, 56\)"),
        (lambda: psnr(images(2), images(3)), r"one shape; got \(2, 3, 40, 56\) and \(3, 3, 40, 56\)"),
        (lambda: psnr(images()[:, :1], images()[:, :1]), r"got \(3, 1, 40, 56\)"),
        (lambda: psnr(images()[:0], images()[:0]), r"got \(0, 3, 40, 56\)"),
        (lambda: ssim(images()[..., :10], images()[..., :10]), "window of 11x11 pixels, and the images are 10x40"),
        (lambda: latent_error(torch.ones(2, 3), torch.ones(2, 4)), "one shape"),
        (lambda: latent_error(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3)), "must be floats"),
        (lambda: latent_error(torch.zeros(2, 3), torch.ones(2, 3)), "Latents 0 of the baseline are all zero"),
        (lambda: latent_error(torch.ones(2, 3), torch.tensor([[1.0] * 3, [math.nan] * 3])), "1 of 2 second .* at 1"),
        (lambda: summarise([1.0, math.nan]), "1 of 2 values are NaN"),
        (lambda: summarise([]), "nothing to summarise"),
        (lambda: summarise([1.0], better="up"), "not 'up'"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiffAccelError, match=message):
        call()
