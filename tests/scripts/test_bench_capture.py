"""The bench of captured networks, on a tiny one: which rows there are, and which equal which to the bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import bench_capture
from tests.support.replayed_calls import replayed_calls

__all__ = ["replayed_calls"]  # a fixture


@pytest.mark.slow
@pytest.mark.usefixtures("replayed_calls")
def test_rows_and_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--case", "tiny", "--device", "cpu", "--steps", "2", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert bench_capture.main() == 0
    rows = json.loads((tmp_path / "bench_capture_tiny_cpu.json").read_text())["rows"]
    assert [row["way"].partition("(")[0] for row in rows] == [
        "eager", "Capture", "eager, channels_last", "eager, channels_last, cudnn.benchmark", "Capture", "eager again",
    ]  # fmt: skip
    assert all(row["network_equal"] and row["latents_equal"] for row in rows)
    assert rows[1]["graphs"]["replays"] > 10 and rows[1]["network_difference"] == {"largest": 0.0, "relative": 0.0}
    assert capsys.readouterr().out.count("equal") == 2 * len(rows)
