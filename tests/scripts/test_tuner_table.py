"""The table of tunings: intervals, promises and cliffs in closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scripts import tuner_table
from scripts.bench_tuner_emoji import pattern


def part(seed: int, tuner: list[float], rival: list[float], aim: str = "keep") -> dict[str, Any]:
    def way(plan: str, ssim: list[float]) -> dict[str, Any]:
        cliffs = ["Cliff: x loses 3 times."] if seed == 0 else ["No cliff: none."]
        return {"plan": plan, "certified": True, "evaluations": 100, "truth": {"ssim": ssim}, "cliffs": cliffs}

    return {
        "aim": aim, "seed": seed, "options": {"fail_if": "ssim<0.9"}, "device": {}, "versions": {}, "date": "",
        "ways": {"tuner": way("a", tuner), "caches alone": way("b", rival)},
        "turns": {"plain": {"seconds": 4.0}, "a": {"seconds": 1.0}, "b": {"seconds": 2.0}},
    }  # fmt: skip


def test_the_interval_is_student_s():
    mean, low, high = tuner_table.interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert mean == 2.5 and (low, high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)
    assert tuner_table.interval([1.0]) is None


def test_leads_promises_and_cliffs(tmp_path: Path):
    parts = [part(0, [0.96, 0.85], [0.9, 0.9]), part(1, [0.95, 0.97], [0.9, 0.9]), part(2, [0.9, 0.88], [0.8, 0.8])]
    for entry in parts:
        (tmp_path / f"keep-{entry['seed']:03d}.json").write_text(json.dumps(entry))
    assert [tuner_table.holds(entry, "tuner") for entry in parts] == [True, True, False]
    rows = {way: tuner_table.row(parts, way, "keep") for way in ("tuner", "caches alone")}
    assert (rows["tuner"]["holds"], rows["tuner"]["beside_a_cliff"], rows["tuner"]["speed"]) == (2, 1, pytest.approx(4))
    ahead = rows["caches alone"]["tuner_ahead"]["ssim"]
    assert ahead == pytest.approx(tuner_table.interval([0.005, 0.06, 0.09]))
    assert rows["caches alone"]["tuner_faster"] == pytest.approx([2.0, 2.0, 2.0])
    assert tuner_table.join(tmp_path, tmp_path / "out", None) == 0  # 2 of 3 where 37 of 40 are asked for
    for seed in range(3, 6):
        (tmp_path / f"keep-{seed:03d}.json").write_text(json.dumps(part(seed, [0.5, 0.5], [0.9, 0.9])))
    assert tuner_table.join(tmp_path, tmp_path / "out", None) == 1
    record = json.loads((tmp_path / "out" / "bench_tuner_emoji-flux_keep_cpu.json").read_text())
    assert len(record["tunings"]) == 6 and record["rows"][0]["holds"] == 2


def test_an_annealed_set_is_a_plan():
    plan = pattern(frozenset({3, 0, 1}), 8)
    assert plan.name == "taylorseer:steps=8,payload=last,real_steps=[0,1,3]" or plan.methods[0].real_steps == (0, 1, 3)
    assert plan.methods[0].payload == "last" and plan.call == {"steps": 8}
