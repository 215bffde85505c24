"""What the table of kills compares: bytes, but for dates and costs."""

from __future__ import annotations

import json
from pathlib import Path

from scripts import bench_kills


def test_dates_and_costs_are_left_out_and_nothing_else(tmp_path: Path) -> None:
    kept = {"images": [{"sha256": "a", "seed": 1}], "chunks": [{"chunk": 0}]}
    for name, seconds in (("one", 1.0), ("two", 2.0)):
        folder = tmp_path / name
        folder.mkdir()
        chunks = [{"chunk": 0, "cost": {"seconds": seconds}}]
        timed = {"started": seconds, "finished": seconds, "made": seconds, "cost": {"nfe": seconds}}
        (folder / "run.json").write_text(json.dumps({**kept, **timed, "chunks": chunks}))
        (folder / "report.md").write_text(f"made 2026-11-0{seconds:.0f}T10:00:00+00:00, 4 pictures")
        (folder / "00000.png").write_bytes(b"same")
    one, two = (bench_kills.contents(tmp_path / name) for name in ("one", "two"))
    assert sorted(one) == ["00000.png", "report.md", "run.json"]
    assert bench_kills.differing(one, two) == []
    assert json.loads(one["run.json"]) == kept
    (tmp_path / "two" / ".00000.png.0123abcd.tmp").write_bytes(b"left")
    (tmp_path / "two" / "00000.png").write_bytes(b"other")
    (tmp_path / "two" / "run.json").write_text(json.dumps({**kept, "images": [{"sha256": "b", "seed": 1}]}))
    two = bench_kills.contents(tmp_path / "two")
    assert bench_kills.differing(one, two) == [".00000.png.0123abcd.tmp", "00000.png", "run.json"]
