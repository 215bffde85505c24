"""Verdict words: better, worse, same or not shown, and the sentence and headline that they make."""

from __future__ import annotations

import pytest

from diffaccel.eval.comparison import verdict
from diffaccel.eval.report import summary, tables
from tests.support.report_rows import report, row, score, speedup

SEEDS = {"floor": 0.05, "floor_interval": {"low": -0.3, "high": 0.4, "units": 100}}
FEW_SEEDS = {"floor": -3.2, "floor_interval": {"low": -10.38, "high": 2.1, "units": 10}}


@pytest.mark.parametrize(
    ("measured", "word"),
    [
        (score("x", 0.3, 0.1, 0.5), "better"),
        (score("x", -0.3, -0.5, -0.1), "worse"),
        (score("x", 0.3, 0.1, 0.5, better="lower"), "worse"),
        (score("x", -0.3, -0.5, -0.1, better="lower"), "better"),
        (score("x", 0.0, -0.1, 0.1), "not shown"),  # nothing says how much is nothing
        (score("x", 0.0, -0.1, 0.1, **SEEDS), "same"),
        (score("x", 0.0, -0.2, 0.2, **SEEDS), "not shown"),  # inside what other seeds do to 100 prompts, not to 1,000
        (score("x", -1.27, -3.82, 0.22, units=10, **FEW_SEEDS), "not shown"),  # few prompts widen no margin
        (score("x", 0.0, -0.1, 0.1, **FEW_SEEDS), "same"),
        (
            score("x", 0.0, -0.1, 0.1, floor=0.05, floor_interval={"low": -0.3, "high": 0.4}),
            "not shown",
        ),  # of how many?
        (score("x", -0.2, -0.3, -0.1, **SEEDS), "worse"),  # proven, if small
        (score("x", 0.0, 0.0, 0.0), "same"),
        (score("x", -3.0, -5.0, -1.0, units=9), "not shown"),
        (row("clip_score", "x", 80.0, delta=-1.0), "not shown"),
        (row("fd", "x", 2.0, family="distribution", better="lower", delta=0.5, delta_low=0.2, delta_high=0.9), "worse"),
        (row("ssim", "x", 0.9, family="fidelity", low=0.8, high=0.95, floor=0.7), ""),  # no quality
        (row("psnr", "x", None, family="fidelity", identical=True), "same"),
        (speedup("x", 2.0, 1.9, 2.1), "better"),
        (speedup("x", 0.5, 0.4, 0.6), "worse"),
        (speedup("x", 1.0, 0.9, 1.1), "not shown"),
        (speedup("x", 2.0), "not shown"),
        (row("nfe", "x", 8.0, family="cost", better="lower", delta=-42.0), "better"),
        (row("flops", "x", 8.0, family="cost", better="lower", delta=0.0), "same"),
        (row("peak_memory", "x", 8.0, family="cost", better="lower", delta=1.0), ""),  # without an interval
    ],
)
def test_words(measured, word):
    assert verdict.word(measured) == word


def test_the_margin_of_the_same_is_of_the_deviation_between_seeds_and_not_of_their_number():
    """Exact: intervals of ``s t / sqrt(n)`` give ``1.96 s / sqrt(1000)`` for every ``n``, by their shorter arm."""
    for n, t in ((10, 2.262157), (30, 2.045230), (1000, 1.962341)):
        arm = 3.0 * t / n**0.5
        for arms in ((arm, arm), (arm, 5 * arm), (5 * arm, arm)):
            seeds = {"floor": 0.7, "floor_interval": {"low": 0.7 - arms[0], "high": 0.7 + arms[1], "units": n}}
            margin = verdict.same_margin(score("x", 0.0, -0.1, 0.1, **seeds))
            assert margin == pytest.approx(1.959964 * 3.0 / 1000**0.5, rel=1e-5)
    assert verdict.same_margin(score("x", 0.0, -0.1, 0.1)) is None  # no other seeds
    assert verdict.same_margin(row("ssim", "x", 0.9, family="fidelity", low=0.8, high=0.95, **SEEDS)) is None


def one(*rows):
    return summary.summaries(report(row("clip_score", "base", 80.0), *rows))[0]


def test_a_sentence_says_how_much_faster_and_by_what_it_is_better_or_worse():
    hps = row("hpsv2", "x", 2.0, delta=0.5, delta_low=0.4, delta_high=0.6)
    ssim = row("ssim", "x", 0.9951, family="fidelity", low=0.99, high=0.999, key="SSIM")
    run = one(score("x", -0.27, -0.31, -0.22, units=1000), hps, ssim, speedup("x", 1.75, 1.73, 1.77))
    assert run.word == "better and worse"
    assert run.sentence == (
        "1.75x faster (1.73 to 1.77), better by hpsv2 (+0.500, +0.400 to +0.600; 100 prompts), worse by clip_score "
        "(-0.27, -0.31 to -0.22; 1000 prompts), SSIM 0.9951 to the baseline's pictures"
    )


@pytest.mark.parametrize(
    ("speed", "text"),
    [
        (speedup("x", 0.8, 0.75, 0.85), "1.25x slower (1.18 to 1.33)"),
        (speedup("x", 1.01, 0.98, 1.04), "speed-up not shown (1.01x, 0.98 to 1.04)"),
        (speedup("x", 2.0), "2.00x as fast (by the runs' own clocks, without an interval)"),
        (speedup("x", 2.0) | {"detail": {"turns": 3}}, "2.00x as fast (3 turns, too few for an interval)"),
        (row("speedup", "x", None, family="cost", missing="a twin"), "speed not measured (a twin)"),
    ],
)
def test_speed_in_a_sentence(speed, text):
    assert one(speed).sentence == text


def test_few_prompts_have_no_verdict():
    run = one(score("x", -3.0, -5.0, -1.0, units=6))
    assert run.word == "not shown" and "no verdict by clip_score" in run.sentence
    assert "too few prompts (n = 6) for a verdict" in run.sentence


def test_equal_pictures_are_the_same_whatever_else_is_measured():
    psnr = row("psnr", "x", None, family="fidelity", identical=True, key="PSNR")
    run = one(psnr, score("x", 0.0, 0.0, 0.0))
    assert run.word == "same" and "pixel for pixel the baseline's pictures" in run.sentence


def test_the_headline_counts_words():
    made = report(
        score("a", -1.0, -2.0, -0.5), score("b", 0.0, -1.0, 1.0), score("c", -1.0, -2.0, -0.5),
        speedup("a", 1.5, 1.4, 1.6), speedup("b", 3.0, 2.9, 3.1),
    )  # fmt: skip
    assert summary.headline(made) == "1.50x to 3.00x as fast; quality worse in 2, not shown in 1 of 3 runs"
    assert summary.headline(report(score("a", 1.0, 0.5, 2.0))) == "Speed not measured, quality better"
    assert [entry["word"] for entry in summary.verdicts(made)] == ["worse", "not shown", "worse"]


def test_an_interval_that_excludes_zero_is_printed_so() -> None:
    """The end next to zero keeps a digit more where it would round to zero; an interval around zero does not."""
    row = {"metric": "clip_score"}
    assert verdict.ends(row, {"low": -0.1148, "high": -0.0044}, "+") == "-0.11 to -0.004"
    assert verdict.ends(row, {"low": -0.1148, "high": 0.0044}, "+") == "-0.11 to +0.00"
    assert verdict.ends(row, {"low": 0.0, "high": 0.0}) == "0.00 to 0.00"


def test_the_first_screen_explains_its_own_columns_and_words_alone():
    ssim = row("ssim", "fast", 0.9, family="fidelity", key="SSIM")
    told = summary.how_to_read(report(score("fast", -1.0, -2.0, -0.5), ssim, speedup("fast", 2.0)))
    assert "clip_score ↑: change from the baseline. SSIM ↑: to the baseline's pictures, 1 is equal." in told
    assert "worse: the interval leaves out 0" in told and "better" not in told and "same" not in told
    told = summary.how_to_read(report(score("fast", 0.1, -0.2, 0.5), score("slow", 1.0, 0.5, 2.0)))
    assert "better: the interval leaves out 0. not shown: not proven either way." in told and "SSIM" not in told


@pytest.mark.parametrize(
    ("speeds", "text"),
    [
        ([speedup("a", 1.2, 0.9, 1.5)], "Speed-up not shown"),  # whose interval holds 1
        ([speedup("a", 1.6)], "1.60x as fast, without an interval"),
        ([speedup("a", 0.5, 0.4, 0.6)], "0.50x as fast"),
        ([speedup("a", 1.6, 1.5, 1.7), speedup("b", 3.0, 0.9, 4.0)], "1.60x as fast, not shown in 1"),
    ],
)
def test_the_headline_says_no_more_than_the_intervals(speeds, text):
    assert summary.headline(report(*speeds)).startswith(text + (", " if len(speeds) == 1 else "; "))


def test_a_page_of_runs_of_different_counts_says_so():
    made = report(score("a", -1.0, -2.0, -0.5, units=5))
    made["runs"][1]["images"] = 5
    assert tables.counted(made).startswith("5 to 100 pictures a run, ")
    for run in made["runs"]:
        run["images"] = 1
    assert tables.counted(made).startswith("1 picture a run of 5 prompts, ")


def test_a_note_of_one_run_is_not_told_of_all():
    noted = score("a", -1.0, -2.0, -0.5, detail={"from": "4 of 30 carry the spread"})
    (table,) = tables.metric_tables(report(noted, score("b", -1.0, -2.0, -0.5)))
    assert table.notes == [("4 of 30 carry the spread", ["clip_score of a"])]
    (table,) = tables.metric_tables(report(noted, {**noted, "run": "b"}))
    assert table.notes == [("4 of 30 carry the spread", ["clip_score"])]
