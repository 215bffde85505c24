"""A promise is kept where the nearest end of every interval keeps it, and margins are in the gate's own tolerance."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffaccel.eval.comparison.gate import parse
from diffaccel.eval.tuning.certificate import certificate
from diffaccel.eval.tuning.rule import ERROR, Promise, Samples, read
from diffaccel.eval.uncertainty.intervals import bootstrap_mean

SSIM = {"ssim": 1.0, "lpips": 0.0, "psnr": math.inf, "seconds": 2.0}


def test_margins_go_from_the_baseline_to_the_limit():
    for value, margin in ((1.0, 1.0), (0.95, 0.5), (0.9, 0.0), (0.8, -1.0)):
        judged = Promise(parse("ssim<0.9"), SSIM).judge(Samples({"ssim": [value] * 12}))
        assert judged.margin == pytest.approx(margin) == pytest.approx(judged.safe)
        assert judged.keeps == (value >= 0.9)
    assert not Promise(parse("ssim<=0.9"), SSIM).judge(Samples({"ssim": [0.9] * 12})).keeps
    assert Promise(parse("lpips>0.2"), SSIM).judge(Samples({"lpips": [0.05] * 12})).margin == pytest.approx(0.75)


def test_the_end_of_the_harness_interval_decides():
    values = np.random.default_rng(0).normal(0.93, 0.02, 40)
    interval = bootstrap_mean(values)
    for limit, keeps in ((interval.low - 1e-6, True), (interval.low + 1e-6, False)):
        judged = Promise(parse(f"ssim<{limit:.9f}"), SSIM).judge(Samples({"ssim": values}))
        assert judged.keeps is keeps
        assert judged.readings["ssim"].low == interval.low
    assert judged.hopeful > judged.margin > 0 > judged.safe


def test_an_or_takes_no_correction_and_an_and_shares_the_error():
    either, both = parse("ssim<0.9 or lpips>0.1"), parse("ssim<0.9 and lpips>0.1")
    assert Promise(either, SSIM).level == 1 - ERROR
    assert Promise(both, SSIM).level == pytest.approx(1 - ERROR / 2)
    samples = Samples({"ssim": [0.8] * 12, "lpips": [0.05] * 12})
    assert not Promise(either, SSIM).judge(samples).keeps
    assert Promise(both, SSIM).judge(samples).keeps
    assert Promise(either, SSIM).judge(samples).margin == pytest.approx(-1)
    assert Promise(both, SSIM).judge(samples).margin == pytest.approx(0.5)


def test_psnr_of_equal_pictures_keeps_any_promise():
    promise = Promise(parse("psnr<30"), SSIM)
    assert promise.judge(Samples({"psnr": [math.inf] * 12})).keeps
    mixed = promise.judge(Samples({"psnr": [math.inf, *[20.0] * 11]}))
    assert not mixed.keeps and mixed.readings["psnr"].value == 20


def test_what_cannot_be_trusted_is_not_kept():
    one_ruined = [0.99] * 39 + [0.5]  # whose spread is that of one prompt
    assert not Promise(parse("ssim<0.5"), SSIM).judge(Samples({"ssim": one_ruined})).keeps
    assert "1 of 40" in read(Samples({"ssim": one_ruined}), "ssim").why
    assert not Promise(parse("ssim<0.5"), SSIM).judge(Samples({"ssim": [0.9]})).keeps
    timing = {"ratio": {"value": 2.0, "low": 1.9, "high": 2.1}, "baseline_seconds": 2.0}
    promise = Promise(parse("ssim<0.5"), SSIM)
    few = certificate(promise, promise, Samples({"ssim": [0.9, 0.91, 0.92]}), timing)
    assert not few["keeps"] and "too few" in few["why"]


def test_seconds_are_those_of_the_turns():
    promise = Promise(parse("seconds>1.04"), SSIM)
    timing = {"ratio": {"value": 2.0, "low": 1.9, "high": 2.1}, "baseline_seconds": 2.0}
    certified = certificate(promise, promise, Samples({"ssim": [0.9] * 12}, {"seconds": 0.1}), timing)
    assert certified["measures"]["seconds"] == pytest.approx({"value": 1.0, "low": 2 / 2.1, "high": 2 / 1.9})
    assert not certified["keeps"]  # 2 / 1.9 is above


def test_a_promise_at_the_limit_is_broken_in_at_most_five_of_a_hundred():
    """Whatever is certified of a plan whose true mean is the limit is wrong; the test errs as its level says."""
    generator = np.random.default_rng(1)
    promise = Promise(parse("ssim<0.9"), SSIM)
    wrong = sum(
        promise.judge(Samples({"ssim": 1 - 0.1 * np.exp(0.7 * generator.normal(size=32) - 0.245)})).keeps
        for _ in range(150)
    )
    assert wrong <= 150 * 0.05
