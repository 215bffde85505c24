"""The demo on a tiny pipeline: what it writes, that its numbers are the runs' own, and that the page stands alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
from PIL import Image

from diffaccel import zoo
from scripts.demo import page as demo
from scripts.demo.page import DemoVariant, default_variants, findings, run_demo

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "samplers.md"
PROMPTS = ("a red apple", "<b>two</b> & a half cats")
CHOSEN = (DemoVariant(None, 3), DemoVariant("euler", 3), DemoVariant("heun", 3), DemoVariant("dpmpp2m", 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    tiny.make("flux").save_pretrained(root / "model")
    arguments = {"model": str(root / "model"), "prompts": PROMPTS, "variants": CHOSEN, "size": (32, 48)}
    arguments["guidance"] = 3.0
    return root / "out", run_demo(root / "out", progress=False, **arguments), arguments


@pytest.mark.slow
def test_files_and_record(made):
    out, record, _ = made
    assert json.loads((out / "record.json").read_text()) == record
    assert {path.name for path in out.iterdir()} == {
        "record.json", "index.html", "contact_sheet.png", *(variant.name for variant in CHOSEN),
    }  # fmt: skip
    rows = {row["name"]: row for row in record["variants"]}
    assert [rows[v.name]["nfe"] for v in CHOSEN] == [3, 3, 5, 1]
    assert [rows[v.name]["forwards"] for v in CHOSEN] == [6, 6, 10, 2]
    assert rows["plain-3"]["identical"] and rows["euler-3"]["identical"] and rows["euler-3"]["difference"] == 0
    assert not rows["heun-3"]["identical"] and rows["heun-3"]["difference"] > 0
    for row in record["variants"]:
        run = json.loads((out / row["name"] / "run.json").read_text())
        assert row["seconds"] == round(run["cost"]["seconds"] / len(PROMPTS), 3)
        assert [image["seed"] for image in row["images"]] == [0, 1]
        assert all((out / image["file"]).is_file() for image in row["images"])
    assert Image.open(out / "contact_sheet.png").width > len(CHOSEN) * 128


@pytest.mark.slow
def test_page_stands_alone(made):
    text = (made[0] / "index.html").read_text()
    assert text.count("data:image/png;base64,") == len(CHOSEN) * len(PROMPTS)
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text and "<script" not in text
    assert "&lt;b&gt;two&lt;/b&gt; &amp; a half cats" in text and "<b>two" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


@pytest.mark.slow
def test_a_second_call_uses_what_is_there(made, monkeypatch):
    out, record, arguments = made
    before = {path: path.stat().st_mtime_ns for path in out.rglob("0*.png")}
    again = run_demo(out, progress=False, **arguments)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["variants"] == record["variants"]


@pytest.mark.slow
def test_the_page_shows_one_ratio_with_its_range(made):
    out, record, _ = made
    page = (out / "index.html").read_text()
    rows = page[page.index("<tbody>") : page.index("</tbody>")].split("<tr>")[1:]
    for row, shown in zip(record["variants"], rows, strict=True):
        assert row["turns"] == 1 and row["speedup_range"][0] <= row["speedup"] <= row["speedup_range"][1]
        ratio = f"{row['speedup']:.2f}×"
        spread = f"{row['speedup_range'][0]:.2f} to {row['speedup_range'][1]:.2f}"
        is_base = row is record["variants"][0]
        assert (ratio in shown, spread in shown, " s an image" in shown) == (not is_base, not is_base, is_base)
    heads = re.findall(r"<th>(.*?)</th>", page[page.index("<thead>") : page.index("</thead>")])
    labels = [re.findall(r'<td data-label="(.*?)">', shown) for shown in rows]  # on a phone rows are cards
    assert labels == [["time", *heads[2:]], *[heads[1:]] * (len(rows) - 1)]


@pytest.mark.slow
def test_every_variant_is_warm_before_it_is_timed(made, tmp_path, monkeypatch):
    calls = []
    generate = demo.generate_run
    monkeypatch.setattr(demo, "generate_run", lambda *a, **k: calls.append("digest" in k) or generate(*a, **k))
    run_demo(tmp_path, progress=False, **{**made[2], "prompts": ("a cat",)})
    assert calls == [False] * len(CHOSEN) + [True] * len(CHOSEN)


@pytest.mark.skipif("emoji-flux" not in zoo.names(), reason="no trained weights are in this checkout")
def test_its_prompts_are_what_training_showed_and_its_art_has_credits():
    vocabulary = zoo.vocabulary_of("emoji-flux")
    assert vocabulary.unknown(demo.PROMPTS) == {}
    unseen = {f"{label}, {style}" for label, style in vocabulary.unseen_styles.items()}
    assert not unseen & {*demo.PROMPTS}
    assert any("Twemoji" in line and "CC-BY 4.0" in line for line in demo.credit_lines("emoji-flux"))
    assert demo.credit_lines("./folder") == []


def test_credits_and_notes_are_on_page_and_sheet(made):
    out, record, _ = made
    shown = demo.page(out, {**record, "note": "some <word>", "credits": ["Art (c) A", "Art (c) B"]})
    assert "Note: some &lt;word&gt;" in shown and "Art (c) A<br>" in shown and "Art (c) B" in shown
    plain = demo.contact_sheet(out, PROMPTS, record["variants"], [])
    assert demo.contact_sheet(out, PROMPTS, record["variants"], ["Art (c) A"]).height > plain.height


def test_difference_is_in_levels(tmp_path):
    for name, level in (("a", 10), ("b", 14)):
        Image.new("RGB", (8, 8), (level, 10, 10)).save(tmp_path / f"{name}.png")
    assert demo.difference(tmp_path / "a.png", tmp_path / "b.png") == pytest.approx(4 / 3, abs=1e-3)
    assert demo.difference(tmp_path / "a.png", tmp_path / "a.png") == 0


def test_published_numbers_are_the_records():
    """The table of docs/samplers.md, line by line, from the record beside it."""
    record = json.loads((DOCS / "results" / "demo_emoji-flux_cpu.json").read_text())
    rows = re.findall(
        r"^\| `?([a-z0-9 ]+?)`? \| (\d+) \| (\d+) \| ([\d.]+) \|(.*?)\|(.*?)\|$", PAGE.read_text(), re.MULTILINE
    )
    expected = []
    for i, r in enumerate(record["variants"]):
        apart = "identical" if r["identical"] else f"{r['difference']:.2f} / 255"
        low, high = r["speedup_range"]
        cells = (f"{r['speedup']:.2f}", f" {low:.2f} to {high:.2f} ", f" {apart} ") if i else ("1", " ", " ")
        expected.append((r["sampler"] or "plain pipeline", str(r["steps"]), f"{r['nfe']:g}", *cells))
    assert rows == expected
    assert record["device"]["name"] in PAGE.read_text() and record["started"][:10] in PAGE.read_text()


def row(**changes):
    plain = {"sampler": None, "student": None, "steps": 28, "label": "plain", "nfe": 28, "seconds": 2.0,
             "difference": 0.0, "identical": True, "speedup": 1.0, "speedup_range": [0.9, 1.1]}  # fmt: skip
    return {**plain, **changes}


def test_sentences_say_what_the_numbers_say():
    euler = row(sampler="euler")
    fast = [row(sampler=s, steps=8, nfe=8, label=s, difference=d, speedup=3.4) for s, d in (("a", 5.0), ("b", 2.0))]
    same, few = findings([row(), euler, *fast])
    assert "pixel for pixel" in same and "in the same time" in same
    slower = row(sampler="euler", speedup=0.8, speedup_range=[0.7, 0.9])
    assert "0.80 times as fast" in findings([row(), slower])[0]
    assert "b stays closest" in few and "3.4 times as fast" in few
    assert "0.40 levels off" in findings([row(), row(sampler="euler", identical=False, difference=0.4)])[0]
    assert findings([row()]) == []
    student = row(student="small", steps=1, nfe=1, label="small, 1 step", difference=9.0, speedup=12.0)
    (sentence,) = findings([row(), student])
    assert sentence.startswith("small is a model of its own") and "1 instead of 28" in sentence


@pytest.mark.slow
@pytest.mark.skipif("emoji-flux-1step" not in zoo.names(), reason="no student is in this checkout")
def test_the_models_students_are_columns_that_draw_as_their_cards_say(tmp_path):
    *_, student = default_variants("emoji-flux", 2, 1)
    assert student == DemoVariant(None, 1, "emoji-flux-1step") and default_variants("./folder")[-1].student is None
    record = run_demo(tmp_path, prompts=("red apple, noto",), variants=[DemoVariant(None, 2), student], size=(64, 64),
                      progress=False)  # fmt: skip
    base, own = record["variants"]
    assert (base["forwards"], own["forwards"], own["label"]) == (4, 1, "emoji-flux-1step, 1 step")
    assert not own["identical"] and "is a model of its own" in (tmp_path / "index.html").read_text()
