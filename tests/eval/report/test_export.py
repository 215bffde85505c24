"""CSV and LaTeX of a report: all numbers come back, and whatever a name holds is text."""

from __future__ import annotations

import csv
import io
import re

from diffaccel.eval.report import export
from diffaccel.eval.report.names import latex_text
from tests.support.report_rows import report, row, score, speedup

MADE = report(
    row("clip_score", "base", 80.0, low=79.123456789012345, high=81.0),
    score("fast", -1 / 3, -0.5, -0.1, floor=0.1, floor_interval={"low": -0.2, "high": 1e-17}),
    row("psnr", "fast", None, family="fidelity", identical=True, unit="dB", key="PSNR"),
    row("fd", "fast", None, family="distribution", better="lower", key="FD-tiny@1a", missing='too few, "only" 6'),
    speedup("fast", 1.7512345678901234, 1.73, 1.77) | {"detail": {"from": "6 turns"}},
)


def test_every_number_of_the_report_comes_back_from_the_csv():
    lines = list(csv.DictReader(io.StringIO(export.csv_text(MADE))))
    assert len(lines) == len(MADE["metrics"])

    def number(text):
        return float(text) if text else None

    for line, entry in zip(lines, MADE["metrics"], strict=True):
        assert [line[name] for name in ("run", "metric", "key", "family", "better", "unit")] == [
            entry[name] for name in ("run", "metric", "key", "family", "better", "unit")
        ]
        assert [number(line[name]) for name in ("value", "delta", "floor", "n", "m")] == [
            entry[name] for name in ("value", "delta", "floor", "n", "m")
        ]
        for prefix in ("", "delta_", "floor_"):
            interval = entry.get(f"{prefix}interval") or {"low": None, "high": None}
            assert [number(line[f"{prefix}{end}"]) for end in ("low", "high")] == [interval["low"], interval["high"]]
        assert line["identical"] == str(entry["identical"]).lower() and line["missing"] == (entry["missing"] or "")
    assert lines[4]["note"] == "6 turns" and lines[3]["note"] == ""  # of the missing there is a column
    assert [line["verdict"] for line in lines] == ["", "worse", "same", "", "better"]


def test_a_name_is_no_formula_of_a_spreadsheet():
    text = export.csv_text(report(score("=cmd|x", -1.0, -2.0, -0.5), speedup("@a\nb\x1b", 2.0)))
    assert [line["run"] for line in csv.DictReader(io.StringIO(text))] == ["'=cmd|x", "'@a b\\x1b"]


def test_the_latex_table_has_intervals_and_a_line_for_every_run():
    text = export.latex_text(MADE)
    assert r"\toprule" in text and r"\bottomrule" in text and text.count(r" \\") == 3
    line = next(line for line in text.splitlines() if line.startswith("fast"))
    assert line.startswith(
        r"fast & 1.75x {\scriptsize [1.73, 1.77]} & $-0.33$ {\scriptsize [$-0.50$, $-0.10$]} & "
    ) and line.endswith(r"& same \\")
    assert r"clip\_score $\uparrow$" in text and "95\\,\\%" in text
    columns = {line.count("&") for line in text.splitlines() if line.endswith(r" \\")}
    spec = re.search(r"begin\{tabular\}\{(\w+)\}", text)[1]
    assert columns == {len(spec) - 1}


def test_latex_specials_are_escaped():
    escaped = latex_text("50% & $x_1$ #2 {a} ~ ^ \\input{x} <b> a|b [c]\x1b")
    bare = re.sub(r"\\(?:text\w+\{\}|[%&$_#{}])|\{[\[\]]\}", "", escaped)
    assert not re.search(r"[%&$_#{}~^\\<>|]", bare.replace("\\x1b", ""))
    assert r"50\% \& \$x\_1\$ \#2 \{a\}" in escaped and "\x1b" not in escaped
    text = export.latex_text(report(speedup("a_b & 100%", 2.0), baseline="b#1"))
    assert "a\\_b \\& 100\\% & 2.00x" in text and "b\\#1 & 1" in text
