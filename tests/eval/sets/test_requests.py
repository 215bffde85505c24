"""Which prompts a request has: those of the command, or the first of the packaged ones."""

from __future__ import annotations

import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.sets import prompts
from diffaccel.eval.sets.requests import DEFAULT_FIRST, DEFAULT_SET, load_texts, with_texts
from diffaccel.runs.request import Request


@pytest.mark.parametrize("first", [3, None])
def test_a_number_of_prompts_counts_without_a_file_too(first: int | None) -> None:
    request = with_texts(Request(model="emoji-flux"), load_texts(None, first), None, first)
    assert request.prompts == prompts.read(DEFAULT_SET).first(first or DEFAULT_FIRST).texts


def test_a_number_of_prompts_of_a_model_that_takes_none_is_refused() -> None:
    from diffusers import DDPMPipeline

    with pytest.raises(DiffAccelError, match=r"first is 3, a number of prompts, .* draws from noise alone\. Give num"):
        with_texts(Request(model="ddpm"), load_texts(None, 3), DDPMPipeline, 3)


def test_the_report_draws_so_many_prompts() -> None:
    from scripts.fid_report import make_parser, plan_of

    options = make_parser().parse(["--accel", "dpmpp2m", "--first", "3", "--out", "report"])
    assert len(plan_of(options).request.prompts) == 3


@pytest.mark.parametrize("texts", [[], ()])
def test_no_prompts_are_not_the_default_ones(texts: list[str] | tuple[str, ...]) -> None:
    with pytest.raises(DiffAccelError, match=r"^Got no prompts, an empty sequence\. Give one or more, or None"):
        load_texts(texts)
