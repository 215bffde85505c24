"""Drafts on a GPU: every kind of draft, budgets in seconds, previews, and the plain pipeline afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import diffaccel
from diffaccel.samplers import RBF, Drafts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = ["a green pear, noto", "two red apples, twemoji"]


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = diffaccel.load("emoji-flux").to("cuda", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, config: Any = None) -> tuple[torch.Tensor, dict[str, Any]]:
    if config is not None:
        diffaccel.accelerate(pipe, config)
    try:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
        images = pipe(PROMPTS, num_inference_steps=8, generator=generators, output_type="pt").images
        return images, (diffaccel.summary(pipe).last_run or {}).get("report", {})
    finally:
        diffaccel.remove(pipe)


@pytest.mark.parametrize(
    "draft", ["plain", "steps:4", "taylorseer:interval=2,warmup=2", "bottleneck:preset=speed", "w8a8", "fused_blocks"]
)
def test_every_kind_of_draft(pipe: Any, draft: str) -> None:
    before, _ = drawn(pipe)
    images, report = drawn(pipe, Drafts(budget=100, draft=draft))
    assert bool(torch.isfinite(images).all())
    for picture in report["search"]["pictures"]:
        assert picture["used"]["finished"] == 2 and picture["nfe"] <= 100
    after, _ = drawn(pipe)
    assert torch.equal(before, after)


@pytest.mark.parametrize("config", [Drafts(seconds=2.0), Drafts.paper(seconds=2.0)], ids=["default", "paper"])
def test_a_budget_in_seconds_buys_rounds(pipe: Any, config: Drafts) -> None:
    _, report = drawn(pipe, config)
    rounds = {picture["used"]["rounds"] for picture in report["search"]["pictures"]}
    assert len(rounds) == 1 and rounds.pop() >= 2
    seconds = report["search_seconds"]
    assert all(seconds[part] > 0 for part in ("network", "decode", "reward"))


def test_previews_decode_less(pipe: Any) -> None:
    _, full = drawn(pipe, RBF(budget=200))
    _, cheap = drawn(pipe, RBF(budget=200, preview="linear", score_from=0.4))
    scored = [sum(p["scored"] for p in report["search"]["pictures"]) for report in (full, cheap)]
    assert scored[1] < scored[0]
    assert all(p["reward"] is not None for p in cheap["search"]["pictures"])
