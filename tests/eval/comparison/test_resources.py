"""Energy and peak memory of a report, from turns whose readings are known, and from records without them."""

from __future__ import annotations

import csv
import io
import sys
import types

import pytest
import tiny
import torch

from diffaccel.eval.comparison import cost, verdict
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.report import contents, export
from diffaccel.eval.report.tables import full_tables
from diffaccel.eval.timing import turns
from diffaccel.eval.timing.turns import check_timing
from diffaccel.eval.uncertainty.turns import mean_difference, mean_of_turns, ratio_of_means
from diffaccel.runs import chunk, energy
from diffaccel.runs import variant as variants
from diffaccel.runs.cost import total_cost
from diffaccel.runs.request import Request
from tests.support import made_runs

GIB = 2**30
JOULES = {
    "base": [10.0, 12.0, 11.0, 9.0, 10.0, 8.0, 10.0, 12.0, 9.0, 9.0],
    "fast": [5.0, 6.0, 5.0, 5.0] * 2 + [4.0, 4.0],
}


def entry(name, joules, peaks, count, seconds):
    return {
        "name": name, "folder": name, "turns": count, "seconds": [seconds] * count, "seconds_per_image": seconds / 2,
        "first_call_seconds": 2.0, "set_up_seconds": 0.1, "parts": {}, "steps": [0.1],
        "peak_memory": max(peaks[:count]), "peaks": peaks[:count],
        "energy_joules": sum(joules[:count]) / count / 2, "joules": joules[:count],
    }  # fmt: skip


def timing_of(count, seconds=1.0):
    variants = [
        entry("base", JOULES["base"], [4 * GIB] * 10, count, seconds),
        entry("fast", JOULES["fast"], [3 * GIB] * 9 + [2 * GIB], count, seconds),
    ]
    return {"images_a_call": 2, "turns": count, "device": {"type": "cuda"}, "variants": variants}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder, images = tmp_path_factory.mktemp("runs"), [made_runs.blocks(i) for i in range(2)]
    own = {"seconds": 6.0, "nfe": 16, "joules": 8.0, "peak_memory": 3 * GIB}
    chunks = [{"chunk": i, "cost": {"peak_memory": (3 if i else 2) * GIB}} for i in range(6)]
    record = {"cost": own, "device": {"type": "cuda", "name": "x"}, "chunks": chunks}
    return [made_runs.of_images(folder / name, images, ["a", "b"], record) for name in ("base", "fast")]


def rows_of(runs, timing):
    base, fast = runs
    return {(row.metric, row.run): row for row in cost.rows(base, [fast], timing)}


def test_energy_has_intervals_of_its_turns(runs):
    rows = rows_of(runs, check_timing(timing_of(10, 3.0), "t.json"))
    base, fast, ratio = rows["energy", "base"], rows["energy", "fast"], rows["energy_ratio", "fast"]
    assert base.value == 5.0 and fast.value == 2.5 and fast.delta == -2.5 and ratio.value == pytest.approx(0.5)
    mean, apart = mean_of_turns(JOULES["base"]), mean_difference(JOULES["fast"], JOULES["base"])
    assert (base.interval.low, base.interval.high) == pytest.approx((mean.low / 2, mean.high / 2))  # of a picture
    assert (fast.delta_interval.low, fast.delta_interval.high) == pytest.approx((apart.low / 2, apart.high / 2))
    assert ratio.interval == ratio_of_means(JOULES["fast"], JOULES["base"]).interval and ratio.n == 10
    assert [verdict.word(row.to_dict()) for row in (base, fast, ratio)] == ["", "better", "better"]
    assert ("energy_ratio", "base") not in rows


def test_peak_memory_has_the_range_of_its_turns(runs):
    rows = rows_of(runs, timing_of(10))
    base, fast = rows["peak_memory", "base"], rows["peak_memory", "fast"]
    assert (base.interval.low, base.interval.high, base.detail["from"]) == (4, 4, "the same in all 10 turns")
    assert (fast.value, fast.interval.low, fast.interval.high) == (3, 2, 3) and "with their range" in fast.detail[
        "from"
    ]
    assert (fast.delta, fast.delta_interval.low, fast.delta_interval.high) == (-1, -2, -1)
    assert verdict.word(fast.to_dict()) == "better"


def test_few_turns_say_so_and_six_long_ones_give_a_ratio_only(runs):
    rows = rows_of(runs, timing_of(5))
    assert all(rows[metric, "fast"].interval is None for metric in ("energy", "energy_ratio", "peak_memory"))
    assert "5 turns, too few for an interval (6)" in rows["energy", "fast"].detail["from"]
    assert verdict.word(rows["energy_ratio", "fast"].to_dict()) == verdict.NOT_SHOWN
    short = rows_of(runs, timing_of(10))
    assert all(short[metric, "fast"].interval is None for metric in ("energy", "energy_ratio"))
    assert short["energy", "fast"].delta_interval is None
    assert "under 2 s are short beside the meter's tick" in short["energy", "fast"].detail["from"]
    repeated = timing_of(10)
    for one in repeated["variants"]:
        one["metered_seconds"] = 3.0  # of several calls in a turn
    assert all(rows_of(runs, repeated)[metric, "fast"].interval for metric in ("energy", "energy_ratio"))
    assert "(6)" in rows_of(runs, timing_of(5, 3.0))["energy", "fast"].detail["from"]
    rows = rows_of(runs, timing_of(6, 3.0))
    assert rows["energy_ratio", "fast"].interval and rows["energy", "fast"].interval
    assert rows["energy", "fast"].delta_interval is None  # differences need ten


def test_a_timing_without_readings_of_its_turns_is_still_read(runs):
    timing = timing_of(10)
    for one in timing["variants"]:
        del one["joules"], one["peaks"]
    rows = rows_of(runs, check_timing(timing, "t.json"))
    assert rows["energy", "fast"].delta == -2.5 and rows["energy", "fast"].interval is None
    assert "without its turns: no interval" in rows["energy", "fast"].detail["from"]
    assert (
        rows["peak_memory", "fast"].delta == -1 and "range was not kept" in rows["peak_memory", "fast"].detail["from"]
    )
    assert ("energy_ratio", "fast") not in rows


def test_runs_of_their_own_have_the_range_of_their_calls_and_energy_without_an_interval(runs):
    rows = rows_of(runs, None)
    memory, used = rows["peak_memory", "fast"], rows["energy", "fast"]
    assert (memory.value, memory.interval.low, memory.interval.high, memory.n) == (3, 2, 3, 6)
    assert used.value == 4 and used.interval is None and used.detail["from"] == "NVML, the run itself, not in turns"
    runs[1].record["device"] = {"type": "cpu"}
    memory = rows_of(runs, None)["peak_memory", "fast"]
    assert memory.interval is None and memory.detail["from"].startswith("of the whole process")
    runs[1].record["device"] = {"type": "cuda", "name": "x"}


def test_a_twin_of_the_baseline_has_no_difference_that_nobody_measured(runs):
    timing = timing_of(10)
    timing["variants"][0]["folder"] = "fast"
    del timing["variants"][1]
    rows = rows_of(runs, timing)
    assert rows["energy", "fast"].delta is None and ("energy_ratio", "fast") not in rows
    assert rows["peak_memory", "fast"].delta is None and rows["peak_memory", "fast"].delta_interval is None


def test_every_form_of_the_report_has_the_same_ends(runs):
    base, fast = runs
    comparison = Comparison(
        baseline=base, runs=[fast], pairs={}, rows=cost.rows(base, [fast], timing_of(10, 3.0)), values={}
    )
    report = contents(comparison)
    row = next(row for row in report["metrics"] if row["metric"] == "energy_ratio")
    low, high = row["interval"]["low"], row["interval"]["high"]
    line = next(r for r in csv.DictReader(io.StringIO(export.csv_text(report))) if r["metric"] == "energy_ratio")
    assert (float(line["low"]), float(line["high"]), line["verdict"]) == (low, high, "better")
    ends = f"{low:.3f} to {high:.3f}"
    assert any(cells[3] == ends for table in full_tables(report) for cells in table.rows) and ends in comparison.table()
    latex = export.latex_text(report)
    assert f"0.500x {{\\scriptsize [{low:.3f}, {high:.3f}]}}" in latex
    assert len({text.count("&") for text in latex.splitlines() if text.endswith(r" \\")}) == 1
    assert "energy" not in comparison.table().split("95 % intervals")[0]  # the sentence is of quality and speed


def test_turns_read_a_meter_around_every_call(monkeypatch):
    readings = iter(range(0, 10**6, 7))
    call_cost = {"seconds": 3.0, "parts": {"network": 1.0}, "steps": [], "nfe": 2, "peak_memory": GIB}
    monkeypatch.setattr(turns, "joules", lambda device: float(next(readings)))
    monkeypatch.setattr(turns, "generate_chunk", lambda *call: ([], dict(call_cost), None))
    request = Request(prompts=("a cat",), num=2, batch=2, steps=1, size=(32, 32), model="flux")
    words = ("plain:steps=1", "euler:steps=1")
    found = turns.take_turns(tiny.make("flux"), request, [variants.parse(word) for word in words], turns=6, warm_up=1)
    for one in found["variants"]:
        assert one["joules"] == [7.0] * 6 and one["energy_joules"] == 3.5 and one["peaks"] == [GIB] * 6
    ratio = found["variants"][1]["energy_ratio"]
    assert ratio["value"] == 1 and ratio["low"] < 1 < ratio["high"] and not ratio["significant"]  # of ticks


def test_a_short_call_is_repeated_until_the_meter_has_moved_often_enough(monkeypatch):
    readings, clock = iter((5.0, 12.0)), iter(range(100))  # a second between two looks at the clock
    cost = {"seconds": 1.0, "parts": {"network": 1.0}, "steps": [], "nfe": 2, "peak_memory": None}
    drawn = []
    monkeypatch.setattr(turns, "joules", lambda device: next(readings))
    monkeypatch.setattr(turns, "time", types.SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(turns, "generate_chunk", lambda *call: drawn.append(call) or ([], dict(cost), None))
    request = Request(prompts=("a cat",), steps=1, size=(32, 32), model="flux")
    measured, joules = turns.one_call(tiny.make("flux"), request, meter_seconds=4.0)
    assert len(drawn) == 4 and joules == 7 / 4 and measured["metered"] == 5 and measured["seconds"] == 1


def test_a_run_adds_up_the_energy_of_its_calls(monkeypatch):
    readings = iter((5.0, 9.0))
    monkeypatch.setattr(chunk, "joules", lambda device: next(readings))
    request = Request(prompts=("a cat",), steps=1, size=(32, 32), model="flux")
    pipe = tiny.make("flux")
    measured, _ = turns.one_call(pipe, request)
    assert measured["joules"] == 4.0
    assert total_cost([measured, {**measured, "joules": 2.0}])["joules"] == 6.0
    assert "joules" not in total_cost([measured, {key: value for key, value in measured.items() if key != "joules"}])


def test_the_meter_is_the_card_of_the_device_whatever_cards_are_hidden(monkeypatch):
    asked = []
    meter = types.SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: asked.append(uuid) or uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 2500,
    )
    monkeypatch.setitem(sys.modules, "pynvml", meter)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"card-{index}"))
    assert energy.joules(torch.device("cuda", 0)) == 2.5 and energy.joules(torch.device("cuda")) == 2.5
    assert asked == ["GPU-card-0", "GPU-card-1"] and energy.joules(torch.device("cpu")) is None
    monkeypatch.setattr(meter, "nvmlInit", lambda: 1 / 0)
    assert energy.joules(torch.device("cuda", 0)) is None
