"""Verdicts on the front, with scores whose differences and intervals are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffaccel.files import write_json
from scripts import equal_seconds_grid, pareto_front
from scripts.bench_equal_seconds import CHOICES, kept_seconds, make_parser


def row(text: str, seconds: float, score: list[float]) -> dict[str, Any]:
    return {"variant": text, "seconds": {"loop": seconds}, "ssim": score, "lpips": [1 - value for value in score]}


BASE = [0.5 + 0.01 * (i % 7) for i in range(40)]
ROWS = [
    row("euler:steps=4", 1.0, BASE),
    row("bottleneck:preset=speed,steps=6", 2.0, [value + 0.1 for value in BASE]),  # by .1, surely
    row(
        "euler+taylorseer:steps=8", 3.0, [value + 0.05 for value in BASE]
    ),  # slower and surely worse than the one before
    row(
        "euler+spectrum:steps=8", 4.0, [v + 0.1 + (0.05 if i % 2 else -0.05) for i, v in enumerate(BASE)]
    ),  # mean 0 apart
    row("euler:steps=50", 9.0, [value + 0.4 for value in BASE]),
]


@pytest.mark.parametrize("score", ["ssim", "lpips"])
def test_verdicts_by_differences_that_are_known(score: str):
    told = [pareto_front.verdict(entry, ROWS, score) for entry in ROWS]
    assert [entry["verdict"] for entry in told] == ["on", "on", "off", "open", "on"]
    assert told[0]["rival"] is None
    assert told[1]["lead"] == pytest.approx([0.1, 0.1, 0.1]) and told[1]["rival"] == "euler:steps=4"
    assert told[2]["lead"] == pytest.approx([-0.05] * 3) and told[2]["rival"] == ROWS[1]["variant"]
    value, low, high = told[3]["lead"]
    assert value == pytest.approx(0, abs=1e-4) and low < 0 < high and told[3]["rival"] == ROWS[1]["variant"]
    assert told[4]["rival"] == ROWS[3]["variant"]


def test_a_verdict_of_off_is_widened_for_the_number_of_rivals():
    """One rival that is barely surely better is so no more when it is one of many."""
    noise = [0.0112 if i % 2 else -0.0088 for i in range(400)]  # mean .0012, with a t value of 2.4
    slow = row("euler:steps=9", 2.0, BASE * 10)
    rival = row("euler:steps=8", 1.0, [value + n for value, n in zip(BASE * 10, noise, strict=True)])
    assert pareto_front.verdict(slow, [slow, rival], "ssim")["verdict"] == "off"
    worse = [row(f"euler:steps={n}", 0.5, [value - 0.2 for value in BASE * 10]) for n in range(1, 8)]
    assert pareto_front.verdict(slow, [slow, rival, *worse], "ssim")["verdict"] == "open"


def test_families_and_what_none_of_a_family_beats():
    assert [pareto_front.family(entry["variant"]) for entry in ROWS] == [
        "euler",
        "speed",
        "taylorseer",
        "spectrum",
        "euler",
    ]
    mix = "bottleneck+seacache:bottleneck.preset=speed,bottleneck.noise=fresh,steps=8"
    assert pareto_front.family(mix) == "speed, fresh noise + seacache"
    slower = row("bottleneck:preset=speed,steps=8", 2.5, [value + 0.09 for value in BASE])
    faster = row("bottleneck:preset=speed,steps=5", 1.5, BASE)
    kept = pareto_front.unbeaten([ROWS[1], slower, faster], "ssim")
    assert kept == [faster["variant"], ROWS[1]["variant"]]
    assert "fresh" in pareto_front.shown(pareto_front.fronts([row(mix, 1.0, BASE)], ["ssim"], "loop"))


@pytest.mark.slow
def test_every_option_of_the_grid_is_a_variant_of_a_family():
    texts = [text for texts in equal_seconds_grid.SETS.values() for text in texts]
    families = {pareto_front.family(text) for text in texts}
    assert {"speed", "lightx2v", "selflift-zero", "bottleneck", "spectrum", "firstblock", "cache_dit"} <= families
    assert set(CHOICES) <= vars(make_parser().parse_args([])).keys()


def test_times_of_a_stopped_comparison_are_kept_only_where_all_variants_had_their_turn(tmp_path: Path):
    values = {"options": {}, "kind": "k", "device": {}, "versions": {}, "timing_batch": 4, "turns": 1}
    before = {**values, "seconds": {"euler:steps=4": {"loop": 1.0, "whole": 2.0}}, "left_out": ["euler+absent:steps=4"]}
    file = tmp_path / "before.json"
    assert kept_seconds(file, values, ["a"]) == {}
    write_json(file, before)
    assert kept_seconds(file, values, ["euler:steps=4", "euler+absent:steps=4"]) == before["seconds"]
    assert kept_seconds(file, values, ["euler:steps=4", "euler:steps=8"]) == {}
    assert kept_seconds(file, {**values, "turns": 2}, ["euler:steps=4"]) == {}
