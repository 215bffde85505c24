"""What a tuning says: of a budget that is too small, of plans that are not faster, of equal pictures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.tuning import certificate
from diffaccel.eval.tuning.halving import PlanEntry, Sizes
from diffaccel.eval.tuning.journal import FILE, Journal
from diffaccel.eval.tuning.result import Tuned, row
from diffaccel.eval.tuning.sizes import least_seconds, sizes_of
from scripts.tuner_bed import ToyBed, search_on, tuning_on

SIZES = Sizes((4, 8), bracket=4, held_out=12, search=1.0, turns=6)


def test_a_budget_that_cannot_be_kept_is_told_before_and_after() -> None:
    """The smallest tuning draws its 6 and 12 prompts whatever the budget is."""
    small, large = (least_seconds(sizes_of(budget, 1.4, 1000), 1.4) for budget in (10, 1800))
    assert 10 < 60 < small < 200 and large < 1800
    preset: dict[str, Any] = {"default": "baseline", "points": {}, "failed": {}, "cliffs": []}
    for spent, told in ((64.1, True), (9.9, False)):
        tuned = Tuned(Path("preset.json"), preset | {"search": {"spent": spent, "budget": 10.0}})
        assert ("It took 64 s, more than its budget of 10 s." in tuned.sentences()) is told
    assert Tuned(Path("preset.json"), preset | {"search": {"spent": 64.1}}).sentences()  # of an earlier version


def test_equal_pictures_have_a_row_in_json(tmp_path: Path) -> None:
    """Their PSNR is infinite, which JSON has not; the search ended in an error where one plan drew such."""
    bed = ToyBed(1)
    bed.baseline_values = lambda: {"psnr": math.inf, "seconds": 1.0, "speedup": 1.0}  # type: ignore[method-assign]
    search = search_on(bed, tmp_path, SIZES, rule="psnr<30")
    part = {"values": {"psnr": [math.inf] * 4}, "cost": {}, "ratio": 2.0, "count": 4}
    values = json.loads(json.dumps(row(search, PlanEntry({}, bed.baseline(), [part])), allow_nan=False))
    assert values["keeps"] and values["loss"] == 0 and values["measures"] == {"psnr": [None, None, None]}


def test_a_plan_that_is_not_surely_faster_is_told_with_its_interval(tmp_path: Path) -> None:
    bed = ToyBed(1)
    search = search_on(bed, tmp_path, SIZES)
    entry = PlanEntry({}, bed.baseline())
    ratio = {"value": 1.25, "low": 0.9, "high": 1.6}
    bed.take_turns = lambda *args: {  # type: ignore[method-assign]
        "plans": {entry.name: {"seconds": 1.0, "ratio": ratio}}, "baseline": 1.25, "spent": 1.0
    }  # fmt: skip
    told = certificate.certify(search, {"fast": entry})["fast"]
    assert not told["keeps"] and told["why"] == "in turns it is not surely faster: 1.25 times as fast (0.90 to 1.60)"


def test_a_journal_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(DiffAccelError, match="is no journal of a tuning, or a damaged one"):
        Journal(tmp_path, {})


def test_every_line_of_an_edited_journal_is_told_by_name(tmp_path: Path) -> None:
    """Valid JSON without what the reader asks for, or with another kind of it."""
    bed, path, key = ToyBed(1), tmp_path / FILE, "drift:steps=20 on tuning-0-4"
    sizes = Sizes((4,), bracket=2, held_out=4, search=1.0, turns=6)
    tuning_on(search_on(bed, tmp_path, sizes))
    whole = path.read_text()
    edits = [
        ('"op_code":0,', "", "is no journal of a tuning.*'op_code' is missing"),
        ('"study_id":0,"user_attr"', '"user_attr"', "is no journal of a tuning.*'study_id' is missing"),
        ('"settings":{', '"other":{', "a tuning: settings"),
        (f'"{key}":{{', f'"{key}":3,"x":{{', "is no journal of a tuning"),
        ('"values":{"ssim":', '"values":{"psnr":', f"a tuning: {key}.values.ssim"),
        ('"values":{"ssim":[', '"values":{"ssim":[0.9,', f"a tuning: {key}.values.ssim"),
        ('"nfe":20.0', '"nfe":"x"', f"a tuning: {key}.cost.nfe"),
        ('"ratio":', '"ratios":', f"a tuning: {key}.ratio"),
        ('"spent":', '"spent":"x","was":', f"a tuning: {key}.spent"),
        ('"brackets":1', '"brackets":null', "a tuning: brackets"),
        ('"low":null', '"low":1', r"a tuning: turns of the shortlist.plans\..*\.ratio"),
        ('"seconds":0.', '"second":0.', r"a tuning: turns of the shortlist.plans\..*\.seconds"),
        ('"plans":{', '"plans":{},"was":{', r"a tuning: turns of the shortlist.plans\."),
        ('"chosen":{', '"chosen":7,"was":{', "no journal of a tuning"),
        ('"user_attrs":{"bracket":0', '"user_attrs":{"bracket":"x"', "a tuning: trial 0.bracket"),
        ('"params":{', '"params":{},"was":{', r"a tuning: trial 0.params \("),
        ('"state":1,"values":[', '"state":1,"values":[1,', "a tuning: trial 0.values"),
        (
            '"system_attr":{',
            '"system_attr":{"constraints:promise":[]},"was":{',
            "a tuning: trial 0.constraints:promise",
        ),
    ]
    for old, new, told in edits:
        assert old in whole, old
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(DiffAccelError, match=told):
            tuning_on(search_on(bed, tmp_path, sizes))
