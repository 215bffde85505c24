"""How much fits into a time: steps of the baseline into an acceleration's, accelerated pictures into the baseline's.

Both are measured in turns on one machine; steps that are expected to fit are only where the search begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from diffaccel.eval.metrics import clip_score as alignment
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.timing.turns import Then, take_turns
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant

_ROUNDS = 4  # of three numbers of steps each, around the one that the times of single steps suggest
Progress = Callable[[str], None]


def expected_steps(seconds: float, steps: int, network: float, limit: float) -> int:
    """The most steps that a call may have to take at most ``limit`` seconds, if every step takes as long as another.

    ``t(k) = seconds - network + k network / steps``: of a call of ``steps`` steps and ``seconds`` seconds, ``network``
    of them in the network. At least 1, at most ``steps``.
    """
    each = network / steps
    return max(1, min(steps, math.floor((limit - seconds + network) / each * (1 + 1e-12)) if each > 0 else steps))


def fewer_steps(
    pipe: Any,
    request: Request,
    baseline: Variant,
    accelerated: Variant,
    timing: Mapping[str, Any],
    *,
    turns: int = 10,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """The baseline with the most steps that cost no more than the acceleration.

    Numbers of steps around the expected one take turns with the acceleration; a number fits when the median ratio of
    times, the acceleration's over its own, is 1 or more.

    Args:
        pipe: open, without methods.
        request: its first chunk is what every call draws.
        baseline, accelerated: with the settings of the report.
        timing: of :func:`take_turns`, with both of them.
        turns: timed calls of each.
        progress: told what is timed.

    Returns:
        JSON-ready: ``steps`` (None where not even one step fits, or the acceleration is no faster) and ``why``,
        ``variant``, ``ratio`` of the chosen one with its interval, ``tried``: ratios by steps.
    """
    entries = {entry["name"]: entry for entry in timing["variants"]}
    base, fast = entries[baseline.name], entries[accelerated.name]
    if _without_steps(accelerated) == _without_steps(baseline):
        return {"steps": None, "why": "it is the baseline with another number of steps"}
    if fast["seconds_per_image"] >= base["seconds_per_image"]:
        return {"steps": None, "why": "it is no faster than the baseline itself"}
    whole = call_arguments(pipe, baseline.of(request).with_model_defaults())["num_inference_steps"]
    images = timing["images_a_call"]
    guess = expected_steps(
        images * base["seconds_per_image"], whole, base["parts"]["network"], images * fast["seconds_per_image"]
    )
    tried: dict[int, dict[str, Any]] = {}
    for _ in range(_ROUNDS):
        window = [k for k in range(max(1, guess - 1), min(whole - 1, guess + 1) + 1) if k not in tried]
        if not window:
            break
        chosen = {k: Variant(baseline.methods, {**baseline.call, "steps": k}) for k in window}
        progress(f"{accelerated.name} against {', '.join(map(str, window))} steps of the baseline")
        timed = take_turns(pipe, request, [accelerated, *chosen.values()], turns=turns, warm_up=1)
        ratios = {entry["name"]: entry["ratio"] for entry in timed["variants"][1:]}
        tried |= {k: ratios[variant.name] for k, variant in chosen.items()}
        fits = most_that_fit(tried)
        if fits is None:
            guess = min(tried) - 2
        elif fits == max(tried):
            guess = fits + 2
        else:
            break
    fits = most_that_fit(tried)
    if fits is None:
        return {"steps": None, "why": "not even one step of the baseline is as cheap", "tried": tried}
    name = Variant(baseline.methods, {**baseline.call, "steps": fits}).name
    return {"steps": fits, "variant": name, "ratio": tried[fits], "tried": {str(k): tried[k] for k in sorted(tried)}}


def _without_steps(variant: Variant) -> Variant:
    return Variant(variant.methods, {key: value for key, value in variant.call.items() if key != "steps"})


def most_that_fit(tried: Mapping[int, Mapping[str, Any]]) -> int | None:
    """The largest number of steps whose calls took no longer, by the median ratio; None where none did."""
    return max((steps for steps, ratio in tried.items() if ratio["value"] >= 1), default=None)


def pictures_that_fit(
    pipe: Any,
    request: Request,
    baseline: Variant,
    accelerated: Variant,
    reward: ClipExtractor,
    *,
    turns: int = 10,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """How many accelerated pictures, each with its reward, take no longer than one of the baseline.

    Returns:
        JSON-ready: ``ratio`` of the baseline's time over that of an accelerated call and its rewards, and ``pictures``:
        the whole part of its lower end, so that the time is not exceeded by chance.
    """
    progress(f"{accelerated.name} with its reward against the baseline")
    timed = take_turns(
        pipe, request, [baseline, accelerated], turns=turns, warm_up=1, then={accelerated.name: scoring(reward)}
    )
    ratio = timed["variants"][1]["ratio"]
    return {"pictures": max(1, math.floor(ratio["low"])), "ratio": ratio, "reward": reward.name}


def scoring(reward: ClipExtractor) -> Then:
    """What the choice of a picture adds to a call: its features, its prompt's, and their cosine."""

    def score(pictures: list[Any], prompts: list[str | None]) -> None:
        pixels = [torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) for picture in pictures]
        alignment.prompt_cosine(reward, torch.stack(pixels), [prompt or "" for prompt in prompts])

    return score
