"""The report's words, marks and pictures: what is in it, what must not be, and that one page is enough."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffaccel.errors import DiffAccelError
from diffaccel.eval import report
from diffaccel.eval.comparison import compare_runs
from diffaccel.eval.comparison.row import Section
from diffaccel.eval.report import call_times, console, pictures, remake, tables
from diffaccel.eval.report.page import html_text
from tests.support import made_runs

ROOT = Path(__file__).parents[3]
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

    VOID = frozenset({"meta", "img", "br", "line", "rect"})

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
    (tmp_path / ".report.md.0123abcd.tmp").write_text("of a process that was killed")
    (tmp_path / ".report.md.mine.tmp").write_text("theirs")
    made = report.write(comparison, tmp_path)
    assert [file.name for file in tmp_path.glob(".*")] == [".report.md.mine.tmp"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["sections"]["more"] == {
        **TABLE.to_dict(),
        "columns": ["run", "a|b", "words"],
        "rows": [list(r) for r in TABLE.rows],
    }
    assert made["sections"]["more"]["numbers"] == [1.5]
    markdown = (tmp_path / "report.md").read_text()
    heads = "| run | a\\|b | words |\n|---|---|---|"
    assert f"## More &lt;things&gt;\n\n{heads}\n| changed | 1.5 | x &amp; y\\|z |" in markdown
    page = (tmp_path / "report.html").read_text()
    assert "<h2>More &lt;things&gt;</h2>" in page and '<span class="number">1.5</span></td>' in page
    assert "Read &lt;this&gt;." in page
    assert "Look &lt;here&gt;." in page and "x &amp; y|z" in page
    assert "More <things>" in comparison.table() and "More <things>" in console.text(made, io.StringIO())


def test_the_page_stands_alone_and_is_whole(comparison, tmp_path):
    report.write(comparison, tmp_path)
    source = (tmp_path / "report.html").read_text()
    page = Page(source)
    assert page.open == [] and not page.of("script") and not page.of("link")
    images = page.of("img")
    assert len(images) == 12 + 8  # pairs with their differences, and a strip of four prompts
    assert all(i["alt"] and i["src"].startswith("data:image/webp;base64,") for i in images)
    assert all(int(i["width"]) == int(i["height"]) == 32 for i in images)  # a lazy picture moves nothing
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in page.of("svg"))
    assert "a &lt;b&gt;cat&lt;/b&gt;" in source and "<b>cat" not in source
    assert not re.search(r"url\(|@import|https?://", source)
    for scheme in ("prefers-color-scheme: dark", "@media print"):
        assert scheme in source
    used = set(re.findall(r"var\((--\w+)\)", source))
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in source.split("prefers-color-scheme: dark")[:2])
    assert used <= light == dark
    assert "max-width: 44rem" in source  # on a phone rows are cards, and every cell says what it is
    cells = [cell for cell in page.of("td") if "none" not in (cell.get("class") or "")]
    assert len(cells) > 20 and all(cell.get("data-label") for cell in cells)


def test_many_pictures_are_left_out_of_a_page_that_would_be_too_large(comparison, tmp_path, monkeypatch):
    report.write(comparison, tmp_path)
    whole = len((tmp_path / "report.html").read_bytes())
    monkeypatch.setattr(report, "LARGEST", whole - 1)
    report.write(comparison, tmp_path, pairs=4)
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.of("img")) == 6 + 8 and len((tmp_path / "report.html").read_bytes()) < whole


def test_a_phone_shows_what_other_seeds_do(comparison):
    """Heads of columns are hidden there, so that cells must have what stands in them."""
    made = report.contents(comparison)
    for row in made["metrics"]:
        if row["metric"] == "ssim":
            row |= {"floor": 0.25, "floor_interval": {"low": 0.125, "high": 0.5}}
    text = html_text(made)
    assert text.count('<small class="narrow">other seeds 0.2500 (0.1250 to 0.5000)</small>') == len(comparison.runs)


def test_the_full_table_goes_metric_by_metric(comparison):
    comparison.rows += [replace(row, run="another") for row in comparison.rows if row.run == "changed"]
    for table in tables.full_tables(report.contents(comparison)):
        metrics = [line[1] for line in table.rows]
        assert [m for i, m in enumerate(metrics) if i == 0 or metrics[i - 1] != m] == list(dict.fromkeys(metrics))


def test_steps_say_what_is_short_and_what_is_missing(comparison):
    base, changed = call_times.steps(report.contents(comparison))
    assert base["summary"] == "8 calls, 4.000 s" and not any(bar["short"] for bar in base["bars"])
    assert [bar["short"] for bar in changed["bars"]] == [False, False, True, True]
    summary = changed["summary"]
    assert summary.startswith("4 calls, 1.200 s; 2 of them under a third") and "4 fewer" in summary
    assert changed["bars"][2]["height"] == 20
    assert call_times.short_calls([9.0, 1.0, 1.0, 1.0]) == set()  # a slow first call is a warm-up
    assert call_times.short_calls([1.0]) == set()


def test_the_worst_pairs_come_first_and_differences_are_amplified(comparison):
    gallery = pictures.gallery(comparison, comparison.runs[0], 4)
    assert gallery["metric"] == "PSNR" and gallery["pairs"][0]["worst"] and gallery["pairs"][0]["seed"] == 3
    assert "PSNR" in gallery["pairs"][0]["measured"] and "SSIM" in gallery["pairs"][0]["measured"]
    grey = torch.full((3, 16, 16), 45, dtype=torch.uint8)  # 9 levels times 5
    shown = next(pair for pair in gallery["pairs"] if pair["seed"] == 1)
    image = Image.fromarray(grey.new_full((32, 32, 3), 45).numpy())
    assert shown["images"][2] == {"src": pictures.inline(image), "width": 32, "height": 32, "small": True}


def test_the_strip_shows_the_same_prompts_of_every_run(comparison):
    strip = pictures.strip(comparison, 3)
    assert strip["prompts"] == [PROMPTS[0], PROMPTS[2], PROMPTS[3]] and strip["left_out"] == []
    assert [line["run"] for line in strip["runs"]] == ["base", "changed"]
    place = dict(comparison.pairs["changed"])
    changed = comparison.runs[0].image(place[2])
    image = Image.fromarray(changed.permute(1, 2, 0).contiguous().numpy())
    assert strip["runs"][1]["pictures"][1]["src"] == pictures.inline(image)


def test_a_report_is_made_anew_without_measuring(comparison, tmp_path):
    report.write(comparison, tmp_path)
    names = ("report.html", "report.md", "report.csv", "report.tex")
    before = [(tmp_path / name).read_text() for name in names]
    for name in names:
        (tmp_path / name).unlink()
    remake.remake(tmp_path / "report.json")
    assert [(tmp_path / name).read_text() for name in names] == before
    (tmp_path / "pictures.json").unlink()
    remake.remake(tmp_path, tmp_path / "other")
    assert "<img" not in (tmp_path / "other" / "report.html").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        {"runs": [{}]}, {"baseline": None}, {"sections": {"x": {"title": "y"}}}, {"steps": "x"},
        {"steps": {"a": ["x"]}}, {"sections": {"x": {"title": "y", "columns": ["a"], "rows": [[]]}}},
        {"curves": {"PSNR": {"a": ["x"]}}}, {"curves": {"PSNR": 1}}, {"credits": {"a": True}},
        {"runs": [{"name": "a", "images": 1, "settings": {}, "device": 3}]}, {"runs": []}, {"sections": None},
    ],
)  # fmt: skip
def test_a_damaged_report_is_one_sentence(comparison, tmp_path, damage):
    report.write(comparison, tmp_path)
    whole = json.loads((tmp_path / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps(whole | damage))
    with pytest.raises(DiffAccelError, match="is damaged"):
        remake.remake(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"strip": {"prompts": [], "runs": []}}'])
def test_damaged_pictures_are_one_sentence(comparison, tmp_path, content):
    report.write(comparison, tmp_path)
    (tmp_path / "pictures.json").write_text(content)
    with pytest.raises(DiffAccelError, match=r"pictures\.json' (are damaged|cannot be read)"):
        remake.remake(tmp_path)


def test_the_page_of_a_report_of_an_older_version():
    """A committed report of an earlier version: fields that it lacks are left out."""
    remade = json.loads((ROOT / "docs/results/report_emoji-flux_steps/report.json").read_text())
    page = Page(html_text(remade))
    assert page.open == [] and len(page.of("svg")) > 4
