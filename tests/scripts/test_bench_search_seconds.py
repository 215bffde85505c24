"""The bench of searches at equal seconds: parts are joined in their order, and leads are those of pairs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffaccel.files import write_json
from scripts import bench_search_seconds as bench

SECONDS = {"network": 3.0, "decode": 0.5, "reward": 0.25, "engine": 0.25, "whole": 4.0}
NAMES = (bench.BEST_OF_N, bench.PAPER, bench.SEARCH, bench.DRAFTS)
LEADS = dict(zip(NAMES, (0.0, 0.5, 1.0, 2.0), strict=True))


def part(number: int, count: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(number)
    base = torch.rand(count, generator=generator).tolist()
    rows = {
        name: {
            "seconds": 0.1 + number, "nfe": 10.0, "judge": [score + lead for score in base],
            "reward": [lead] * count, "parts": SECONDS,
        }
        for name, lead in LEADS.items()
    }  # fmt: skip
    features = {name: torch.rand(count, 2, generator=generator) for name in (*NAMES, bench.TARGET)}
    features |= {f"{name}/judge": torch.rand(count, 4, generator=generator) for name in NAMES}
    texts = [f"prompt {number}.{i}" for i in range(count)]
    return {"part": number, "texts": texts, "rows": rows, "tensors": features}


def test_parts_are_joined(tmp_path: Path) -> None:
    chosen = {name: {"variant": name} for name in NAMES}
    write_json(tmp_path / "options.json", {"options": {}, "chosen": chosen})
    with pytest.raises(SystemExit, match="has no part yet"):
        bench.joined(tmp_path)
    for number, count in ((1, 10), (0, 30)):
        bench.write_part(tmp_path, part(number, count))
    record = bench.joined(tmp_path)
    assert record["parts"] == 2 and json.dumps(record)
    for row in record["rows"]:
        assert row["pictures"] == 40 and row["seconds"] == pytest.approx(0.1 + 10 / 40)
        assert row["share"] == {"network": 0.75, "decode": 0.125, "reward": 0.062, "engine": 0.062}
        lead = row[f"against {bench.BEST_OF_N}"]
        assert lead == ([LEADS[row["name"]]] * 3 if row["name"] != bench.BEST_OF_N else None)
        assert row["fd"] >= 0 and row["diversity"] is None
        assert bench.shown(row).startswith(f"| {row['name']} | 0.350 | 10 |")


def test_budgets_are_fitted_to_the_seconds() -> None:
    """Of a search whose calls take 0.02 s and 1 ms for each prediction."""
    asked: list[str] = []

    def draw(text: str, rows: Any) -> Any:
        asked.append(text)
        return None, 0.02 + 0.001 * float(text.rpartition("=")[2]), {}

    timed: Any = SimpleNamespace(args=SimpleNamespace(seconds=0.15, tries=4, steps=8), draw=draw)
    text, seconds = bench.Timed.fitted(timed, "bon:budget={budget:.0f}", [("x", 0)])
    assert 0.14 < seconds <= 0.15 * 1.02 and text.startswith("bon:budget=1")
    assert len(asked) <= 1 + 2 * 4
