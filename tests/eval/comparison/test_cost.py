"""Rows and tables of cost, from records and timings whose numbers are known."""

from __future__ import annotations

import pytest

from diffaccel.eval.comparison import cost
from diffaccel.eval.sets.run import Run
from diffaccel.eval.uncertainty.intervals import median_ratio
from tests.support import made_runs

GIB = 2**30
DEVICE = {"type": "cuda", "name": "x"}


def entry(name, seconds, first, energy, peak, steps):
    parts = {"text": 0.2, "network": seconds - 0.8, "decode": 0.4}
    return {
        "name": name, "folder": name, "turns": 3, "seconds": [seconds, seconds + 0.1, seconds - 0.1],
        "seconds_per_image": seconds / 2, "first_call_seconds": first,
        "set_up_seconds": 0.25, "parts": parts, "steps": steps, "nfe": 4,
        "peak_memory": peak, "energy_joules": energy,
    }  # fmt: skip


@pytest.fixture
def sides(tmp_path):
    texts = ["a", "b"]
    images = [made_runs.blocks(i) for i in range(2)]
    record = {
        "seconds": 6.0, "nfe": 16, "forwards": 32, "peak_memory": 3 * GIB, "steps": [0.5] * 4,
        "parts": {"text": 1.0, "network": 4.0, "decode": 0.5},
    }  # fmt: skip
    base = made_runs.of_images(
        tmp_path / "base", images, texts, {"cost": record, "device": {"type": "cuda", "name": "x"}}
    )
    faster = {**record, "seconds": 3.0, "nfe": 8, "peak_memory": 2 * GIB, "parts": {}}
    fast = made_runs.of_images(
        tmp_path / "fast", images, texts, {"cost": faster, "device": {"type": "cuda", "name": "x"}}
    )
    return base, fast


@pytest.fixture
def timing():
    variants = [
        entry("base", 4.0, 9.0, 100.0, 4 * GIB, [0.8] * 4),
        entry("fast", 2.0, 2.05, 60.0, 3 * GIB, [0.6, 0.1]),
    ]
    return {"images_a_call": 2, "variants": variants}


def rows_of(base: Run, fast: Run, timing=None):
    return {(row.metric, row.run): row for row in cost.rows(base, [fast], timing)}


@pytest.mark.parametrize("seconds", [0.0, 0.0002])
def test_runs_too_short_for_their_own_clock_have_no_speed_up(sides, seconds):
    """A record keeps seconds to 0.0001: a function that returns at once was called twice as fast, or divided by 0."""
    for short, long in (sides, sides[::-1]):
        whole = short.record["cost"]
        short.record["cost"] = {**whole, "seconds": seconds}
        row = rows_of(*sides)["speedup", "fast"]
        assert row.value is None and "too short for a ratio by the runs' own clocks" in row.missing
        short.record["cost"] = whole
        assert rows_of(*sides)["speedup", "fast"].value == pytest.approx(2) and long.record["cost"]


def test_a_search_that_was_resumed_has_no_cost_of_the_whole(sides):
    """The process that ended it knows its own seconds only, so they are missing, and why; NFE are of the whole."""
    base, fast = sides
    for resumed, other in ((fast, base), (base, fast)):
        resumed.record["cost"]["resumed"] = {"nfe": 5}
        rows = rows_of(base, fast)
        for metric in ("seconds", "forwards", "peak_memory"):
            row = rows[metric, resumed.name]
            assert row.value is None and "stopped after 5 of its NFE" in row.missing
            assert rows[metric, other.name].value is not None and rows[metric, other.name].delta is None
        assert "stopped after 5" in rows["speedup", "fast"].missing
        assert rows["nfe", resumed.name].value == resumed.record["cost"]["nfe"] / 2
        lines = {line[0]: line for line in cost.section(base, [fast], None).rows}
        assert "stopped after 5" in lines[resumed.name][-1] and not any(lines[resumed.name][1:-1])
        del resumed.record["cost"]["resumed"]
    base.record["cost"]["resumed"] = {"nfe": 5}
    variants = [entry(name, 2.0, 3.0, 1.0, GIB, [1]) for name in ("base", "fast")]
    rows = rows_of(base, fast, {"images_a_call": 2, "variants": variants})
    assert rows["seconds", "base"].value == 1.0  # measured in turns


def test_rows_of_the_runs_themselves(sides):
    rows = rows_of(*sides)
    assert (
        rows["seconds", "fast"].value == 1.5
        and rows["speedup", "fast"].value == 2
        and not rows["speedup", "fast"].interval
    )
    assert rows["nfe", "fast"].value == 4 and rows["nfe", "fast"].delta == -4 and rows["nfe", "fast"].key == "NFE"
    assert rows["peak_memory", "base"].value == 3 and rows["peak_memory", "fast"].delta == -1
    assert ("energy", "base") not in rows and ("first_call", "base") not in rows


def test_six_turns_have_an_interval(sides, timing):
    for variant in timing["variants"]:
        variant |= {"turns": 6, "seconds": [seconds + i / 100 for i in range(2) for seconds in variant["seconds"]]}
    row = rows_of(*sides, timing)["speedup", "fast"]
    expected = median_ratio(*(variant["seconds"] for variant in timing["variants"])).interval
    seconds = rows_of(*sides, timing)["seconds", "fast"]
    assert seconds.interval.low < seconds.value == 1.0 < seconds.interval.high and seconds.interval.null is None
    assert row.interval == expected and row.detail["significant"] is True and row.detail["turns"] == 6


@pytest.mark.parametrize("turns", [3, 4])
def test_a_few_turns_say_why_they_have_no_interval(sides, timing, turns):
    for variant in timing["variants"]:
        variant |= {"turns": turns, "seconds": [variant["seconds"][0] * (1 + i / 100) for i in range(turns)]}
    for metric in ("seconds", "speedup"):
        row = rows_of(*sides, timing)[metric, "fast"]
        assert row.interval is None and row.detail["from"] == "turns on one machine, too few for an interval (6)"


def test_rows_of_turns(sides, timing):
    rows = rows_of(*sides, timing)
    assert rows["seconds", "base"].value == 2.0 and rows["speedup", "fast"].value == 2.0
    assert rows["speedup", "fast"].interval is None  # of three turns
    assert rows["peak_memory", "base"].value == 4 and rows["peak_memory", "fast"].delta == -1
    assert rows["energy", "fast"].value == 60 and rows["energy", "fast"].delta == -40
    assert rows["first_call", "base"].value == 9 and rows["first_call", "fast"].delta == pytest.approx(-6.95)
    assert rows["set_up", "fast"].value == 0.25 and rows["set_up", "fast"].delta == 0
    timing["variants"].pop()  # one side alone was timed: no difference between two ways of measuring
    alone = rows_of(*sides, timing)
    assert alone["peak_memory", "base"].value == 4 and alone["peak_memory", "fast"].value == 2
    assert alone["peak_memory", "fast"].delta is None and ("speedup", "fast") not in alone
    assert ("energy", "base") in alone and ("energy", "fast") not in alone


def test_a_ratio_is_to_the_baseline_whichever_variant_was_timed_first(sides, timing):
    base, fast = sides
    assert rows_of(fast, base, timing)["speedup", "base"].value == 0.5
    timing["variants"] = [entry("slow", 8.0, 9.0, 100.0, GIB, []), *timing["variants"]]
    assert rows_of(base, fast, timing)["speedup", "fast"].value == 2.0


def test_a_run_of_any_name_is_timed_by_the_variant_that_drew_it(sides, timing):
    ways = [
        {"model": "m", "methods": [{"name": name}], "steps": 4, "size": [8, 8], "guidance": 1.0, "negative": None}
        for name in ("slow", "quick")
    ]
    for run, one, way in zip(sides, timing["variants"], ways, strict=True):
        run.record["settings"] = {"seed": 0, **way}
        one.update(name=way["methods"][0]["name"], folder="x", drawn=dict(way))
    assert rows_of(*sides, timing)["speedup", "fast"].value == 2.0
    assert cost.timing_warnings(sides, timing) == []
    timing["variants"][1]["drawn"]["steps"] = 5
    rows = rows_of(*sides, timing)
    assert ("speedup", "fast") not in rows and rows["seconds", "fast"].detail["from"] == cost.OWN
    assert cost.timing_warnings(sides, timing) == [
        "No variant of the timing drew fast: it has slow, quick. Their seconds are the runs' own."
    ]
    assert cost.timing_warnings(sides, None) == []


def test_a_twin_of_the_baseline_has_no_ratio_that_nobody_measured(sides, timing):
    base, _ = sides
    way = {"model": "m", "methods": [], "steps": 4, "size": [8, 8], "guidance": 1.0, "negative": None}
    base.record["settings"] = dict(way)
    timing["variants"][0] |= {"drawn": way}
    twin = Run("twin", base.path, base.pictures, base.record)
    rows = rows_of(base, twin, timing)
    speedup = rows["speedup", "twin"]
    assert speedup.value is None and speedup.interval is None and "timed once for both" in speedup.missing
    assert rows["seconds", "twin"].value == rows["seconds", "base"].value


def test_cost_rows_count_what_was_measured(sides, timing):
    base, fast = sides
    for run in sides:
        run.record["settings"] = {"batch": 5}
    rows = rows_of(base, fast, timing)
    counts = {metric: (row.n, row.detail.get("batch")) for (metric, run), row in rows.items() if run == "fast"}
    assert counts["seconds"] == counts["speedup"] == counts["peak_memory"] == counts["energy"] == (3, 2)
    assert counts["first_call"] == counts["set_up"] == (1, 2) and counts["nfe"] == (2, None)
    own = rows_of(base, fast)
    assert own["seconds", "fast"].n == 2 and own["seconds", "fast"].detail["batch"] == 2  # never filled
    section = cost.section(base, [fast], timing)
    assert "2 to a call of the turns" in section.note and section.data["images_a_call"] == 2


def test_where_the_time_goes(sides, timing):
    base, fast = sides
    section = cost.section(base, [fast], timing)
    of = section.data["runs"]
    assert of["base"]["text"] == 0.1 and of["base"]["network"] == pytest.approx(1.6) and of["base"]["decode"] == 0.2
    assert of["base"]["other"] == pytest.approx(2.0 - 1.9) and of["base"]["calls"] == 4
    assert of["base"]["one_off"] == pytest.approx(5) and not of["base"]["noise"]
    assert of["base"]["set_up"] == 0.25 and "250.0" in section.rows[0]
    assert of["fast"]["noise"]  # 0.05 s where turns differ by 0.2 s
    assert section.rows[0][:3] == ("base", "100.0", "1600.0") and "not shown" in section.rows[1]
    own = cost.section(base, [fast], None)
    assert list(own.data["runs"]) == ["base"] and own.data["runs"]["base"]["other"] == pytest.approx(0.25)
    assert cost.section(fast, [fast], None) is None


def test_steps_are_those_of_turns_where_there_are_some(sides, timing):
    base, fast = sides
    assert cost.steps(base, timing) == [0.8] * 4 and cost.steps(base, None) == [0.5] * 4
    assert cost.steps(fast, timing) == [0.6, 0.1]
    assert cost.steps(Run("x", base.path, base.pictures), None) == []
