"""Names of runs, prompts, metrics and files are text everywhere: no HTML, no markup, no control character."""

from __future__ import annotations

import io
import json
import re
import shlex

import pytest

from diffaccel.eval import report
from diffaccel.eval.comparison import compare_runs
from diffaccel.eval.comparison.row import Section
from diffaccel.eval.report import console, names
from tests.support import made_runs
from tests.support.report_rows import report as report_of
from tests.support.report_rows import score, speedup

EVIL = '<img src=x onerror="alert(1)">|`*_[a](javascript:x)\x1b[31m\x9b2J\u202e\ud800&amp;</style></script>'
PROMPTS = [f"{EVIL} {i}" for i in range(4)]
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    images = [made_runs.blocks(i) // 2 for i in range(4)]
    costs = [{"cost": {"seconds": s, "nfe": 8, "steps": [s / 2] * 2}, "device": {"name": EVIL}, "command": ["x", EVIL],
              "settings": {"prompts": [], "model": "emoji-flux", "negative": EVIL}} for s in (4.0, 2.0)]  # fmt: skip
    runs = [made_runs.of_images(folder / name, images, PROMPTS, cost) for name, cost in zip("ab", costs, strict=True)]
    base, changed = (type(run)(f"{EVIL}{i}", run.path, run.pictures, run.record) for i, run in enumerate(runs))
    comparison = compare_runs(base, [changed])
    comparison.sections.append(Section(key="k", title=EVIL, columns=("run", EVIL), rows=((EVIL, EVIL),), note=EVIL))
    comparison.warnings.append(EVIL)
    made = report.contents(comparison, ["diffaccel", EVIL])
    report.write_texts(made, folder, report.pictures.of_page(comparison, 2))
    return folder, made


def test_no_name_is_markup_of_the_page(written):
    page = (written[0] / "report.html").read_text()
    assert not CONTROL.search(page) and "<img src=x" not in page and 'onerror="' not in page
    assert page.count("</style>") == 1 and "<script" not in page and "</script>" not in page
    assert "&lt;img src=x onerror=" in page


def test_no_name_is_markup_of_the_markdown(written):
    text = (written[0] / "report.md").read_text()
    prose = re.sub(r"(?s)^(`{3,})\n.*?^\1$", "", text, flags=re.MULTILINE)
    assert not CONTROL.search(text) and "<" not in prose and "](" not in prose.replace("]\\(", "")
    for table in re.findall(r"(?:^\|.*\n)+", prose, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_no_name_reaches_the_terminal_raw(written):
    assert not CONTROL.search(console.text(written[1], io.StringIO()))
    drawn = console.text(written[1], Terminal())
    assert not CONTROL.search(re.sub("\x1b\\[[0-9;]*m", "", drawn)) and "\x1b[31m\x9b" not in drawn


def test_tables_in_csv_and_latex_hold_no_control_character(written):
    for name in ("report.csv", "report.tex"):
        assert not CONTROL.search((written[0] / name).read_text())


@pytest.mark.parametrize("word", ["ssim<0.5", "a b", "it's", "$(x)", "*", "plain", "two\nlines\tand 'x'\\n", "\x1b[0m"])
def test_commands_are_quoted_for_a_shell(word, tmp_path):
    import subprocess

    line = names.shell_line(["printf", "%s", word])
    assert "\n" not in line and not CONTROL.search(line)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == word


def test_a_rule_of_fail_if_can_be_pasted(written):
    made = report_of(score("x", -1.0, -2.0, -0.5), speedup("x", 2.0), command=["diffaccel", "--fail-if", "ssim<0.5"])
    report.write_texts(made, written[0] / "more", None)
    assert "diffaccel --fail-if 'ssim<0.5'" in (written[0] / "more" / "report.md").read_text()
    assert "--fail-if &#39;ssim&lt;0.5&#39;" in (written[0] / "more" / "report.html").read_text()
    assert shlex.split(names.shell_line(made["command"])) == made["command"]


def test_the_report_is_json(written):
    assert json.loads(json.dumps(written[1]))["baseline"].startswith("<img")
