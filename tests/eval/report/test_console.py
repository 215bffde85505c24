"""A report in a terminal: aligned, coloured and as wide as the terminal there; plain and never wrapped in a pipe."""

from __future__ import annotations

import io
import re

import pytest

from diffaccel.eval.report import console
from tests.support.report_rows import report, row, score, speedup

MADE = report(
    row("clip_score", "base", 80.0, low=79.0, high=81.0),
    score("fast", -0.27, -0.31, -0.22),
    score("faster", 0.5, 0.4, 0.6),
    speedup("fast", 1.75, 1.73, 1.77),
    warnings=["Look here."],
    sections={"more": {"title": "More", "columns": ["run", "none", "x"], "rows": [["fast", "", "1"]]}},
)
COLOUR = re.compile("\x1b\\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_pipe_gets_plain_aligned_columns():
    text = console.text(MADE, io.StringIO())
    assert "\x1b" not in text and "|" not in text and "Look here." in text
    runs = text.partition("\nRuns\n")[2].partition("\n\n")[0].splitlines()
    heads = [match.start() for match in re.finditer(r"\S+", runs[0])]
    assert [line[heads[2] :].split()[0] for line in runs[1:]] == ["worse", "better"]
    assert runs[1].startswith("  fast    1.75x (1.73 to 1.77)  worse")
    assert "none" not in text.partition("More")[2]  # a column without a cell


@pytest.mark.parametrize("columns", [60, 100])
def test_a_terminal_gets_tables_of_its_width_with_coloured_verdicts(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = console.text(MADE, Terminal())
    tables = COLOUR.sub("", text).partition("\nRuns\n")[2]
    assert max(map(len, tables.splitlines())) <= columns
    assert "\x1b[31mworse" in text and "\x1b[32mbetter" in text and "─" in text


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colours_where_the_terminal_has_none(monkeypatch, variable):
    monkeypatch.setenv(*variable)
    assert not re.search("\x1b\\[3\\d", console.text(MADE, Terminal()))
