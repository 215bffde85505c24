"""The simulation of tunings: its truths are those of the population."""

from __future__ import annotations

import pytest

from scripts import bench_tuner
from scripts.tuner_bed import STEPS, ToyBed


@pytest.mark.slow
def test_every_plan_of_the_space_is_there_once_and_the_truth_decides():
    plans = [plan.name for plan in bench_tuner.plans()]
    assert len(plans) == len(set(plans)) == 11 * (1 + 6 + 4 * 3) * (1 + 5) * (1 + 3)
    bed = ToyBed(3)
    slow, fast = bed.baseline(), bench_tuner.Variant((), {"steps": STEPS // 4})
    assert bench_tuner.speed(bed, fast) == pytest.approx(1.1 / 0.35) and bed.loss(slow) == 0
    bed.loss = lambda plan: 0.2 if plan is fast else 0.0
    row = bench_tuner.summarise("both", [(bed, slow), (bed, fast)], [2.0, 2.0])
    assert (row["holds"], row["baseline"], row["speed"], row["of best"]) == (1, 1, 1.0, 0.5)


@pytest.mark.slow
def test_the_promises_of_a_few_tunings_hold():
    rows = {row["way"]: row for row in bench_tuner.simulate(5)}
    assert rows["tuner"]["holds"] == 5
    assert rows["tuner"]["of best"] > rows["methods as they come"]["of best"]
    value, low, high = rows["methods as they come"]["tuner faster"]
    assert value == pytest.approx(rows["tuner"]["speed"] / rows["methods as they come"]["speed"])
    assert low < value < high and "tuner faster" not in rows["tuner"]
