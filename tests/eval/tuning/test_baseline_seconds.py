"""Seconds of the baseline, to which ``--seconds`` is compared: of warm calls, and the same after a stop."""

import pytest
import tiny

from diffaccel.eval.tuning import measuring
from diffaccel.eval.tuning.bed import Part, Refused
from diffaccel.eval.tuning.journal import Journal
from diffaccel.eval.tuning.pipeline_bed import PipelineBed
from diffaccel.runs import chunk
from diffaccel.runs.request import Request


def test_the_first_call_is_left_out_where_one_call_draws_all(tmp_path, monkeypatch):
    """A promise of seconds is certified by warm calls, so that the search must not take a cold one for its limit."""
    took = iter([50.0, 6.0, 2.0, 4.0])
    honest = chunk._cost
    monkeypatch.setattr(chunk, "_cost", lambda *args: honest(*args) | {"seconds": next(took)})
    prompts = ["a cat", "two cats"]
    request = Request(model="tiny", prompts=("x",), size=(32, 32), steps=1, batch=2, threads=1).with_model_defaults()

    def values():
        measures = measuring.measures_of(("ssim",), lpips=None, device="cpu")
        once, parts = Journal(tmp_path, {}).once, {"tuning": prompts}
        bed = PipelineBed(tiny.make("flux"), "", request, parts, tmp_path, ("ssim",), measures, first=2, once=once)
        return bed.baseline_values()

    first = values()
    assert first["seconds"] == pytest.approx(4.0 / 2) and first["ssim"] == 1
    assert values() == first  # no call is left to time
    assert Journal(tmp_path, {}).get("warm seconds") == first["seconds"]


def test_pictures_that_are_not_numbers_refuse_a_plan(tmp_path, monkeypatch):
    """Their mean would be that of the other prompts."""
    request = Request(model="tiny", prompts=("x",), size=(32, 32), steps=1, threads=1).with_model_defaults()
    bed = PipelineBed(
        tiny.make("flux"), "", request, {"tuning": ["a cat"]}, tmp_path, ("ssim",),
        measuring.measures_of(("ssim",), lpips=None, device="cpu"),
    )  # fmt: skip
    monkeypatch.setattr(measuring, "numbers", lambda *args: ({"ssim": [0.9, float("nan")]}, {}))
    with pytest.raises(Refused, match="ssim of what it draws is not a number"):
        bed.evaluate(bed.baseline(), Part("tuning", 0, 1))
