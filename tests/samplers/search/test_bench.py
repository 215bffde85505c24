"""The table of a record by kind of prompt: which pictures belong to which, and what they are compared with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from diffaccel.eval.sets import prompts
from scripts import bench_search_kinds
from scripts.bench_search import UNSEEN, rows_of


def test_a_lead_is_told_by_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search that is ahead by the number of its kind, whatever the prompt is."""
    read = prompts.read("emoji-1000")
    kind_of = dict(zip(read.texts, read.categories, strict=True))
    texts = [text for text, _ in rows_of("emoji-1000", 4, 12, 2)]
    assert texts[::2] == texts[1::2] and [kind_of[text] for text in texts[:8:2]] == list(UNSEEN)
    base = [float(i % 5) for i in range(24)]
    ahead = [b + 1 + UNSEEN.index(kind_of[text]) for b, text in zip(base, texts, strict=True)]
    rows = [
        {"variant": "bon:budget=9", "pictures": 24, "scores": {"judge": base}},
        {"variant": "rbf", "pictures": 24, "scores": {"judge": ahead}, "against": "bon:budget=9"},
        {"variant": "rbf", "pictures": 2, "scores": {"judge": [0.0, 0.0]}, "against": "bon:budget=9"},
    ]
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"options": {"set": "emoji-1000", "skip": 4, "seeds": 2}, "rows": rows}))
    monkeypatch.setattr(sys, "argv", ["bench_search_kinds", str(file)])
    bench_search_kinds.main()
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 3
    cells = [cell.strip() for cell in told[2].strip("|").split("|")]
    assert cells[0] == "rbf" and cells[1].startswith("+2.50 (") and cells[1].endswith("n = 24")
    assert cells[2:] == [f"+{k}.00 (+{k}.00 to +{k}.00), n = 6" for k in (1, 2, 3, 4)]
