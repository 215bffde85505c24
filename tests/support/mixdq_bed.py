"""Plans of tiny pipelines, made in a moment."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import tiny
import tiny_more
import torch

from diffaccel.quant import MixDQ
from diffaccel.quant.mixdq.work import make

PROMPTS = ("a", "a red dog", "b", "two cats", "c c c")
FAST: dict[str, Any] = {"samples": 2, "probes": 1, "steps": 1, "ratios": 2}
_NOT_ASKED = ("prompt", "generator", "num_inference_steps", "output_type")


def pipeline(family: str) -> Any:
    pipe = (tiny if family in tiny.FAMILIES else tiny_more).make(family)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(family: str, **changes: Any) -> dict[str, Any]:
    """What a call of a tiny pipeline takes beside prompts."""
    values = (tiny if family in tiny.FAMILIES else tiny_more).call_kwargs(family, **changes)
    negative = values.get("negative_prompt")
    if isinstance(negative, list):
        values["negative_prompt"] = negative[0]
    return {name: value for name, value in values.items() if name not in _NOT_ASKED}


def draw(pipe: Any, family: str, **changes: Any) -> torch.Tensor:
    kwargs = (tiny if family in tiny.FAMILIES else tiny_more).call_kwargs(family, **changes)
    return tiny_more.result(pipe(**kwargs)).clone()


def planned(family: str, folder: Path, config: MixDQ) -> MixDQ:
    """The config with a plan that was made in a folder."""
    make(pipeline(family), config, folder, PROMPTS, arguments(family))
    return replace(config, plan=str(folder / "plan.json"))


@cache
def uniform(family: str, **options: Any) -> MixDQ:
    """A plan with the same bits everywhere, for tests that ask what a planned network does."""
    folder = Path(tempfile.mkdtemp(prefix="mixdq_"))
    steps = 2 if family == "pixart_alpha" else 1  # whose pipeline takes a call of one step for one of LCM's scheduler
    values = {**FAST, "steps": steps, "allocation": "uniform", "weight_bits": 8.0, **options}
    return planned(family, folder, MixDQ(**values))
