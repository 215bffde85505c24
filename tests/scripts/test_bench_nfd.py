"""The bench of next-frame diffusion, on a tiny model: which rows there are, and what they hold."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import bench_nfd

EXPECTED = {
    "speed": {"way", "steps", "fps", "draft"},
    "drafts": {"table", "cost", "discarded", "repeats"},
    "latency": {"p50", "p99", "stops_between_steps"},
    "fan": {"actions", "cost"},
    "decoder": {"way", "ms", "fps"},
    "long": {"tenth", "bytes", "captures"},
}


SLOW = ("decoder", "latency", "drafts")


@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EXPECTED]
)
def test_rows_and_record(section, tmp_path, monkeypatch, capsys):
    words = ["bench", "--rows", section, "--bed", "tiny", "--device", "cpu", "--frames", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(bench_nfd, "REPEATS", (0.5,))
    monkeypatch.setattr(bench_nfd, "COUNTS", (1, 2))
    monkeypatch.setattr(sys, "argv", words)
    assert bench_nfd.main() == 0
    record = json.loads((tmp_path / f"bench_nfd_{section}_cpu.json").read_text())
    keys = {key for row in record["rows"] for key in row}
    assert keys >= EXPECTED[section] and record["model"]["tokens"] == 4
    assert all(row["fps"] > 0 for row in record["rows"] if row.get("fps") is not None)
    assert "window 9" in capsys.readouterr().out
