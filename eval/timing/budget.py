"""Budgets of time: steps of the baseline that fit into an accelerated call, accelerated pictures into the baseline's.

Both are measured in turns on one machine; times of single steps only suggest where the search for steps begins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from diffaccel.eval.metrics.clip_score import prompt_cosine
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.timing.turns import AfterCall, take_turns
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant

_ROUNDS = 4  # of three numbers of steps each, around the one that the times of single steps suggest
Progress = Callable[[str], None]


def expected_steps(seconds: float, steps: int, network: float, limit: float) -> int:
    """Return the most steps with which a call takes at most ``limit`` seconds, if all steps take equally long.

    ``t(k) = seconds - network + k network / steps``: of a call of ``steps`` steps and ``seconds`` seconds, ``network``
    of them in the network. At least 1, at most ``steps``.
    """
    step_seconds = network / steps
    if step_seconds <= 0:
        return max(1, steps)
    return max(1, min(steps, math.floor((limit - seconds + network) / step_seconds * (1 + 1e-12))))


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
    """Find the most steps with which the baseline costs no more than the acceleration.

    Numbers of steps around the expected one take turns with the acceleration; a number fits when the median ratio of
    times, the acceleration's over its own, is 1 or more.

    Args:
        pipe: open, without methods.
        request: its first chunk is what every call draws.
        baseline, accelerated: with the settings of the report.
        timing: of :func:`take_turns`, with both of them.
        turns: timed calls of each.
        progress: called with a line of text before every round.

    Returns:
        JSON-ready: ``steps`` (None where not even one step fits, or the acceleration is no faster) and ``why``,
        ``variant``, ``ratio`` of the chosen one with its interval, ``tried``: ratios by steps.
    """
    entries = {entry["name"]: entry for entry in timing["variants"]}
    base_entry, fast_entry = entries[baseline.name], entries[accelerated.name]
    if _without_steps(accelerated) == _without_steps(baseline):
        return {"steps": None, "why": "it is the baseline with another number of steps"}
    if fast_entry["seconds_per_image"] >= base_entry["seconds_per_image"]:
        return {"steps": None, "why": "it is no faster than the baseline itself"}
    whole = call_arguments(pipe, baseline.of(request).with_model_defaults())["num_inference_steps"]
    images = timing["images_a_call"]
    guess = expected_steps(
        images * base_entry["seconds_per_image"], whole, base_entry["parts"]["network"],
        images * fast_entry["seconds_per_image"],
    )  # fmt: skip

    def ratios_of(window: list[int]) -> dict[int, dict[str, Any]]:
        variants = {steps: _with_steps(baseline, steps) for steps in window}
        progress(f"{accelerated.name} against {', '.join(map(str, window))} steps of the baseline")
        timed = take_turns(pipe, request, [accelerated, *variants.values()], turns=turns, warm_up=1)
        ratios = {entry["name"]: entry["ratio"] for entry in timed["variants"][1:]}
        return {steps: ratios[variant.name] for steps, variant in variants.items()}

    tried = _search_steps(guess, whole, ratios_of)
    steps = most_that_fit(tried)
    if steps is None:
        return {"steps": None, "why": "not even one step of the baseline is as cheap", "tried": tried}
    ratios = {str(k): tried[k] for k in sorted(tried)}
    return {"steps": steps, "variant": _with_steps(baseline, steps).name, "ratio": tried[steps], "tried": ratios}


def _search_steps(
    guess: int, whole: int, ratios_of: Callable[[list[int]], dict[int, dict[str, Any]]]
) -> dict[int, dict[str, Any]]:
    """Time windows of three numbers of steps, moving up or down until some fit and some do not.

    Args:
        guess: middle of the first window.
        whole: the baseline's own number of steps; fewer are tried.
        ratios_of: times numbers of steps, and returns the ratio of each.

    Returns:
        The ratio of every number of steps that was tried.
    """
    tried: dict[int, dict[str, Any]] = {}
    for _ in range(_ROUNDS):
        window = [k for k in range(max(1, guess - 1), min(whole - 1, guess + 1) + 1) if k not in tried]
        if not window:
            break
        tried |= ratios_of(window)
        fitting = most_that_fit(tried)
        if fitting is None:
            guess = min(tried) - 2
        elif fitting == max(tried):
            guess = fitting + 2
        else:
            break
    return tried


def _with_steps(variant: Variant, steps: int) -> Variant:
    return Variant(variant.methods, {**variant.call, "steps": steps})


def _without_steps(variant: Variant) -> Variant:
    return Variant(variant.methods, {key: value for key, value in variant.call.items() if key != "steps"})


def most_that_fit(ratios: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the largest number of steps whose calls took no longer, by the median ratio; None where none did."""
    return max((steps for steps, ratio in ratios.items() if ratio["value"] >= 1), default=None)


def pictures_that_fit(
    pipe: Any,
    request: Request,
    baseline: Variant,
    accelerated: Variant,
    reward: ClipExtractor,
    timing: Mapping[str, Any],
    *,
    turns: int = 10,
    progress: Progress = lambda text: None,
) -> dict[str, Any]:
    """Measure how many accelerated pictures, each with its reward, take no longer than one of the baseline.

    Where the timing has shown that not even two without a reward fit, nothing is measured and ``reward`` is "".

    Args:
        pipe: open, without methods.
        request: its first chunk is what every call draws.
        baseline, accelerated: with the settings of the report.
        reward: network that chooses the best picture.
        timing: of :func:`take_turns`, with both of them.
        turns: timed calls of each.
        progress: called with a line of text before every round.

    Returns:
        JSON-ready: ``ratio`` of the baseline's time over that of an accelerated call and its rewards, and ``pictures``:
        the whole part of its lower end, so that the time is not exceeded by chance; of the smallest ratio of all turns
        where they are too few for an interval.
    """
    entries = {entry["name"]: entry for entry in timing["variants"]}
    known = entries[accelerated.name]["ratio"]
    at_most = known["high"]
    if at_most is None:
        both = (entries[variant.name]["seconds"] for variant in (baseline, accelerated))
        at_most = max(base / own for base, own in zip(*both, strict=False))  # a slow one has fewer turns
    if at_most < 2:
        return {"pictures": 1, "ratio": known, "reward": ""}
    progress(f"{accelerated.name} with its reward against the baseline")
    timed = take_turns(
        pipe, request, [baseline, accelerated], turns=turns, warm_up=1,
        after_call={accelerated.name: reward_scoring(reward)},
    )  # fmt: skip
    base_entry, entry = timed["variants"]
    ratio, low = entry["ratio"], entry["ratio"]["low"]
    if low is None:
        low = min(base / own for base, own in zip(base_entry["seconds"], entry["seconds"], strict=True))
    return {"pictures": max(1, math.floor(low)), "ratio": ratio, "reward": reward.name}


def reward_scoring(reward: ClipExtractor) -> AfterCall:
    """Return the work that choosing a picture adds to a call: its features, its prompt's, and their cosine."""

    def score(pictures: list[Any], prompts: list[str | None]) -> None:
        pixels = [torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) for picture in pictures]
        prompt_cosine(reward, torch.stack(pixels), [prompt or "" for prompt in prompts])

    return score
