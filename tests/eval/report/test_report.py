"""The report's words, marks and pictures: what is in it, what must not be, and that one page is enough."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from diffaccel.eval import report
from diffaccel.eval.comparison import compare_runs, text
from diffaccel.eval.comparison.row import Section
from diffaccel.eval.report import charts, pictures
from tests.support import made_runs

PROMPTS = ["a <b>cat</b>", "a | pipe", 'a "quoted" fish', "a house & a tree"]
TABLE = Section(
    key="more", title="More <things>", columns=("run", "a|b", "words"), note="Read <this>.",
    rows=(("changed", "1.5", "x & y|z"), ("base", "", "none")), data={"numbers": [1.5]},
)  # fmt: skip


@pytest.fixture
def comparison(tmp_path):
    images = [made_runs.blocks(i) // 2 for i in range(4)]
    costs = [{"cost": {"seconds": s, "nfe": 8, "steps": steps}, "device": {"name": "cpu"}, "settings": {"prompts": []}}
             for s, steps in ((4.0, [0.5] * 8), (2.0, [0.5, 0.5, 0.1, 0.1]))]  # fmt: skip
    base = made_runs.of_images(tmp_path / "base", images, PROMPTS, costs[0])
    changed = made_runs.of_images(tmp_path / "changed", [x + 9 * i for i, x in enumerate(images)], PROMPTS, costs[1])
    found = compare_runs(base, [changed])
    found.sections.append(TABLE)
    found.warnings.append("Look <here>.")
    return found


class Page(HTMLParser):
    """The tags of a page, checked for their ends."""

    VOID = frozenset({"meta", "img", "br", "line"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_sections_are_in_all_three_files(comparison, tmp_path):
    made = report.write(comparison, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["sections"]["more"] == {
        **TABLE.to_dict(),
        "columns": ["run", "a|b", "words"],
        "rows": [list(r) for r in TABLE.rows],
    }
    assert made["sections"]["more"]["numbers"] == [1.5]
    markdown = (tmp_path / "report.md").read_text()
    assert "## More <things>\n\n| run | a\\|b | words |\n|---|---|---|\n| changed | 1.5 | x & y\\|z |" in markdown
    page = (tmp_path / "report.html").read_text()
    assert "<h2>More &lt;things&gt;</h2>" in page and "<td>1.5</td>" in page and "Read &lt;this&gt;." in page
    assert "Look &lt;here&gt;." in page and "x &amp; y|z" in page
    assert "More <things>" in comparison.table()


def test_the_page_stands_alone_and_is_whole(comparison, tmp_path):
    report.write(comparison, tmp_path)
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert page.open == [] and not page.of("script") and not page.of("link")
    images = page.of("img")
    assert len(images) == 12 and all(i["alt"] and i["src"].startswith("data:image/webp;base64,") for i in images)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.of("svg"))
    assert "a &lt;b&gt;cat&lt;/b&gt;" in source and "<b>cat" not in source
    assert not re.search(r"url\(|@import|https?://", source)
    for scheme in ("prefers-color-scheme: dark", "@media print"):
        assert scheme in source
    used = set(re.findall(r"var\((--\w+)\)", source))
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in source.split("prefers-color-scheme: dark")[:2])
    assert used <= light == dark


def test_many_pictures_are_left_out_of_a_page_that_would_be_too_large(comparison, tmp_path, monkeypatch):
    report.write(comparison, tmp_path)
    whole = len((tmp_path / "report.html").read_bytes())
    monkeypatch.setattr(report, "LARGEST", whole - 1)
    report.write(comparison, tmp_path, pairs=4)
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.of("img")) == 6 and len((tmp_path / "report.html").read_bytes()) < whole


def test_the_table_goes_metric_by_metric(comparison):
    other = [type(row)(**{**vars(row), "run": "another"}) for row in comparison.rows if row.run == "changed"]
    comparison.rows += other
    for _, lines in text.table(comparison):
        metrics = [line.metric for line in lines]
        assert [m for i, m in enumerate(metrics) if i == 0 or metrics[i - 1] != m] == list(dict.fromkeys(metrics))


def test_steps_say_what_is_short_and_what_is_missing(comparison):
    base, changed = charts.steps(comparison)
    assert base["summary"] == "8 calls, 4.000 s" and not any(bar["short"] for bar in base["bars"])
    assert [bar["short"] for bar in changed["bars"]] == [False, False, True, True]
    summary = changed["summary"]
    assert summary.startswith("4 calls, 1.200 s; 2 of them under a third") and "4 fewer" in summary
    assert changed["bars"][2]["height"] == 20
    assert charts.short_calls([9.0, 1.0, 1.0, 1.0]) == set()  # a slow first call is a warm-up
    assert charts.short_calls([1.0]) == set()


def test_names_of_near_points_do_not_touch():
    points = [(1.0, 0.5, "one"), (1.0, 0.5, "two"), (1.01, 0.5001, "three"), (2.0, 0.9, "far")]
    drawn = charts.quality_plot("ssim", "higher", points).points
    boxes = []
    for point in drawn:
        width = charts.LETTER * len(point["name"])
        start = point["label_x"] - (width if point["left"] else 0)
        boxes.append((start, start + width, point["label_y"]))
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            apart = one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= charts.LINE
            assert apart, (one, other)


def test_the_worst_pairs_come_first_and_differences_are_amplified(comparison):
    gallery = pictures.gallery(comparison, comparison.runs[0], 4)
    assert gallery["metric"] == "PSNR" and gallery["pairs"][0]["worst"] and gallery["pairs"][0]["seed"] == 3
    assert "PSNR" in gallery["pairs"][0]["measured"] and "SSIM" in gallery["pairs"][0]["measured"]
    grey = torch.full((3, 16, 16), 45, dtype=torch.uint8)  # 9 levels times 5
    shown = next(pair for pair in gallery["pairs"] if pair["seed"] == 1)
    assert shown["images"][2] == pictures.inline(grey.new_full((3, 32, 32), 45)) and shown["small"]
