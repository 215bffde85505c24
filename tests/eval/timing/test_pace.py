"""Which calls of turns are left out on a CPU, what is left of them, and turns that go on where they were stopped."""

from __future__ import annotations

import json

import pytest
import tiny

from diffaccel.eval.timing import turns as timing
from diffaccel.eval.timing.pace import Pace, duration
from diffaccel.runs import variant as variants
from diffaccel.runs.request import Request

WAYS = [variants.parse(word) for word in ("plain:steps=2", "euler:steps=1", "heun:steps=9")]
REQUEST = Request(prompts=("a cat",), num=2, batch=2, steps=1, size=(32, 32), model="flux")
SECONDS = {2: 4.0, 1: 1.0, 9: 60.0}  # of a call, by its steps


@pytest.fixture(scope="module")
def pipe():
    return tiny.make("flux")


@pytest.fixture
def calls(monkeypatch):
    made = []

    def call(pipe, request, after_call=None, meter_seconds=0.0):
        made.append(request.steps)
        seconds = SECONDS[request.steps] + len(made) / 10_000
        cost = {"seconds": seconds, "parts": {"network": seconds}, "steps": [], "nfe": 2, "peak_memory": None}
        return {**cost, "metered": seconds}, None

    monkeypatch.setattr(timing, "one_call", call)
    return made


def test_a_slow_way_on_a_cpu_is_warmed_up_once_and_timed_in_two_turns(pipe, calls):
    said = []
    found = timing.take_turns(pipe, REQUEST, WAYS, turns=8, warm_up=3, spares=True, progress=said.append)
    base, fast, slow = found["variants"]
    assert [calls.count(steps) for steps in (2, 1, 9)] == [11, 11, 3]
    assert (len(slow["seconds"]), slow["turns"], slow["ratio"]["low"]) == (2, 2, None)
    assert slow["ratio"]["value"] == pytest.approx(4 / 60, rel=0.05) and fast["ratio"]["low"] > 3.5
    assert slow["first_call_seconds"] > 60 and len(base["seconds"]) == 8
    assert "turn 1 of 8, about 3 min left" in said and "  heun:steps=9, about 60 s" in said
    assert said[-1] == "turn 8 of 8"
    known = {way.name: SECONDS[way.call["steps"]] for way in WAYS}  # as they were drawn: a slow way needs no warm-up
    timing.take_turns(pipe, REQUEST, WAYS, turns=8, warm_up=3, spares=True, expected=known)
    assert [calls.count(steps) for steps in (2, 1, 9)] == [22, 22, 5]


def test_without_leave_nothing_is_left_out(pipe, calls):
    found = timing.take_turns(pipe, REQUEST, WAYS, turns=6, warm_up=2)
    assert [calls.count(steps) for steps in (2, 1, 9)] == [8, 8, 8] and found["variants"][2]["ratio"]["low"] is not None


def test_turns_that_were_stopped_go_on_with_the_next_one(pipe, calls):
    kept = []

    def keep(state):
        kept.append(json.loads(json.dumps(state)))
        if len(kept) == 4:
            raise KeyboardInterrupt

    options = {"turns": 8, "warm_up": 1, "spares": True}
    with pytest.raises(KeyboardInterrupt):
        timing.take_turns(pipe, REQUEST, WAYS, keep=keep, **options)
    before, told = len(calls), []
    found = timing.take_turns(pipe, REQUEST, WAYS, begun=kept[3], progress=told.append, **options)
    assert [entry["seconds"][:4] for entry in found["variants"][:2]] == [
        kept[3]["calls"][way.name]["seconds"] for way in WAYS[:2]
    ]
    assert [len(entry["seconds"]) for entry in found["variants"]] == [8, 8, 2]
    assert calls[before:].count(9) == 0 and len(calls) - before == 2 * (1 + 4)  # a warm-up, and the turns left
    assert told[1].startswith("turn 5 of 8")
    again = timing.take_turns(pipe, REQUEST, WAYS, begun={**kept[3], "turns": 4}, **{**options, "turns": 4})
    assert len(calls) - before == 10 and [len(entry["seconds"]) for entry in again["variants"]] == [4, 4, 2]


def test_what_is_left_is_known_from_runs_before_the_first_call():
    pace = Pace(["a", "b"], 10, 3, spares=False, expected={"a": 1.0, "b": 2.0})
    assert pace.left(-3) == 39.0 and pace.text(-3) == "warm-up 1 of 3, about 39 s left"
    assert Pace(["a", "b"], 10, 3, spares=False, expected={"a": 1.0}).text(-3) == "warm-up 1 of 3"
    assert (duration(89.4), duration(600), duration(3 * 3600 + 1200)) == ("89 s", "10 min", "3 h 20 min")
