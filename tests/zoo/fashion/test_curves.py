"""Curves of distance against pictures: when a distance is reached; one command trains both ways, and goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from fashion_data import make_data

from scripts.zoo.fashion import curves, job


def test_a_distance_is_reached_at_the_first_point_that_is_not_above_it() -> None:
    rows = curves.reached({"3": {"sim": [[0, 9.0], [10, 3.0], [20, 1.0]], "tscd-sim": [[0, 9.0], [4, 3.5], [8, 1.1]]}})
    found = {row["fd"]: (row["sim"], row["tscd-sim"]) for row in rows}
    assert found == {4.0: (10, 4), 2.0: (20, 8), 1.5: (20, 8), 1.2: (20, 8), 1.0: (20, None)}
    made = {
        "device": {"name": "cpu"},
        "drawn_of_each": 5,
        "floor": 0.1,
        "reached": rows,
        "curves": {"3": {"sim": [[0, 9.0]]}},
    }
    assert "| 3 | 4.000 | 10 | 4 | 0.40 |" in curves.shown(made) and "| never |" in curves.shown(made)


@pytest.mark.slow
def test_both_ways_are_trained_from_one_seed_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = make_data(tmp_path / "data")
    common = ["--recipe", "tiny", "--data", pictures, "--work", tmp_path / "work", "--device", "cpu"]

    def call(command: object, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["x", *map(str, arguments)])
        command()  # type: ignore[operator]
        return capsys.readouterr().out

    own = [*common, "--out", tmp_path / "out", "--pictures", 80, "--every", 20, "--looked", 20]
    with pytest.raises(SystemExit, match="has no finished teacher"):
        call(curves.main, *own)
    call(job.main, *common, "--out", tmp_path / "jobs", "--minutes", 2, "--stages", "classifier,teacher")
    assert "goes on in the next call" in call(curves.main, *own, "--minutes", 0)
    told = call(curves.main, *own)
    made = json.loads((tmp_path / "out" / "fashion-curves_cpu.json").read_text())
    ways = made["curves"]["0"]
    assert [n for n, _ in ways["sim"]] == [0, 20, 40, 60, 80] and [n for n, _ in ways["tscd-sim"]] == [
        0,
        20,
        40,
        60,
        80,
    ]
    assert ways["sim"][0] == ways["tscd-sim"][0] and "sim-1step-0 is finished" in told
    assert (tmp_path / "out" / "fashion-curves_cpu.png").stat().st_size > 1000
    call(curves.main, *own)
    assert json.loads((tmp_path / "out" / "fashion-curves_cpu.json").read_text())["curves"] == made["curves"]
