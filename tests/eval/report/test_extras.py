"""What a report adds to the numbers: credits of the pictures, FLOPs, latency and throughput by batch."""

from __future__ import annotations

import pytest

from diffaccel import zoo
from diffaccel.eval.report import by_batch, flops
from diffaccel.eval.report.credits import credits_of
from diffaccel.eval.report.markdown import markdown
from diffaccel.eval.report.page import html_text
from tests.support.report_rows import report, row, score, speedup


def of_model(model, *rows, **settings):
    made = report(*rows or (score("fast", -1.0, -2.0, -0.5), speedup("fast", 2.0)))
    for run in made["runs"]:
        run["settings"] = {"model": model, **settings}
    return made


@pytest.mark.parametrize("model", ["emoji-flux", "/home/x/.cache/diffaccel/zoo/emoji-flux-0123456789ab"])
def test_pictures_of_a_zoo_model_are_credited_on_page_and_markdown(model):
    made = of_model(model)
    (lines,) = credits_of(made).values()
    assert len(lines) == 4 and lines[1].startswith("Twemoji graphics") and "CC-BY 4.0" in lines[1]
    assert lines[1].endswith("modified (rendered, recoloured, composed)")
    assert " ".join(lines) == " ".join(zoo.card("emoji-flux")["attribution"])  # not a word less
    page, text = html_text(made), markdown(made)
    footer = page.partition("<footer>")[2].partition("</footer>")[0]
    assert all(
        "Twemoji graphics (c) Twitter, Inc. and other contributors, CC-BY 4.0" in part for part in (footer, text)
    )


def test_other_models_have_no_credits_and_a_report_keeps_its_own():
    assert credits_of(of_model("black-forest-labs/FLUX.1-dev")) == {}
    assert "<footer>" not in html_text(of_model("somewhere"))
    assert credits_of(of_model("x") | {"credits": {"older": ["Somebody."]}}) == {"older": ["Somebody."]}


def test_flops_are_the_rows_times_the_closed_form():
    from diffusers import FluxTransformer2DModel

    from diffaccel.families.flops import flops as closed_form

    rows = [row("forwards", name, n, family="cost") for name, n in (("base", 100.0), ("fast", 16.0), ("cached", 16.0))]
    made = of_model("emoji-flux", *rows, size=[128, 64], methods=[])
    made["runs"][2]["settings"] = made["runs"][0]["settings"] | {"methods": [{"name": "some-cache"}]}
    base, fast = flops.rows(made)  # nothing is known of what a cache leaves out
    network = FluxTransformer2DModel.from_pretrained(zoo.path("emoji-flux") / "transformer")
    one = closed_form(network, batch=1, height=16, width=8, text=32)
    assert base["value"] == pytest.approx(100 * one / 1e12) and base["unit"] == "TFLOP"
    assert (fast["run"], fast["delta"]) == ("fast", pytest.approx(-84 * one / 1e12))
    assert flops.rows(of_model("not/here", *rows, size=[64, 64])) == []


def timing(images, *seconds):
    entries = [
        {"name": name, "seconds": list(times), "turns": len(times), "ratio": ratio}
        for name, times, ratio in zip(("base", "fast"), seconds, (None, RATIO), strict=True)
    ]
    return {"images_a_call": images, "device": {"name": "a GPU", "type": "cuda"}, "variants": entries}


RATIO = {"value": 2.0, "low": 1.9, "high": 2.1}


def test_latency_and_throughput_by_batch():
    section = by_batch.section([timing(8, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)), timing(1, (0.1,) * 3, (0.04,) * 3)])
    assert [line[:4] for line in section.rows] == [
        ("base", "1", "100.0", "10"), ("base", "8", "500.0", "16"),
        ("fast", "1", "40.0", "25"), ("fast", "8", "250.0", "32"),
    ]  # fmt: skip
    assert section.rows[2][4] == "2.00x (1.90 to 2.10)" and section.rows[0][4] == "" and "a GPU" in section.note
    assert section.data["numbers"][1] == {
        "run": "base", "batch": 8, "latency": 0.5, "throughput": 16.0, "ratio": None, "turns": 3
    }  # fmt: skip
    assert by_batch.section([]) is None


def test_the_batch_of_the_times_is_on_the_page():
    seconds = row("seconds", "fast", 0.5, family="cost", detail={"batch": 8, "from": "turns on one machine"})
    made = of_model("x", seconds, speedup("fast", 2.0, 1.9, 2.1), row("seconds", "base", 1.0, family="cost"))
    (line,) = by_batch.section_of_rows(made).rows  # of the baseline's times no batch is known
    assert line == ("fast", "8", "4000.0", "2", "2.00x (1.90 to 2.10)", "")
    assert "turns on one machine; 8 pictures in a call" in html_text(made)
    assert by_batch.section_of_rows(of_model("x")) is None


def test_the_reference_of_distributions_is_named():
    made = of_model("x") | {"reference": "Against <statistics>."}
    assert "Against &lt;statistics&gt;." in html_text(made) and "Against &lt;statistics&gt;." in markdown(made)


@pytest.mark.parametrize(("count", "heading"), [(2, "# way-0, way-1 against base"), (7, "# 7 runs against base")])
def test_the_heading_of_a_markdown_names_a_few_runs(count, heading):
    made = report(*(speedup(f"way-{i}", 1.5, 1.4, 1.6) for i in range(count)))
    assert markdown(made).splitlines()[0] == heading
