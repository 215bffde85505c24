"""Patterns of real steps: what a record tells becomes a variant that any model repeats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.runs.variant import parse
from scripts import bench_pattern, bench_stages, stage_patterns

STAGED = "bottleneck+spectrum:steps=12,bottleneck.preset=speed,bottleneck.scales=[0.5,1],bottleneck.switches=[0.5]"


def test_a_run_s_real_steps_become_a_pattern_with_stages():
    pattern = stage_patterns.told(parse(STAGED), {"real_steps": {"cond": [0, 1, 4, 0, 3], "uncond": [0, 2]}})
    assert pattern.name == STAGED + ",spectrum.real_steps=[0,1,4,0,3]"
    stages = [{"scale": 0.5, "steps": 6, "real": [0, 1, 4]}, {"scale": 1.0, "steps": 6, "real": [0, 3]}]
    assert stage_patterns.described(parse(pattern.name)) == stages
    assert stage_patterns.told(parse("euler:steps=3"), {}).name == "euler:steps=3"
    assert stage_patterns.described(parse("euler:steps=3")) == [{"scale": 1.0, "steps": 3, "real": [0, 1, 2]}]
    caches = {"real_steps": {"cond": [0, 1, 4, 0, 3]}}
    planned = [{"steps": 6, "size": (8, 8)}, {"steps": 6, "size": (16, 16)}]
    assert bench_stages.real_steps(planned, caches) == [3, 2]
    bench_stages.check_pattern(stages, planned, caches)
    with pytest.raises(DiffAccelError, match="not those of the pattern"):
        bench_stages.check_pattern(stages, planned, {"real_steps": {"cond": [0, 1, 4, 0, 2]}})


def test_a_step_s_milliseconds_are_those_that_the_cache_timed():
    caches = {"real_calls": 2, "skipped_calls": 4, "real_seconds": 0.2, "skipped_seconds": 0.02}
    told = bench_stages.step_times(0.3, 0.25, 6, 2, caches)
    assert told == pytest.approx({"real_ms": 100, "skipped_ms": 5, "rest_ms": 80})
    told = bench_stages.step_times(0.3, 0.25, 6, 2, {"real_calls": 2, "skipped_calls": 4})
    assert (told["real_ms"], told["skipped_ms"], told["rest_ms"]) == (125, pytest.approx(12.5), None)
    assert bench_stages.step_times(0.3, 0.25, 6, 6, {})["rest_ms"] == pytest.approx(50)


def test_what_is_no_pattern_is_refused(tmp_path: Path):
    for text, message in (
        ("euler", "names no number of steps"),
        ("bottleneck:preset=speed,steps=9", "end where the model's own noise levels"),
        (STAGED + ",spectrum.real_steps=[0,1,0,1,0,1]", "for stages of"),
        (STAGED + ",spectrum.real_steps=[0,6]", "for stages of"),
    ):
        with pytest.raises(DiffAccelError, match=message):
            stage_patterns.described(parse(text))
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"targets": {"flux": {"chosen": {"variant": STAGED}}, "wan": {"chosen": None}}}))
    assert stage_patterns.read(file, "flux", 12).name == STAGED
    with pytest.raises(DiffAccelError, match=r"no pattern for 'wan'; it has some for \['flux'\]"):
        stage_patterns.read(file, "wan", 50)
    with pytest.raises(DiffAccelError, match="has 12 steps, and 'flux' makes 50"):
        stage_patterns.read(file, "flux", 50)


@pytest.mark.slow
def test_every_candidate_is_a_pattern_with_the_steps_of_its_model():
    for target, candidates in bench_pattern.CANDIDATES.items():
        steps = bench_stages.big_models.MODELS[target][1]
        for text in candidates:
            stages = stage_patterns.described(parse(text))
            assert sum(stage["steps"] for stage in stages) == parse(text).call["steps"] == steps, text


def test_the_loss_is_in_per_cent_and_the_first_that_surely_passes_is_chosen():
    loss = bench_pattern.loss_of([49.0] * 12, [50.0] * 12)
    assert (loss["loss"], loss["low"], loss["high"], loss["pictures"]) == (2.0, 2.0, 2.0, 12)
    entries = [{"candidate": name, "high": high} for name, high in (("a", 2.6), ("b", 2.5), ("c", 0.1))]
    assert bench_pattern.chosen_of(entries, 2.5)["candidate"] == "b"
    assert bench_pattern.chosen_of(entries[:1], 2.5) is None
