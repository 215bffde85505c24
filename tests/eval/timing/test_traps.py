"""What makes a speed-up look better than it is: warm-up, batches, parts left out, turns of one variant in a row."""

from __future__ import annotations

import pytest
import tiny
import torch

from diffaccel.eval.timing import turns as timing
from diffaccel.runs import profile
from diffaccel.runs import variant as variants
from diffaccel.runs.request import Request

REQUEST = Request(prompts=("a cat",), num=2, batch=2, steps=1, size=(32, 32), model="flux")
WORDS = ("plain:steps=2", "euler:steps=1")


@pytest.fixture
def pipe():
    return tiny.make("flux")


def test_warm_up_is_not_timed_and_turns_alternate(pipe, monkeypatch):
    calls = []

    def call(pipe, request, after_call=None, meter_seconds=0.0):
        calls.append(request)
        first = sum(one.steps == request.steps for one in calls) <= 3
        seconds = 100.0 if first else float(request.steps)
        cost = {"seconds": seconds, "parts": {"network": seconds}, "steps": [], "nfe": 2, "peak_memory": None}
        return {**cost, "metered": seconds}, None

    monkeypatch.setattr(timing, "one_call", call)
    found = timing.take_turns(pipe, REQUEST, [variants.parse(word) for word in WORDS], turns=4, warm_up=3)
    base, fast = found["variants"]
    assert base["seconds"] == [2.0] * 4 and fast["seconds"] == [1.0] * 4  # no call of 100 seconds
    assert base["first_call_seconds"] == 100 and fast["ratio"]["value"] == 2
    assert len(calls) == 2 * (3 + 4)
    assert all({one.steps for one in pair} == {1, 2} for pair in zip(calls[::2], calls[1::2], strict=True))
    assert {one.chunks()[0] == calls[0].chunks()[0] for one in calls} == {True}  # one batch, the same seeds
    assert len(calls[0].chunks()[0]) == 2


def test_every_variant_is_timed_from_prompt_to_picture(pipe):
    found = timing.take_turns(pipe, REQUEST, [variants.parse(word) for word in WORDS], turns=2, warm_up=1)
    for entry in found["variants"]:
        assert set(entry["parts"]) == set(profile.PARTS) and all(seconds > 0 for seconds in entry["parts"].values())
        assert min(entry["seconds"]) >= sum(entry["parts"].values()) / 2  # parts are medians of the same calls
    assert found["images_a_call"] == 2


def test_a_gpu_is_waited_for_before_the_clock_is_read(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            said.append("recorded")

        def elapsed_time(self, end):
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("waited"))
    clock = profile._Clock(torch.device("cuda"))
    start, end = clock.now(), clock.now()
    assert clock.between(start, end) == 1.5 and said == ["recorded"] * 2
    pipe = tiny.make("flux")
    monkeypatch.setattr(type(pipe), "device", torch.device("cuda"))
    monkeypatch.setattr(profile.time, "perf_counter", lambda: said.append("read") or 0.0)
    said.clear()
    with profile.measure(pipe):
        pass
    assert said == ["read", "waited", "read"]
