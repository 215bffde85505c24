"""A wish for a short time from an action to its frame: what was measured is told, and once where it is not met."""

from __future__ import annotations

import logging

import pytest
import torch

from diffaccel.samplers import NextFrameSampler
from diffaccel.samplers.nfd.latency import ENOUGH, LatencyWatch
from tests.support.worlds import tiny_world


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("diffaccel")]


def test_the_percentile_is_of_the_rounds_after_the_first(caplog):
    watch = LatencyWatch(10.0, 4)
    assert watch.p99 is None
    assert watch.note(1.0) == pytest.approx(1250)  # (4 + 1) steps of a fourth of a second
    for _ in range(3):
        assert watch.note(0.004) == pytest.approx(5)
    watch.tell()
    assert not told(caplog)  # the first one loads what all need, and counts where it is the only one
    for _ in range(ENOUGH):
        watch.note(0.02)
    watch.tell()
    watch.tell_of_steps(1.0)
    (text,) = told(caplog)
    assert "latency=10 ms was asked for" in text and "it takes 25 ms (p99 of the last 32 rounds, with 4 steps)" in text
    assert "draft=1" in text and "ask for 25 ms" in text


def test_no_wish_is_never_told_of(caplog):
    watch = LatencyWatch(None, 1)
    watch.note(5.0)
    watch.tell()
    assert not told(caplog)


@pytest.mark.parametrize("draft", [1, 2, "auto"])
def test_a_wish_that_cannot_be_met_is_told_once(draft, caplog):
    sampler = NextFrameSampler(tiny_world(torch.float32, window=3), 2, draft=draft, latency=1e-4)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            sampler.reset()
            stats = sampler.rollout([1, 1, 0]).stats.to_dict()
    assert stats["latency_asked"] == 1e-4 and stats["latency_p99"] > 1e-4
    (text,) = told(caplog)
    assert text.startswith("latency=0.0001 ms was asked for")
    assert ("measured before the video" in text) == (draft == "auto")


def test_a_wish_that_is_met_is_measured_and_not_told(caplog):
    sampler = NextFrameSampler(tiny_world(torch.float32, window=3), 1, draft=1, latency=1e6)
    sampler.reset()
    assert 0 < sampler.rollout([1, 1]).stats.latency_p99 < 1e6 and not told(caplog)
    plain = NextFrameSampler(tiny_world(torch.float32, window=3), 1, draft=1)
    plain.reset()
    plain.step(1)
    assert plain.stats.latency_p99 is None and plain.stats.latency_asked is None
